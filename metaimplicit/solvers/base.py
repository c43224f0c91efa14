"""What a solve is: an operator and a right-hand side in; a value, a status and counts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator


class Status(IntEnum):
    """How a task's solve ended."""

    CONVERGED = 0  # the residual met the tolerance, or the method is direct
    MAX_STEPS = 1  # steps, terms, rank or precision ran out before the tolerance was met
    NEGATIVE_CURVATURE = 2  # vᵀAv ≤ 0 was met: A is not positive definite
    BREAKDOWN = 3  # the iteration diverges, A is singular to working precision, or the result is worse than zero
    NON_FINITE = 4  # NaN or Inf in the operator or the right-hand side


ADVICE = {
    Status.NEGATIVE_CURVATURE: (
        "the curvature is not positive definite; use curvature='gauss-newton', or add damping= or a larger proximal "
        "strength"
    ),
    Status.BREAKDOWN: (
        "it diverged, the matrix is singular, or the residual is above 1; add damping=, raise Nystrom's rank or rho, "
        "or give Neumann a smaller scale"
    ),
    Status.NON_FINITE: "NaN or Inf in the curvature or the outer gradient; look at the losses and the inner step size",
}


@dataclass(frozen=True)
class Solution:
    """The result of `Solver.solve`.

    Attributes:
        value: x ≈ A⁻¹b, `[tasks, n]`; NaN where the status is NON_FINITE, so that nothing trains on it.
        status: `[tasks]`, int64, members of `Status`.
        residual: ‖b − Ax‖/‖b‖ for each task, `[tasks]`; 0 where b = 0.
        products: operator products executed, each over all tasks.
        needed: `[tasks]`, the products each task needed before it ended.
        rayleigh: `[tasks]`, the smallest vᵀAv/vᵀv seen; +inf if none was.
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    products: int
    needed: Tensor
    rayleigh: Tensor


class Solver(ABC):
    """A⁻¹b for each task. Leaves say how in `_solve`, for right-hand sides of norm one (or zero).

    A solver that approximates the core B of A = B + σI owns one damping ρ, added to σ; all others have none.
    """

    def damping(self, sigma: float) -> float:
        """ρ as used beside a shift σ."""
        return 0.0

    def solve(self, operator: LinearOperator, b: Tensor) -> Solution:
        """Solve A x = b.

        Args:
            operator: A, shape `(tasks, n)`.
            b: right-hand sides `[tasks, n]`; normalised before the solve, so their scale is immaterial.

        Raises:
            ValueError: `b` is not of the operator's shape.
        """
        if b.shape != operator.shape:
            raise ValueError(f"b: got shape {tuple(b.shape)}, expected {operator.shape}, the operator's")
        peak = b.abs().amax(-1, keepdim=True)
        finite = peak.isfinite()
        safe = torch.where(finite & (peak > 0), peak, 1.0)
        scaled = torch.where(finite, b / safe, 0.0)  # by the peak first: the square of a tiny norm underflows
        norm = scaled.norm(dim=-1, keepdim=True)
        unit = scaled / torch.where(norm > 0, norm, 1.0)
        solution = self._solve(operator, unit)
        finite = finite & solution.residual.isfinite().unsqueeze(-1) & solution.value.isfinite().all(-1, keepdim=True)
        value = torch.where(finite, solution.value * norm * safe, torch.nan)
        status = torch.where(finite.squeeze(-1), solution.status, int(Status.NON_FINITE))
        return Solution(value, status, solution.residual, solution.products, solution.needed, solution.rayleigh)

    @abstractmethod
    def _solve(self, operator: LinearOperator, b: Tensor) -> Solution: ...


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each task, `[tasks, 1]`."""
    return (a * b).sum(-1, keepdim=True)


def rayleigh_quotient(v: Tensor, av: Tensor) -> Tensor:
    """vᵀAv/vᵀv, `[tasks]`; +inf where v = 0."""
    vv = dot(v, v)
    return torch.where(vv > 0, dot(v, av) / torch.where(vv > 0, vv, 1.0), torch.inf).squeeze(-1)


def direct(operator: LinearOperator, b: Tensor, x: Tensor, products: int, rayleigh: Tensor | None = None) -> Solution:
    """The solution of a method without iterations, its residual measured by one product more."""
    ax = operator.matvec(x)
    seen = rayleigh_quotient(x, ax)
    status = torch.full((len(b),), int(Status.CONVERGED), device=b.device)
    return Solution(
        value=x,
        status=status,
        residual=(b - ax).norm(dim=-1),
        products=products + 1,
        needed=torch.full_like(status, products + 1),
        rayleigh=seen if rayleigh is None else torch.minimum(seen, rayleigh),
    )
