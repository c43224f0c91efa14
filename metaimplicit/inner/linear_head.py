"""The inner loss of a linear head: convex, and with all of its parts visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.convex_losses import ConvexLoss
from metaimplicit.params import Params
from metaimplicit.problem import Composite, Number, Proximal, resolve

OfData = Callable[[Params, Any], Tensor]  # (meta, data) of one problem -> tensor


class LinearHead(Composite):
    """f(W, b) = Σᵢ ℓ(zᵢ, yᵢ) + λ/2 (‖W‖² + ‖b‖²) with outputs z = (X Wᵀ + b)/τ.

    The sum runs over the m support examples. The bias is penalised like the weight: it is the
    weight of a column of ones (Bertinetto et al. 2019). So f is λ-strongly convex, whatever X is,
    and has one minimum, which `Ridge` and `Newton` reach.

    Args:
        features: `(meta, data) -> X`, `[m, p]`, of one problem.
        targets: `(meta, data) -> y`, class indices `[m]`, or numbers `[m, outputs]`.
        loss: ℓ.
        strength: λ > 0, a float, a tensor or `FromMeta`.
        temperature: τ > 0, likewise.
        weight: The name of W, `[outputs, p]`, in the parameters.
        bias: The name of b, `[outputs]`. If None, there is no bias.

    Example:
        >>> from metaimplicit.inner import SquaredError
        >>> head = LinearHead(
        ...     features=lambda meta, data: data[0],
        ...     targets=lambda meta, data: data[1],
        ...     loss=SquaredError(),
        ...     strength=2.0,
        ...     bias=None,
        ... )
        >>> support = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])
        >>> head({"weight": torch.ones(1, 1)}, {}, support)  # ½ (0² + 2²) + 2/2 · 1²
        tensor(3.)
    """

    def __init__(
        self,
        features: OfData,
        targets: OfData,
        *,
        loss: ConvexLoss,
        strength: Number,
        temperature: Number = 1.0,
        weight: str = "weight",
        bias: str | None = "bias",
    ) -> None:
        if not isinstance(loss, ConvexLoss):
            raise ValueError(
                f"LinearHead loss: got {loss!r}, expected a ConvexLoss such as SquaredError()"
            )
        for name, number in {"strength": strength, "temperature": temperature}.items():
            if isinstance(number, (int, float)) and not number > 0:
                raise ValueError(f"LinearHead {name}: got {number}, expected a number > 0")

        def outputs(params: Params, meta: Params, data: Any) -> Tensor:
            return self.predict(params, meta, features(meta, data))

        def no_loss_without_meta(*_: Any) -> Tensor:
            raise NotImplementedError("the loss of a LinearHead is its output_loss")

        super().__init__(outputs, no_loss_without_meta, penalty=Proximal(strength, center="zero"))
        self.features = features
        self.targets = targets
        self.convex_loss = loss
        self.strength = strength
        self.temperature = temperature
        self.weight = weight
        self.bias = bias

    def predict(self, params: Params, meta: Params, features: Tensor) -> Tensor:
        """The outputs (X Wᵀ + b)/τ for any features X, `[m, p] -> [m, outputs]`."""
        outputs = features @ params[self.weight].mT
        if self.bias is not None:
            outputs = outputs + params[self.bias]
        result: Tensor = outputs / resolve(self.temperature, meta)
        return result

    def output_loss(self, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        """Σᵢ ℓ(zᵢ, yᵢ) as a function of the outputs."""
        y = as_numbers(self.targets(meta, data), outputs)
        return self.convex_loss.value(outputs, y).sum(-1)


def as_numbers(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets of the shape and type of the outputs: class indices become one-hot vectors.

    Args:
        targets: `[..., m]`, integers, or `[..., m, outputs]`.
        outputs: `[..., m, outputs]`.

    Raises:
        ValueError: The targets have another shape.

    Example:
        >>> as_numbers(torch.tensor([1, 0]), torch.zeros(2, 3))
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """
    if not targets.is_floating_point() and targets.shape == outputs.shape[:-1]:
        classes = torch.arange(outputs.shape[-1], device=targets.device)
        return (targets.unsqueeze(-1) == classes).to(outputs.dtype)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)}, expected {tuple(outputs.shape)}, or class "
            f"indices of shape {tuple(outputs.shape[:-1])}"
        )
    return targets.to(outputs.dtype)
