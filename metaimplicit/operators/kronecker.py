"""Kronecker-factored curvature of linear and convolutional layers: K-FAC and EKFAC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaimplicit.operators.base import Curvature, Invertible, LinearOperator, LossParts
from metaimplicit.operators.curvature import Expectation, Hessian, Likelihood, output_scores
from metaimplicit.params import Params, flatten, unflatten

Call = Callable[[Params], Tensor]  # one task's outputs of the model
Lift = Callable[
    [Callable[[Call, Params], Any], Params], Any
]  # a function of one task, over the task axis
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Block:
    """U_G (S ∘ (U_Gᵀ V U_A)) U_Aᵀ for V = [weight, bias] of one layer, `[tasks, out, in (+ 1)]`."""

    weight: str
    bias: str | None
    left: Tensor  # U_G
    right: Tensor  # U_A
    values: Tensor  # S

    def apply(self, parts: Params, values: Tensor) -> Params:
        """The block on `parts`, with other values."""
        weight = parts[self.weight]
        v = (
            weight.flatten(2)
            if self.bias is None
            else torch.cat([weight.flatten(2), parts[self.bias].unsqueeze(-1)], dim=-1)
        )
        v = self.left @ (values * (self.left.mT @ v @ self.right)) @ self.right.mT
        if self.bias is None:
            return {self.weight: v.reshape(weight.shape)}
        return {self.weight: v[..., :-1].reshape(weight.shape), self.bias: v[..., -1]}


class KroneckerFactored(Curvature, Invertible):
    """F ≈ ⊕_layers G ⊗ A with A = E[ā āᵀ] of a layer's inputs and G = E[g gᵀ] of its outputs' gradients.

    Over m examples with R layer_patches each (1 for a linear layer; of a convolution the output pixels, ā its patches),
    A = Σ ā āᵀ/(mR) and G = Σ g gᵀ/m (Martens & Grosse 2015; Grosse & Martens 2016), ā with a 1 where the bias adapts.
    `corrected` keeps the eigenvectors of both and takes the second second_moments of the gradients along their products:
    EKFAC, the best diagonal in that basis (George et al. 2018). A model that couples its examples, as batch-norm
    does, has no gradient of one example: what is used is that of the set's, through this example's outputs.

    Args:
        module: the model whose linear and convolutional layers are looked into, by hooks that are gone afterwards.
        lift: runs a function of one task, `(call, params)`, over the task axis, `call(params)` being the outputs.
        loss: `[tasks, m, d] -> [tasks]`, the mean over examples.
        params: the point θ, task axis first; `{layer}.weight` and `{layer}.bias` by the module's names.
        likelihood, expectation, samples, generator: of the Fisher matrix that is approximated, as in `Fisher`.
        corrected: EKFAC.
        others: of adapted parameters of any other layer: `"raise"`, or `"zero"`, a zero block.

    Raises:
        ValueError: an adapted parameter of another kind of layer; a layer that is called twice, or not at all, is
            grouped, or padded otherwise than by zeros; outputs of more axes.
    """

    semidefinite = True

    def __init__(
        self,
        module: nn.Module,
        lift: Lift,
        loss: Callable[[Tensor], Tensor],
        params: Params,
        *,
        likelihood: Likelihood = "softmax",
        expectation: Expectation = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
        corrected: bool = False,
        others: Literal["raise", "zero"] = "raise",
    ) -> None:
        if others not in ("raise", "zero"):
            raise ValueError(f"KFAC others: got {others!r}, expected 'raise' or 'zero'")
        first = next(iter(params.values()))
        self.params = {name: p.detach() for name, p in params.items()}
        self.shape = (len(first), sum(p[0].numel() for p in params.values()))
        self.dtype, self.device = first.dtype, first.device
        layers = _layers(module, self.params, others)

        def sizes(call: Call, own: Params) -> Params:
            found: Params = {}
            record_layers(
                layers,
                lambda: call(own),
                lambda name, _, output: found.update({name: output}),
                _ADVICE,
            )
            return found

        def probed(call: Call, both: Params) -> tuple[Tensor, Params]:
            found: Params = {}

            def record(name: str, given: Tensor, output: Tensor) -> Tensor:
                found[name] = given
                return output + both[f"probe {name}"]

            own = {name: both[name] for name in self.params}
            return record_layers(layers, lambda: call(own), record, _ADVICE), found

        with torch.no_grad():
            probes = {
                name: torch.zeros_like(out).requires_grad_()
                for name, out in lift(sizes, self.params).items()
            }
        with torch.enable_grad():
            both = self.params | {f"probe {name}": probe for name, probe in probes.items()}
            outputs, inputs = lift(probed, both)
            if outputs.dim() != 3:
                raise ValueError(
                    f"KFAC: got outputs of shape {tuple(outputs.shape)}, expected [tasks, m, d], a row for each "
                    "example; use curvature='gauss-newton'"
                )
            z = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(z).sum(), z)
        scores = output_scores(z.detach(), slope, likelihood, expectation, samples, generator)
        found = torch.autograd.grad(outputs, list(probes.values()), scores, is_grads_batched=True)
        gradients = dict(zip(probes, found, strict=True))
        self.blocks = [
            _block(name, layer, self.params, inputs[name].detach(), gradients[name], corrected)
            for name, layer in layers.items()
        ]

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> KroneckerFactored:
        gradient = Hessian.from_loss(parts).gradient
        operator = cls._factor(parts, **options)
        operator.gradient = gradient
        return operator

    @classmethod
    def preconditioner(
        cls, core: LinearOperator, parts: LossParts, **options: Any
    ) -> KroneckerFactored:
        return cls._factor(parts, **options)

    @classmethod
    def _factor(cls, parts: LossParts, **options: Any) -> KroneckerFactored:
        if parts.module is None or parts.apply_model is None:
            raise ValueError(
                "K-FAC: got an inner loss that hides its layers, expected Composite(…, module=model)"
            )
        if parts.weighted:
            raise ValueError(
                "K-FAC: got an inner loss with weights, which it does not see; use 'gauss-newton'"
            )
        return cls(parts.module, parts.apply_model, parts.loss, parts.params, **options)

    def matvec(self, vector: Tensor) -> Tensor:
        return self._apply(vector, lambda values: values, 0.0)

    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(F + sI)⁻¹ v, exactly, for s > 0."""
        return self._apply(vector, lambda values: 1 / (values + shift), 1 / shift)

    def _apply(self, vector: Tensor, weigh: Callable[[Tensor], Tensor], rest: float) -> Tensor:
        parts = unflatten(vector, self.params)
        product = {name: rest * part for name, part in parts.items()}
        for block in self.blocks:
            product |= block.apply(parts, weigh(block.values))
        return flatten(product)


def _layers(module: nn.Module, params: Params, others: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers whose weights adapt, by name, each of a kind that is known."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    covered = set()
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and f"{prefix}weight" in params:
            found[name] = layer
            covered |= {f"{prefix}weight", f"{prefix}bias"}
            if not is_supported(layer):
                raise ValueError(
                    f"KFAC: layer {name!r} is grouped, or its padding is not a number of zeros, or its forward is its "
                    "own; use curvature='gauss-newton'"
                )
    if others == "raise" and (unknown := sorted(set(params) - covered)):
        raise ValueError(
            f"KFAC: {unknown[0]!r} belongs to no linear or 2-d convolutional layer whose weight adapts; leave it out "
            "by adapt=, give its block up by others='zero', or use curvature='gauss-newton'"
        )
    return found


_ADVICE = "leave it out by adapt=, or use curvature='gauss-newton'"


def record_layers(
    layers: Mapping[str, nn.Module],
    function: Callable[[], Result],
    record: Callable[[str, Tensor, Tensor], Tensor | None],
    advice: str,
) -> Result:
    """The result of `function`, each layer's input and output shown to `record`, which may replace the output.

    Raises:
        ValueError: a layer is called twice, or not at all; `advice` says what to do.
    """
    called: set[str] = set()

    def hook(
        name: str,
    ) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor | None]:
        def look(
            _: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> Tensor | None:
            if name in called:
                raise ValueError(f"KFAC: layer {name!r} is called twice, expected once; {advice}")
            called.add(name)
            return record(name, (*given, *named.values())[0], output)

        return look

    handles = [
        layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        result = function()
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(set(layers) - called):
        raise ValueError(f"KFAC: layer {missing[0]!r} adapts but is not called; {advice}")
    return result


def is_supported(layer: nn.Module) -> bool:
    """Whether a layer is torch's own, and every output of a convolution sees a patch of all channels, zeros around."""
    if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
        return False
    if not isinstance(layer, nn.Conv2d):
        return True
    return (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def layer_patches(
    layer: nn.Linear | nn.Conv2d, inputs: Tensor, gradients: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """ā `[tasks, m, R, in (+ 1)]` and g `[count, tasks, m, R, out]` of a layer's R layer_patches for each example.

    Args:
        layer: linear, or a convolution that is `is_supported`.
        inputs: of the layer, `[tasks, m, …]`.
        gradients: in its outputs, `[count, tasks, m, …]`.
        bias: whether ā ends with a 1.
    """
    tasks, m = inputs.shape[:2]
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        patches = F.unfold(
            inputs.flatten(0, 1), layer.kernel_size, layer.dilation, padding, layer.stride
        )
        a, g = patches.mT.reshape(tasks, m, patches.shape[-1], -1), gradients.flatten(4).mT
    else:
        a, g = (
            inputs.reshape(tasks, m, -1, inputs.shape[-1]),
            gradients.reshape(*gradients.shape[:3], -1, layer.out_features),
        )
    if bias:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    return a, g


def second_moments(a: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """A = E[ā āᵀ] over layer_patches, `[tasks, in (+ 1), in (+ 1)]`, and G = Σ g gᵀ/examples, `[tasks, out, out]`."""
    rows, slopes = a.flatten(1, 2), g.transpose(0, 1).flatten(1, 3)
    return rows.mT @ rows / rows.shape[1], slopes.mT @ slopes / examples


def _block(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    params: Params,
    inputs: Tensor,
    gradients: Tensor,
    corrected: bool,
) -> _Block:
    """From inputs `[tasks, m, …]` and gradients `[count, tasks, m, …]` of a layer's outputs."""
    prefix, m = f"{name}." if name else "", inputs.shape[1]
    bias = f"{prefix}bias" if f"{prefix}bias" in params else None
    a, g = layer_patches(layer, inputs, gradients, bias is not None)
    second, scatter = second_moments(a, g, m)
    (along_a, right), (along_g, left) = torch.linalg.eigh(second), torch.linalg.eigh(scatter)
    values = along_g.clamp(min=0).unsqueeze(-1) * along_a.clamp(min=0).unsqueeze(-2)
    if corrected:
        turned = a @ right.unsqueeze(1)
        each = [
            torch.einsum("tmro,tmri->tmoi", one @ left.unsqueeze(1), turned).square().sum(1)
            for one in g
        ]
        values = torch.stack(each).sum(0) / m
    return _Block(f"{prefix}weight", bias, left, right, values)
