"""Gradient descent on the linear system, a few steps from where the last solve ended."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.options import option
from metaimplicit.solvers.base import (
    Apply,
    Solution,
    Solver,
    SolverState,
    Status,
    rayleigh_quotient,
)
from metaimplicit.solvers.neumann import power_iteration


@dataclass(frozen=True)
class Richardson(Solver):
    """x ← x + s(b − Ax), K steps of gradient descent on ½xᵀAx − bᵀx, from the last solution.

    The linear half of stochastic bilevel optimisation: where A and b come from another minibatch at every call, x runs
    along; one step a call is SOBA (Dagréou et al. 2022, eq. 5), a few are AmIGO (Arbel & Mairal 2022). From zero, K
    steps are K terms of Neumann's series, and one, x = sb, takes A for the identity over s: T1–T2 (Luketina 2016).
    It converges if 0 < s < 2/λ_max(A) and A is positive definite; nothing is held back where it does not.

    Args:
        steps: K ≥ 1, a product each, but the first from zero; one product more measures the residual.
        scale: s > 0. None: 1/λ̂, λ̂ by a power iteration that goes on from call to call, a product each.
        warm: start from `state`; False, from zero.
    """

    steps: int = option(1, flag="solver_steps")
    scale: float | None = None
    warm: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Richardson steps: got {self.steps}, expected at least 1")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Richardson scale: got {self.scale}, expected a number > 0")

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        scale, products, kept = self._scale(operator, b, state)
        x = state.solution.to(b) if self.warm and state.solution is not None else None
        rayleigh = b.new_full((len(b),), torch.inf)
        for _ in range(self.steps):
            if x is None:
                x = scale * b
                continue
            ax = operator.matvec(x)
            products += 1
            rayleigh = torch.minimum(rayleigh, rayleigh_quotient(x, ax))
            x = x + scale * (b - ax)
        assert x is not None
        ax = operator.matvec(x)
        residual, rayleigh = (
            (b - ax).norm(dim=-1),
            torch.minimum(rayleigh, rayleigh_quotient(x, ax)),
        )
        solved = residual <= torch.finfo(b.dtype).eps ** 0.5
        status = torch.where(solved, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(residual > 1, int(Status.BREAKDOWN), status)
        status = torch.where(rayleigh <= 0, int(Status.NEGATIVE_CURVATURE), status)
        needed = torch.full_like(status, products + 1)
        return Solution(
            x,
            status,
            residual,
            products + 1,
            needed,
            rayleigh,
            SolverState(solution=x, direction=kept),
        )

    def _scale(
        self, operator: LinearOperator, b: Tensor, state: SolverState
    ) -> tuple[float | Tensor, int, Tensor | None]:
        if self.scale is not None:
            return self.scale, 0, None
        v, steps, fresh = (
            (b, 5, 1.0) if state.direction is None else (state.direction.to(b), 1, 0.1)
        )
        norm, direction = power_iteration(operator, v, steps, fresh)
        return 1 / torch.where(norm > 0, norm, 1.0), steps, direction
