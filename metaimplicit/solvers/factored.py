"""The solve that an operator does itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from metaimplicit.operators import Invertible
from metaimplicit.solvers.base import LinearSystem, Solution
from metaimplicit.solvers.core import CoreSolver
from metaimplicit.solvers.direct import direct_solution
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class Factored(CoreSolver):
    """(B + sI)⁻¹b with s = σ + ρ, for a core B that knows its inverse.

    Such are K-FAC, EKFAC, a diagonal, and the Hessian that the inner loops `Ridge` and `Newton`
    leave. It is A⁻¹b if ρ = 0.

    Args:
        rho: ρ ≥ 0, the damping that this solver adds. If None, it is 0 where σ > 0, else 0.01.

    Raises:
        ValueError: ρ is negative. On a solve: the core knows no inverse, or σ + ρ ≤ 0.

    Example:
        >>> from metaimplicit.operators import Diagonal, Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> diagonal = Diagonal(Identity(b, scale=3.0), samples=None)
        >>> Factored().solve(diagonal + Identity(b, scale=1.0), b).value
        tensor([[0.2500, 0.5000]])
    """

    rho: float | None = None
    widens: ClassVar[bool] = False  # the operator knows its inverse

    def __post_init__(self) -> None:
        self.check_rho()

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        core, shift = self.split(system.operator)
        if not isinstance(core, Invertible):
            raise ValueError(
                f"Factored: got {type(core).__name__}, expected a curvature that knows its "
                "inverse: K-FAC, EKFAC, a diagonal, or that of Ridge and Newton; use CG"
            )
        solution = direct_solution(system, core.inverse(system.b, shift), products=0)
        exact = solution.residual <= torch.finfo(system.b.dtype).eps ** 0.5
        solution = replace(
            solution, status=torch.where(exact, solution.status, int(Status.MAX_STEPS))
        )
        if core.closed_form:  # the residual took no product with derivatives of a loss
            return replace(
                solution,
                products=0,
                needed=torch.zeros_like(solution.needed),
            )
        return solution
