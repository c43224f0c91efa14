"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    recompute_residual,
    warm_start,
)


@dataclass(frozen=True)
class Neumann(Solver):
    """K terms of the Neumann series, x = s Σ_{k=0}^{K−1} (I − sA)ᵏ b (Lorraine, Vicol & Duvenaud 2020, alg. 3).

    It converges if 0 < s < 2/λ_max(A) and A is positive definite; K terms leave the residual (I − sA)ᴷ b. A task whose
    residual grows ends there, with what it has.

    Args:
        terms: K ≥ 1, exactly; one product each, the last one for the residual.
        scale: s > 0. None: 1/λ̂, λ̂ = ‖Av‖ of `power_steps` power iterations for each task from b plus a fixed vector;
            their products are counted.
        power_steps: used with `scale=None`, ≥ 1.
    """

    terms: int = option(5, flag="solver_steps")
    scale: float | None = None
    power_steps: int = 5

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"Neumann terms: got {self.terms}, expected at least 1")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Neumann scale: got {self.scale}, expected a number > 0")
        if self.power_steps < 1:
            raise ValueError(f"Neumann power_steps: got {self.power_steps}, expected at least 1")

    def with_budget(self, products: int) -> Neumann:
        for_scale = self.power_steps if self.scale is None else 0
        return replace(self, terms=max(1, products - for_scale))

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        x, r, products = warm_start(operator, b, state)
        scale, spent = self._scale(operator, b)
        products += spent
        rayleigh = b.new_full((len(b),), torch.inf)
        residual = r.norm(dim=-1, keepdim=True)
        eps = torch.finfo(b.dtype).eps
        active, grew = residual > eps, torch.zeros_like(residual, dtype=torch.bool)
        for _ in range(
            self.terms
        ):  # from zero, r = (I − sA)ᵏ b: the term k, and the residual after k terms
            ar = operator.matvec(r)
            products += 1
            seen = torch.where(active.squeeze(-1), rayleigh_quotient(r, ar), torch.inf)
            rayleigh = torch.minimum(rayleigh, seen)
            ahead = r - scale * ar
            norm = ahead.norm(dim=-1, keepdim=True)
            grew = grew | (active & ~(norm <= residual * (1 + eps**0.5)))
            active = active & ~grew
            x = torch.where(active, x + scale * r, x)
            r, residual = torch.where(active, ahead, r), torch.where(active, norm, residual)
            active = active & (residual > eps)
        residual, products = recompute_residual(
            operator, b, x, residual, residual <= eps**0.5, products
        )
        residual, grew = residual.squeeze(-1), grew.squeeze(-1)
        status = torch.where(residual <= eps**0.5, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(grew, int(Status.BREAKDOWN), status)
        status = torch.where(rayleigh <= 0, int(Status.NEGATIVE_CURVATURE), status)
        residual = torch.where(rayleigh.isnan(), torch.nan, residual)
        return Solution(
            x,
            status,
            residual,
            products,
            torch.full_like(status, products),
            rayleigh,
            SolverState(solution=x),
        )

    def _scale(self, operator: LinearOperator, b: Tensor) -> tuple[float | Tensor, int]:
        if self.scale is not None:
            return self.scale, 0
        norm, _ = power_iteration(operator, b, self.power_steps)
        return 1 / torch.where(norm > 0, norm, 1.0), self.power_steps


def power_iteration(
    operator: LinearOperator, v: Tensor, steps: int, fresh: float = 1.0
) -> tuple[Tensor, Tensor]:
    """λ̂ = ‖Av‖ ≤ λ_max, `[tasks, 1]`, and v after `steps` products; v is of norm one, or zero.

    v alone may be blind to the largest eigenvalue: `fresh` times a fixed random vector is added, with v's own sign.
    """
    start = torch.randn(v.shape[1], generator=torch.Generator().manual_seed(0)).to(v)
    v = v + torch.where(v @ start < 0, -fresh, fresh).unsqueeze(-1) * start / start.norm()
    v, norm = v / v.norm(dim=-1, keepdim=True), torch.ones_like(v[:, :1])
    for _ in range(steps):
        v = operator.matvec(v).nan_to_num(
            0.0, 0.0, 0.0
        )  # or no later call, going on from here, would recover
        norm = v.norm(dim=-1, keepdim=True)
        v = v / torch.where(norm > 0, norm, 1.0)
    return norm, v
