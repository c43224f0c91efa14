"""The solve that an operator does itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.operators import Invertible, LinearOperator
from metaimplicit.solvers.base import Apply, Solution, Solver, SolverState, Status, direct_solution


@dataclass(frozen=True)
class Factored(Solver):
    """(B + sI)⁻¹ b with s = σ + ρ, for a core B that knows its inverse: K-FAC, EKFAC, a diagonal.

    Args:
        rho: ρ ≥ 0, the damping this solver owns. None: 0 if σ > 0, else 0.01.

    Raises:
        ValueError: on solving, if the core is of another kind, or σ + ρ ≤ 0.
    """

    rho: float | None = None

    def __post_init__(self) -> None:
        if self.rho is not None and not self.rho >= 0:
            raise ValueError(f"Factored rho: got {self.rho}, expected a number ≥ 0, or None")

    def damping(self, sigma: float) -> float:
        return self.rho if self.rho is not None else (0.0 if sigma > 0 else 0.01)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        core, sigma = operator.split()
        if not isinstance(core, Invertible):
            raise ValueError(
                f"Factored: got {type(core).__name__}, expected K-FAC, EKFAC or a diagonal, which know their inverse; "
                "use CG"
            )
        shift = float(sigma) + self.damping(float(sigma))
        if not shift > 0:
            raise ValueError(
                f"Factored: got σ + ρ = {shift}, expected > 0; give rho > 0 or a proximal strength"
            )
        solution = direct_solution(operator, b, core.inverse(b, shift), products=0)
        exact = solution.residual <= torch.finfo(b.dtype).eps ** 0.5
        return replace(solution, status=torch.where(exact, solution.status, int(Status.MAX_STEPS)))
