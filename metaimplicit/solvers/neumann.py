"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.options import option
from metaimplicit.solvers.arithmetic import (
    divisor,
    norm,
    rayleigh_quotient,
)
from metaimplicit.solvers.base import LinearSystem, Solution, Solver
from metaimplicit.solvers.iteration import (
    Progress,
    final_status,
    warm_start,
)
from metaimplicit.solvers.power_iteration import largest_eigenvalue
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class Neumann(Solver):
    """K terms of the Neumann series: x = s Σ_{k=0}^{K−1} (I − sA)ᵏ b.

    It is Alg. 3 of Lorraine, Vicol & Duvenaud (2020). It converges if 0 < s < 2/λ_max(A) and A is
    positive definite. K terms leave the residual (I − sA)ᴷ b. A task whose residual grows ends
    before that, with the status BREAKDOWN.

    Args:
        terms: K ≥ 1, exactly, with one product each: the last one gives the residual. A state costs
            one product more, and so does the check of a small residual.
        scale: s > 0. If None, it is 1/λ̂ with λ̂ = ‖Av‖ of `power_steps` power iterations for each
            task, whose products are counted.
        power_steps: The number of power iterations with `scale=None`, ≥ 1.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> Neumann(terms=2, scale=0.5).solve(Identity(b), b).value  # 0.5 (1 + 0.5) b
        tensor([[0.7500, 0.0000]])
    """

    terms: int = option(5, flag="solver_steps")
    scale: float | None = None
    power_steps: int = 5

    takes_asymmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("Neumann terms", self.terms)
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Neumann scale: got {self.scale}, expected a number > 0")
        check_count("Neumann power_steps", self.power_steps)

    def with_budget(self, products: int) -> Neumann:
        """The same solver with the terms that are left beside the products for its scale."""
        for_scale = self.power_steps if self.scale is None else 0
        return replace(self, terms=max(1, products - for_scale))

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        x, r, products = warm_start(system)
        scale, scale_products = self._scale(system)
        eps = torch.finfo(x.dtype).eps
        residual = norm(r)
        progress = Progress.start(residual, eps, products + scale_products)
        grew = torch.zeros_like(progress.active)

        for _ in range(self.terms):
            # From zero, r = (I − sA)ᵏ b is both the term k and the residual after k terms.
            ar = progress.multiply(system, r)
            progress.record_quotient(rayleigh_quotient(r, ar))
            r_next = r - scale * ar
            residual_next = norm(r_next)
            shrinks = residual_next <= residual * (1 + eps**0.5)  # not where it is NaN
            grew = grew | (progress.active & ~shrinks)
            progress.stop(grew)
            x = torch.where(progress.active, x + scale * r, x)
            r = torch.where(progress.active, r_next, r)
            residual = torch.where(progress.active, residual_next, residual)
            progress.stop(~(residual > eps))

        tol = eps**0.5
        residual = progress.recompute_residual(
            system,
            x,
            residual,
            doubtful=residual <= tol,
        )
        exceptions = {
            Status.BREAKDOWN: grew,
            Status.NEGATIVE_CURVATURE: progress.rayleigh <= 0,
        }
        solution = progress.solution(x, residual, final_status(residual, tol, exceptions))
        return replace(solution, needed=torch.full_like(solution.status, solution.products))

    def _scale(self, system: LinearSystem) -> tuple[float | Tensor, int]:
        """The scale s, and the products that it took."""
        if self.scale is not None:
            return self.scale, 0
        size, _ = largest_eigenvalue(system.operator, system.b, self.power_steps)
        return 1 / divisor(size), self.power_steps
