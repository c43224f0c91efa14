"""The inner problem of a linear head over the task axis, in matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.convex_losses import ConvexLoss
from metaimplicit.inner.head_curvature import HeadCurvature
from metaimplicit.inner.linear_head import LinearHead, as_numbers
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params
from metaimplicit.problem import resolve


@dataclass(frozen=True)
class HeadObjective:
    """f(V) = Σᵢ ℓ(zᵢ, yᵢ) + λ/2 ‖V‖² with z = R V, of every task, in float64.

    Args:
        loss: ℓ.
        rows: R = (X, 1)/τ, `[tasks, m, k]`.
        targets: y, `[tasks, m, outputs]`.
        strength: λ > 0, a scalar.

    Example:
        >>> from metaimplicit.inner import SquaredError
        >>> ones = torch.ones(1, 1, 1)
        >>> objective = HeadObjective(SquaredError(), 2 * ones, ones, strength=torch.tensor(1.0))
        >>> objective.gradient(ones)  # 2 (2 − 1) + 1
        tensor([[[3.]]])
    """

    loss: ConvexLoss
    rows: Tensor
    targets: Tensor
    strength: Tensor

    @classmethod
    def of(
        cls, problem: LiftedProblem, head: LinearHead, params: Params, meta: Params
    ) -> HeadObjective:
        """The objective of a lifted problem with this inner loss, with its graph to φ.

        Args:
            problem: The lifted problem.
            head: Its inner loss.
            params: W and b, `{name: [tasks, *shape]}`, whose shapes count alone.
            meta: φ.

        Raises:
            ValueError: The parameters, features, targets, λ or τ do not fit a linear head.
        """
        names = [head.weight] if head.bias is None else [head.weight, head.bias]
        if set(params) != set(names):
            raise ValueError(f"LinearHead: got the parameters {sorted(params)}, expected {names}")
        meta, data = problem.arguments(meta, problem.at(0))
        features, targets = problem.apply(
            lambda _, d: (head.features(meta, d), head.targets(meta, d)), {}, data
        )
        for name, numbers in {"features": features, "targets": targets}.items():
            if numbers.is_complex() or (name == "features" and not numbers.is_floating_point()):
                raise ValueError(
                    f"LinearHead {name}: got {numbers.dtype}, expected real floating-point numbers"
                )
        tasks, outputs, p = params[head.weight].shape
        if features.dim() != 3 or features.shape[-1] != p:
            raise ValueError(
                f"LinearHead features: got shape {tuple(features.shape[1:])}, expected [m, {p}] "
                f"for {head.weight!r} of shape {(outputs, p)}"
            )
        _check_classes(targets, outputs)

        rows = features.double()
        if head.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
        strength = _positive("strength", resolve(head.strength, meta), like=rows)
        temperature = _positive("temperature", resolve(head.temperature, meta), like=rows)
        y = as_numbers(targets, rows.new_empty(tasks, rows.shape[1], outputs))
        return cls(head.convex_loss, rows / temperature, y, strength)

    def detach(self) -> HeadObjective:
        """The same values without a graph."""
        return HeadObjective(
            self.loss,
            self.rows.detach(),
            self.targets.detach(),
            self.strength.detach(),
        )

    def gradient(self, v: Tensor) -> Tensor:
        """∂f/∂V = Rᵀ ∂ℓ/∂z + λV, `[tasks, k, outputs]`."""
        slope = self.loss.slope(self.rows @ v, self.targets)
        return self.rows.mT @ slope + self.strength * v

    def curvature(self, v: Tensor) -> HeadCurvature:
        """∂²f/∂V² − λI."""
        return HeadCurvature(self.rows, self.loss.root(self.rows @ v, self.targets))

    def values_along(self, v: Tensor, direction: Tensor, sizes: Tensor) -> Tensor:
        """f(V + s D) for every step size s, `[sizes, tasks]`."""
        s = sizes[:, None, None, None]
        outputs = self.rows @ v + s * (self.rows @ direction)
        penalties = (v + s * direction).square().sum((-1, -2))
        return self.loss.value(outputs, self.targets).sum(-1) + 0.5 * self.strength * penalties


def _positive(name: str, number: Any, *, like: Tensor) -> Tensor:
    """A number of the head as a scalar, if it is positive."""
    value = torch.as_tensor(number, dtype=like.dtype, device=like.device)
    if value.numel() != 1 or not float(value.detach()) > 0:
        raise ValueError(
            f"LinearHead {name}: got {value.tolist()}, expected one number > 0; "
            "learn its logarithm, for example"
        )
    return value.reshape(())


def _check_classes(targets: Tensor, outputs: int) -> None:
    """Raise ValueError for class indices that have no output."""
    if targets.is_floating_point() or targets.dim() != 2 or targets.numel() == 0:
        return  # numbers, or no examples
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= outputs:
        raise ValueError(
            f"LinearHead targets: got class {low if low < 0 else high}, expected class indices "
            f"from 0 to {outputs - 1}, one for each output"
        )
