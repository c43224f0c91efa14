"""Regularisers and constraints of one parameter, known by their proximal operators.

prox(x) = argmin_z R(z) + ‖z − x‖²/(2η) for a step size η. Parameters are `[tasks, *shape]`. Every
operator is differentiable almost everywhere in x, η and its own numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaimplicit.problem import FromMeta, Number


@dataclass(frozen=True)
class Regularizer(ABC):
    """A function R of a parameter, known by its proximal operator. Its fields are its numbers.

    Attributes:
        separable: Whether R is a sum over elements, so that the step size and the numbers may be
            tensors with one entry for each. If False, they may differ from row to row, `[..., 1]`.

    Example:
        R(z) = λ/2 z² shrinks by 1/(1 + ηλ).

        >>> @dataclass(frozen=True)
        ... class Ridge(Regularizer):
        ...     strength: Number
        ...     def prox(self, x, step, numbers):
        ...         return x / (1 + step * numbers["strength"])
        >>> Ridge(1.0).prox(torch.tensor([[3.0]]), 0.5, {"strength": 1.0})
        tensor([[2.]])
    """

    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check({key: x for key, x in self.numbers().items() if not isinstance(x, FromMeta)})

    def check(self, numbers: dict[str, Any]) -> None:
        """Raise ValueError if a number is out of range. By default, none is.

        Args:
            numbers: Values of `numbers()`. Those that are read from φ are missing until φ is known.
        """
        return

    def numbers(self) -> dict[str, Any]:
        """The fields, which may be learnt, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @abstractmethod
    def prox(self, x: Tensor, step: Any, numbers: dict[str, Any]) -> Tensor:
        """The proximal operator.

        Args:
            x: A parameter after the gradient step, `[tasks, *shape]`.
            step: η > 0.
            numbers: The values of `numbers()`, a number or a tensor each.
        """


@dataclass(frozen=True)
class L1Norm(Regularizer):
    """R(z) = λ Σᵢ |zᵢ| (the lasso). Its operator is soft thresholding at ηλ.

    Args:
        strength: λ ≥ 0.

    Raises:
        ValueError: λ is negative.

    Example:
        >>> L1Norm(1.0).prox(torch.tensor([[3.0, -0.2]]), 0.5, {"strength": 1.0})
        tensor([[2.5000, 0.0000]])
    """

    strength: Number = 1.0

    def check(self, numbers: dict[str, Any]) -> None:
        """Raise ValueError if λ is negative."""
        _check_strength("L1Norm", numbers)

    def prox(self, x: Tensor, step: Any, numbers: dict[str, Any]) -> Tensor:
        """Soft thresholding."""
        threshold = step * numbers["strength"]
        # NaN stays NaN, since it is not below the threshold.
        return torch.where(x.abs() <= threshold, 0.0, x - threshold * x.sign())


@dataclass(frozen=True)
class GroupLasso(Regularizer):
    """R(z) = λ Σ_G ‖z_G‖ (Yuan & Lin 2006), with one group along the last axis of z.

    Args:
        strength: λ ≥ 0, one number or one for each group, `[..., 1]`.

    Raises:
        ValueError: λ is negative.

    Example:
        >>> GroupLasso(1.0).prox(torch.tensor([[[3.0, 4.0], [0.3, 0.4]]]), 1.0, {"strength": 1.0})
        tensor([[[2.4000, 3.2000],
                 [0.0000, 0.0000]]])
    """

    strength: Number = 1.0
    separable = False

    def check(self, numbers: dict[str, Any]) -> None:
        """Raise ValueError if λ is negative."""
        _check_strength("GroupLasso", numbers)

    def prox(self, x: Tensor, step: Any, numbers: dict[str, Any]) -> Tensor:
        """Every group shrinks towards zero by ηλ, and no further."""
        threshold = step * numbers["strength"]
        square = x.square().sum(-1, keepdim=True)
        vanishes = square.detach().sqrt() <= threshold  # which NaN does not
        # A group of zeros has no derivative of its norm, and needs none.
        size = torch.where(vanishes, 1.0, square).sqrt()
        return torch.where(vanishes, 0.0, x * (1 - threshold / size))


@dataclass(frozen=True)
class BoxConstraint(Regularizer):
    """lower ≤ zᵢ ≤ upper. Its operator is the projection, whatever the step size.

    Args:
        lower: The lower bound.
        upper: The upper bound.

    Raises:
        ValueError: The lower bound is above the upper one.

    Example:
        >>> numbers = {"lower": 0.0, "upper": 1.0}
        >>> BoxConstraint(0.0, 1.0).prox(torch.tensor([[3.0, 0.2, -1.0]]), 0.1, numbers)
        tensor([[1.0000, 0.2000, 0.0000]])
    """

    lower: Number = -torch.inf
    upper: Number = torch.inf

    def check(self, numbers: dict[str, Any]) -> None:
        """Raise ValueError if no number lies between the bounds."""
        lower, upper = (numbers.get(key) for key in ("lower", "upper"))
        if lower is not None and upper is not None and not _holds(lower <= upper):
            raise ValueError(f"BoxConstraint: got {lower} ≤ zᵢ ≤ {upper}, expected lower ≤ upper")

    def prox(self, x: Tensor, step: Any, numbers: dict[str, Any]) -> Tensor:
        """Clamping."""
        lower = torch.as_tensor(numbers["lower"], dtype=x.dtype, device=x.device)
        upper = torch.as_tensor(numbers["upper"], dtype=x.dtype, device=x.device)
        return torch.where(x < lower, lower, torch.where(x > upper, upper, x))


@dataclass(frozen=True)
class SimplexConstraint(Regularizer):
    """zᵢ ≥ 0 and Σᵢ zᵢ = total along the last axis. Its operator is the projection.

    Args:
        total: The sum, > 0, one number or one for each row, `[..., 1]`.

    Raises:
        ValueError: The total is not positive.

    Example:
        >>> SimplexConstraint().prox(torch.tensor([[0.8, 0.6, -1.0]]), 0.1, {"total": 1.0})
        tensor([[0.6000, 0.4000, 0.0000]])
    """

    total: Number = 1.0
    separable = False

    def check(self, numbers: dict[str, Any]) -> None:
        """Raise ValueError if the total is not positive."""
        total = numbers.get("total", 1.0)
        if not _holds(total > 0):
            raise ValueError(f"SimplexConstraint total: got {total}, expected a number > 0")

    def prox(self, x: Tensor, step: Any, numbers: dict[str, Any]) -> Tensor:
        """The point max(x − τ, 0), τ from the k largest entries (Duchi et al. 2008, fig. 1)."""
        # The projections of x and of x − max x are the same, and only the second one's sums keep
        # the total where x is large.
        x = x - x.detach().amax(-1, keepdim=True)
        ordered, _ = x.sort(dim=-1, descending=True)
        count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        tau = (ordered.cumsum(-1) - numbers["total"]) / count
        k = (ordered > tau).sum(-1, keepdim=True).clamp(min=1)  # no NaN is larger than τ
        projection: Tensor = (x - tau.gather(-1, k - 1)).clamp(min=0)
        return projection


def _check_strength(name: str, numbers: dict[str, Any]) -> None:
    strength = numbers.get("strength", 0.0)
    if not _holds(strength >= 0):
        raise ValueError(
            f"{name} strength: got {strength}, expected a number ≥ 0; to learn one, use "
            "FromMeta(name, torch.exp)"
        )


def _holds(condition: bool | Tensor) -> bool:
    """Whether a condition holds for all numbers of a tensor."""
    return bool(condition.all()) if isinstance(condition, Tensor) else condition
