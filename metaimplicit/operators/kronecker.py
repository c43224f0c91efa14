"""Kronecker-factored curvature of linear and convolutional layers: K-FAC and EKFAC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaimplicit.operators.base import Invertible, LinearOperator
from metaimplicit.operators.curvature import Curvature, LossParts
from metaimplicit.operators.fisher import (
    Expectation,
    Likelihood,
    output_scores,
)
from metaimplicit.operators.hessian import Hessian
from metaimplicit.operators.layers import (
    Layers,
    Lift,
    is_supported,
    layer_patches,
    record_with_probes,
    second_moments,
)
from metaimplicit.params import Params, flatten, unflatten

ADVICE = "leave it out by adapt=, or use curvature='gauss-newton'"


class KroneckerFactored(Curvature, Invertible):
    """K-FAC: F ≈ ⊕_layers G ⊗ A, with A = E[ā āᵀ] and G = E[g gᵀ] of each layer.

    Here ā is a layer's input, with a 1 at its end if the bias adapts, and g the gradient in its
    output (Martens & Grosse 2015). Over m examples with R positions each, A = Σ ā āᵀ/(mR) and
    G = Σ g gᵀ/m. A linear layer has R = 1. For a convolution the positions are the output pixels,
    and ā is the patch under one (Grosse & Martens 2016).

    If the model couples its examples, as batch-norm does, no example has a gradient of its own.
    Then g is the gradient of the whole set through the outputs of this example.

    Args:
        module: The model, whose linear and convolutional layers are recorded by hooks. The hooks
            are removed again.
        lift: Runs a function of one task over the task axis: `(function, params)`, where
            `function(call, params)` receives the model as `call(params) -> outputs`.
        loss: `[tasks, m, d] -> [tasks]`, the mean over examples.
        params: The point θ, `{name: [tasks, *shape]}`, by the module's names.
        likelihood: As in `Fisher`, the matrix that is approximated.
        expectation: As in `Fisher`.
        samples: As in `Fisher`.
        generator: As in `Fisher`.
        corrected: Use EKFAC: keep the eigenvectors of G ⊗ A, and take the second moments of the
            gradients along them as the eigenvalues, which is the best diagonal in that basis
            (George et al. 2018).
        others: What to do with adapted parameters of any other layer: `"raise"`, or `"zero"`, which
            gives them a zero block.

    Attributes:
        blocks: The eigenvectors and eigenvalues of G ⊗ A, one block for each layer.
        gradient: ∂ℓ/∂θ with its graph. Only `from_loss` sets it.

    Raises:
        ValueError: A parameter of another kind of layer adapts. A layer is called twice, or not at
            all, is grouped, or is padded with anything but zeros. The outputs do not have the
            shape [tasks, m, d].

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # one task, two examples
        >>> def lift(function, params):
        ...     def one_task(p, inputs):
        ...         call = lambda q: torch.func.functional_call(model, q, (inputs,))
        ...         return function(call, p)
        ...     return torch.vmap(one_task)(params, x)
        >>> kfac = KroneckerFactored(
        ...     model,
        ...     lift,
        ...     loss=lambda z: 0.5 * z.square().mean((1, 2)),
        ...     params={"weight": torch.ones(1, 1, 2)},
        ...     likelihood="gaussian",
        ... )
        >>> torch.allclose(kfac.matvec(torch.ones(1, 2)), torch.tensor([[0.5, 2.0]]))  # G = 1
        True
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
        self.dtype = first.dtype
        self.device = first.device

        layers = _adapted_layers(module, self.params, others)
        recording = record_with_probes(layers, lift, self.params, advice=ADVICE)
        if recording.outputs.dim() != 3:
            raise ValueError(
                f"KFAC: got outputs of shape {tuple(recording.outputs.shape)}, expected "
                "[tasks, m, d], a row for each example; use curvature='gauss-newton'"
            )
        z = recording.outputs.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(z).sum(), z)
        scores = output_scores(
            z.detach(),
            slope,
            likelihood=likelihood,
            expectation=expectation,
            samples=samples,
            generator=generator,
        )
        gradients = recording.output_gradients(scores)
        self.blocks = [
            _make_block(
                name,
                layer,
                self.params,
                inputs=recording.inputs[name],
                gradients=gradients[name],
                corrected=corrected,
            )
            for name, layer in layers.items()
        ]

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> KroneckerFactored:
        """The factors of a loss; `options` are the keyword arguments of the constructor.

        Raises:
            ValueError: The loss hides its layers, or weighs its examples.
        """
        gradient = Hessian.from_loss(parts).gradient
        operator = cls._factor(parts, **options)
        operator.gradient = gradient
        return operator

    @classmethod
    def preconditioner(
        cls, core: LinearOperator, parts: LossParts, **options: Any
    ) -> KroneckerFactored:
        """The factors of a loss, without its gradient. It does not look at `core`."""
        return cls._factor(parts, **options)

    @classmethod
    def _factor(cls, parts: LossParts, **options: Any) -> KroneckerFactored:
        if parts.module is None or parts.apply_model is None:
            raise ValueError(
                "KFAC: got an inner loss that hides its layers, expected Composite(…, module=model)"
            )
        if parts.weighted:
            raise ValueError(
                "KFAC: got an inner loss with weights, which it does not see; use 'gauss-newton'"
            )
        lift = parts.apply_model
        return cls(parts.module, lift, loss=parts.loss, params=parts.params, **options)

    def matvec(self, vector: Tensor) -> Tensor:
        """The product F v, `[tasks, n] -> [tasks, n]`."""
        return self._apply(vector, [block.values for block in self.blocks], other=0.0)

    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(F + sI)⁻¹ v with s = `shift` > 0, exactly, `[tasks, n] -> [tasks, n]`."""
        inverses = [1 / (block.values + shift) for block in self.blocks]
        return self._apply(vector, inverses, other=1 / shift)

    def _apply(
        self,
        vector: Tensor,
        values: Sequence[Tensor],
        other: float,
    ) -> Tensor:
        """The product with the blocks of these eigenvalues, and `other` times what has no block."""
        parts = unflatten(vector, self.params)
        product = {name: other * part for name, part in parts.items()}
        for block, eigenvalues in zip(self.blocks, values, strict=True):
            product |= block.apply(parts, eigenvalues)
        return flatten(product)


@dataclass(frozen=True)
class _Block:
    """One layer's V ↦ U_G (S ∘ (U_Gᵀ V U_A)) U_Aᵀ, V = [weight, bias] `[tasks, out, in (+ 1)]`.

    The eigenvectors of G ⊗ A are the columns of U_G ⊗ U_A, and S holds the eigenvalues.
    """

    weight: str
    bias: str | None
    left: Tensor  # U_G, [tasks, out, out]
    right: Tensor  # U_A, [tasks, in (+ 1), in (+ 1)]
    values: Tensor  # S, [tasks, out, in (+ 1)]

    def apply(self, parts: Params, values: Tensor) -> Params:
        """The product with the layer's entries of `parts`, with `values` in the place of S."""
        weight = parts[self.weight]
        v = weight.flatten(2)
        if self.bias is not None:
            v = torch.cat([v, parts[self.bias].unsqueeze(-1)], dim=-1)
        v = self.left @ (values * (self.left.mT @ v @ self.right)) @ self.right.mT
        if self.bias is None:
            return {self.weight: v.reshape(weight.shape)}
        return {self.weight: v[..., :-1].reshape(weight.shape), self.bias: v[..., -1]}


def _adapted_layers(
    module: nn.Module,
    params: Params,
    others: str,
) -> Layers:
    """The linear and convolutional layers whose weights adapt, by name."""
    layers: Layers = {}
    covered = set()
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or f"{prefix}weight" not in params:
            continue
        if not is_supported(layer):
            raise ValueError(
                f"KFAC: layer {name!r} is grouped, or its padding is not a number of zeros, or its "
                "forward is its own; use curvature='gauss-newton'"
            )
        layers[name] = layer
        covered |= {f"{prefix}weight", f"{prefix}bias"}
    unknown = sorted(set(params) - covered)
    if unknown and others == "raise":
        raise ValueError(
            f"KFAC: {unknown[0]!r} belongs to no linear or 2-d convolutional layer whose weight "
            "adapts; leave it out by adapt=, give it a zero block by others='zero', or use "
            "curvature='gauss-newton'"
        )
    return layers


def _make_block(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    params: Params,
    *,
    inputs: Tensor,
    gradients: Tensor,
    corrected: bool,
) -> _Block:
    """A block from the layer's inputs `[tasks, m, …]`, output gradients `[count, tasks, m, …]`."""
    prefix = f"{name}." if name else ""
    bias = f"{prefix}bias" if f"{prefix}bias" in params else None
    examples = inputs.shape[1]
    a, g = layer_patches(layer, inputs, gradients, bias=bias is not None)
    input_moment, gradient_moment = second_moments(a, g, examples)
    input_values, right = torch.linalg.eigh(input_moment)
    gradient_values, left = torch.linalg.eigh(gradient_moment)
    if corrected:
        values = _moments_in_basis(a @ right.unsqueeze(1), g, left) / examples
    else:
        # The eigenvalues of G ⊗ A are the products of those of G and A.
        values = gradient_values.clamp(min=0).unsqueeze(-1) * input_values.clamp(min=0).unsqueeze(
            -2
        )
    return _Block(f"{prefix}weight", bias, left=left, right=right, values=values)


def _moments_in_basis(
    rotated_a: Tensor,
    g: Tensor,
    left: Tensor,
) -> Tensor:
    """Σ (U_Gᵀ (Σ_r g āᵀ) U_A)² over the draws and examples, `[tasks, out, in (+ 1)]`."""
    moments = []
    for draw in g:
        gradient = torch.einsum("tmro,tmri->tmoi", draw @ left.unsqueeze(1), rotated_a)
        moments.append(gradient.square().sum(1))
    return torch.stack(moments).sum(0)
