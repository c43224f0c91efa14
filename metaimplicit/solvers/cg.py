"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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
    check_limits,
    dot,
    is_asymmetric,
    rayleigh_quotient,
    recompute_residual,
    warm_start,
)
from metaimplicit.solvers.minres import MINRES


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients (Hestenes & Stiefel 1952), all tasks at once under masks.

    K steps from zero give the minimiser of ½xᵀAx − bᵀx over the Krylov space span{b, Ab, …, A^{K−1}b}; with a
    preconditioner P, over that of PA from Pb. A task ends when its residual meets `tol`, or at a direction with
    pᵀAp ≤ 0. A small residual is measured by one product more before it is reported; a state costs one as well.

    Args:
        max_steps: steps at the most, ≥ 1, a product each; a state, and a residual that is measured, cost one more.
        tol: relative residual at which a task has converged.
        negative: at a direction of negative curvature, `"truncate"` keeps the iterate with the smallest residual,
            `"raise"` raises FloatingPointError, and `"minres"` goes on from it with as many steps of `MINRES`.
    """

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
        return replace(self, max_steps=products, tol=0.0)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        solution = conjugate_gradients(operator, b, state, preconditioner, self.max_steps, self.tol)
        bent = solution.status == int(Status.NEGATIVE_CURVATURE)
        if self.negative == "truncate" or not bent.any():
            return solution
        if self.negative == "raise":
            raise FloatingPointError(
                f"CG met negative curvature in {int(bent.sum())} of {len(b)} tasks (smallest quotient "
                f"{float(solution.rayleigh.min()):.3g}); use curvature='gauss-newton', more damping, or "
                "negative='minres'"
            )
        return continue_with(solution, bent, MINRES(self.max_steps, self.tol), operator, b)


def continue_with(
    solution: Solution, where: Tensor, solver: Solver, operator: LinearOperator, b: Tensor
) -> Solution:
    """The solution, but for the tasks in `where` that of another solver that starts from it, if that is better."""
    other = solver._solve(operator, b, SolverState(solution=solution.value), None)
    tried, where = where, where & ~(other.residual > solution.residual)  # NaN goes through
    value = torch.where(where.unsqueeze(-1), other.value, solution.value)
    return Solution(
        value=value,
        status=torch.where(where, other.status, solution.status),
        residual=torch.where(where, other.residual, solution.residual),
        products=solution.products + other.products,
        needed=solution.needed + torch.where(tried, other.needed, 0),
        rayleigh=torch.minimum(solution.rayleigh, other.rayleigh),
        state=SolverState(solution=value),
    )


def conjugate_gradients(
    operator: LinearOperator,
    b: Tensor,
    state: SolverState,
    preconditioner: Apply | None,
    max_steps: int,
    tol: float,
) -> Solution:
    """The iteration of `CG`, for right-hand sides of norm one."""
    apply = preconditioner or (lambda r: r)
    x, r, products = warm_start(operator, b, state)
    z = apply(r)
    p, rz, residual = z, dot(r, z), r.norm(dim=-1, keepdim=True)
    best, least = x, residual
    active = residual > tol
    negative, skewed, first, blur = torch.zeros_like(active), torch.zeros_like(active), p, residual
    rayleigh, largest = b.new_full((len(b),), torch.inf), b.new_zeros(len(b))
    needed = torch.full((len(b),), products, dtype=torch.int64, device=b.device)
    check_every = 8 if b.is_cuda else 1  # a look at `active` waits for the device
    for step in range(max_steps):
        if step % check_every == 0 and not active.any():
            break
        ap = operator.matvec(p)
        products += 1
        needed += active.squeeze(-1)
        curvature, quotient = dot(p, ap), rayleigh_quotient(p, ap)
        rayleigh = torch.minimum(rayleigh, torch.where(active.squeeze(-1), quotient, torch.inf))
        largest = torch.maximum(largest, torch.where(active.squeeze(-1), quotient, 0.0))
        if step == 0:
            first, blur = p, 1e3 * torch.finfo(b.dtype).eps * ap.norm(dim=-1, keepdim=True)
        if (
            step == 1
        ):  # directions are conjugate, to the round-off in the second, unless A is not symmetric
            size = first.norm(dim=-1, keepdim=True) * (ap.norm(dim=-1, keepdim=True) + blur)
            skewed = active & is_asymmetric(dot(first, ap), size)
            active = active & ~skewed
        flat = (
            quotient <= 10 * torch.finfo(b.dtype).eps * largest
        )  # not positive, to working precision
        negative = negative | (active & flat.unsqueeze(-1))
        active = active & ~flat.unsqueeze(-1)
        alpha = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        x = x + alpha * p
        r = r - alpha * torch.where(active, ap, 0.0)
        z = apply(r)
        rz_next = torch.where(active, dot(r, z), rz)
        p = torch.where(active, z + rz_next / torch.where(active, rz, 1.0) * p, p)
        rz, residual = rz_next, torch.where(active, r.norm(dim=-1, keepdim=True), residual)
        active = active & (residual > tol)
        best, least = torch.where(residual < least, x, best), torch.minimum(least, residual)
    x, residual = torch.where(negative, best, x), torch.where(negative, least, residual)
    small = residual <= max(tol, torch.finfo(b.dtype).eps ** 0.5)
    residual, products = recompute_residual(operator, b, x, residual, small, products)
    status = torch.where(residual <= tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(negative & (residual > tol), int(Status.NEGATIVE_CURVATURE), status)
    status = torch.where(skewed, int(Status.BREAKDOWN), status).squeeze(-1)
    residual = torch.where(rayleigh.isnan(), torch.nan, residual.squeeze(-1))
    return Solution(x, status, residual, products, needed, rayleigh, SolverState(solution=x))
