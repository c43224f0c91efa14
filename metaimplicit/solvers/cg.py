"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from metaimplicit.options import option
from metaimplicit.solvers.base import LinearSystem, Solution, Solver
from metaimplicit.solvers.conjugate_gradients import conjugate_gradients
from metaimplicit.solvers.iteration import check_limits
from metaimplicit.solvers.minres import MINRES
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients (Hestenes & Stiefel 1952), for positive definite systems.

    K steps from zero give the minimiser of ½xᵀAx − bᵀx over the Krylov space
    span{b, Ab, …, A^{K−1}b}. With a preconditioner P, the space is that of PA from Pb. A task ends
    when its residual meets `tol`, or at a direction with pᵀAp ≤ 0.

    Args:
        max_steps: Steps at most, ≥ 1, with one product each. A state costs one product more, and
            so does the check of a residual that round-off may have touched.
        tol: The relative residual at which a task has converged, ≥ 0.
        negative: What to do at a direction of negative curvature. `"truncate"` returns the iterate
            with the smallest residual. `"raise"` raises FloatingPointError. `"minres"` continues
            from that iterate with as many steps of `MINRES`.

    Raises:
        ValueError: A number is out of range, or `negative` is unknown.

    Example:
        >>> import torch
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> CG(max_steps=10).solve(Identity(b, scale=2.0), b).value
        tensor([[0.5000, 1.0000]])
    """

    takes_preconditioner: ClassVar[bool] = True

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6
    negative: Literal["truncate", "raise", "minres"] = "truncate"

    def __post_init__(self) -> None:
        check_limits("CG", self.max_steps, self.tol)
        if self.negative not in ("truncate", "raise", "minres"):
            raise ValueError(
                f"CG negative: got {self.negative!r}, expected 'truncate', 'raise' or 'minres'"
            )

    def with_budget(self, products: int) -> CG:
        """The same solver with this many steps."""
        return replace(self, max_steps=products, tol=0.0)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        solution = conjugate_gradients(system, self.max_steps, self.tol)
        indefinite = solution.status == int(Status.NEGATIVE_CURVATURE)
        if self.negative == "truncate" or not indefinite.any():
            return solution
        if self.negative == "raise":
            raise FloatingPointError(
                f"CG met negative curvature in {int(indefinite.sum())} of {len(indefinite)} tasks "
                f"(smallest quotient {float(solution.rayleigh.min()):.3g}); use "
                "curvature='gauss-newton', more damping, or negative='minres'"
            )
        minres = MINRES(self.max_steps, self.tol)
        return minres.continue_from(system, solution, indefinite)
