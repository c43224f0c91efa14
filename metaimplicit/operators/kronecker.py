"""Kronecker-factored curvature of linear and convolutional layers: K-FAC and EKFAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaimplicit.counts import check_count
from metaimplicit.operators.base import Invertible, LinearOperator
from metaimplicit.operators.curvature import Curvature, LossParts, check_point, mended
from metaimplicit.operators.hessian import Hessian
from metaimplicit.operators.kronecker_block import make_block
from metaimplicit.operators.layers import Layers, is_supported, parameters_of
from metaimplicit.operators.likelihood import Expectation, Likelihood, check_fisher_options
from metaimplicit.operators.loss_scores import loss_scores
from metaimplicit.operators.output_loss import Checked, OutputLoss
from metaimplicit.operators.probes import Lift, record_with_probes
from metaimplicit.params import Params, flatten, joint_dtype, unflatten
from metaimplicit.tensors import recordable

ADVICE = "use curvature='gauss-newton', or choose other parameters by adapt="


class KroneckerFactored(Curvature, Invertible):
    """K-FAC: F ≈ ⊕_layers G ⊗ A, with A = E[ā āᵀ] and G = Σᵢ wᵢ E[gᵢ gᵢᵀ] of each layer.

    Here ā is a layer's input, with a 1 at its end if the bias adapts, and g the gradient of
    −log p(y|z) in its output (Martens & Grosse 2015). The examples have the weights wᵢ of the loss,
    which are 1/m in a mean over m examples. With R positions in each, A = Σ wᵢ ā āᵀ/(R Σ wᵢ). A
    linear layer has R = 1. For a convolution the positions are the output pixels, and ā is the
    patch under one (Grosse & Martens 2016).

    If the model couples its examples, as batch-norm does, no example has a gradient of its own.
    Then g is the gradient of the whole set through the outputs of this example.

    Args:
        module: The model, whose linear and convolutional layers are recorded by hooks. The hooks
            are removed again.
        lift: Runs a function of one task over the task axis: `(function, params)`, where
            `function(call, params)` receives the model as `call(params) -> outputs`.
        loss: `[tasks, m, d] -> [tasks]`, as in `Fisher`, the matrix that is approximated.
        params: The point θ, `{name: [tasks, *shape]}`, by the module's names.
        likelihood: As in `Fisher`.
        expectation: As in `Fisher`.
        samples: As in `Fisher`.
        generator: As in `Fisher`.
        corrected: Use EKFAC: keep the eigenvectors of G ⊗ A, and take the second moments of the
            gradients along them as the eigenvalues, which is the best diagonal in that basis
            (George et al. 2018).
        others: What to do with adapted parameters of any other layer: `"raise"`, or `"zero"`, which
            gives them a zero block.
        strict: Whether a loss of no such likelihood is refused. If False, the diagonal of ∂²ℓ/∂z²
            takes the place of F, which is good enough for a preconditioner.
        checked: As in `Fisher`.

    Attributes:
        blocks: The eigenvectors and eigenvalues of G ⊗ A, one block for each layer.
        gradient: ∂ℓ/∂θ with its graph. Only `from_loss` sets it.

    Raises:
        ValueError: The loss is −log p of no such likelihood, or an option is unknown. A parameter
            of another kind of layer adapts, or of two layers, or one that is read outside of its
            layer, too. A layer is called twice, or not at all, is grouped, or is padded with
            anything but zeros. The outputs do not have the shape [tasks, m, d].

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
        ... )
        >>> torch.allclose(kfac.matvec(torch.ones(1, 2)), torch.tensor([[0.5, 2.0]]))  # G = 1
        True
    """

    semidefinite = True

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(
        self,
        module: nn.Module,
        lift: Lift,
        loss: OutputLoss,
        params: Params,
        *,
        likelihood: Likelihood | None = None,
        expectation: Expectation = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
        corrected: bool = False,
        others: Literal["raise", "zero"] = "raise",
        strict: bool = True,
        checked: Checked | None = None,
    ) -> None:
        if others not in ("raise", "zero"):
            raise ValueError(f"KFAC others: got {others!r}, expected 'raise' or 'zero'")
        check_fisher_options("KFAC", likelihood=likelihood, expectation=expectation)
        check_count("KFAC samples", samples)
        check_point(params)
        first = next(iter(params.values()))
        self.params = {name: recordable(p).detach() for name, p in params.items()}
        self.shape = (len(first), sum(p[0].numel() for p in params.values()))
        self.dtype = joint_dtype(params.values())
        self.device = first.device

        layers = _adapted_layers(module, self.params, others)
        checked = {} if checked is None else checked
        recording = record_with_probes(
            layers, mended(lift), self.params, advice=ADVICE, checked=checked
        )
        if recording.outputs.dim() != 3:
            raise ValueError(
                f"KFAC: got outputs of shape {tuple(recording.outputs.shape)}, expected "
                "[tasks, m, d], a row for each example; use curvature='gauss-newton'"
            )
        scores, weights, probes = loss_scores(
            loss,
            recording.outputs.detach(),
            owner="KFAC",
            likelihood=likelihood,
            expectation=expectation,
            checked=checked,
            strict=strict,
            samples=samples,
            generator=generator,
        )
        both = scores if probes is None else torch.cat([scores, probes])
        gradients = recording.output_gradients(both)
        inputs = recording.inputs
        del recording  # with the graph
        self.blocks = [
            make_block(
                name,
                layer,
                self.params,
                inputs=inputs[name],
                gradients=gradients[name][: len(scores)],
                probes=None if probes is None else gradients[name][len(scores) :],
                weights=weights,
                corrected=corrected,
            )
            for name, layer in layers.items()
        ]

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> KroneckerFactored:
        """The factors of a loss; `options` are the keyword arguments of the constructor.

        Raises:
            ValueError: The loss hides its layers.
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
        return cls._factor(parts, **{"strict": False} | options)

    @classmethod
    def _factor(cls, parts: LossParts, **options: Any) -> KroneckerFactored:
        if parts.module is None or parts.apply_model is None:
            raise ValueError(
                "KFAC: got an inner loss that hides its layers, expected Composite(…, module=model)"
            )
        return cls(
            parts.module,
            parts.apply_model,
            loss=parts.loss,
            params=parts.params,
            checked=parts.checked,
            **options,
        )

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


def _adapted_layers(
    module: nn.Module,
    params: Params,
    others: str,
) -> Layers:
    """The linear and convolutional layers whose weights adapt, by name."""
    layers: Layers = {}
    names: dict[int, str] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(p), name)
        if first != name and first in params:
            raise ValueError(
                f"KFAC: {first!r} and {name!r} are one parameter of two layers; {ADVICE}"
            )
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
    unknown = sorted(set(params) - parameters_of(layers))
    if unknown and others == "raise":
        raise ValueError(
            f"KFAC: {unknown[0]!r} belongs to no linear or 2-d convolutional layer whose weight "
            "adapts; leave it out by adapt=, give it a zero block by others='zero', or use "
            "curvature='gauss-newton'"
        )
    if not layers:
        raise ValueError(f"KFAC: no linear or 2-d convolutional layer adapts; {ADVICE}")
    return layers
