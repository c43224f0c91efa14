"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import Solution, Solver, Status, dot, rayleigh_quotient


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients from zero (Hestenes & Stiefel 1952), all tasks at once under masks.

    K steps give the minimiser of ½xᵀAx − bᵀx over the Krylov space span{b, Ab, …, A^{K−1}b}. A task ends when its
    residual meets `tol`, or at a direction with pᵀAp ≤ 0, where it keeps the iterate it has. A small residual is
    measured by one product more before it is reported.

    Args:
        max_steps: products with A at the most, ≥ 1.
        tol: relative residual at which a task has converged.
    """

    max_steps: int = 10
    tol: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"CG max_steps: got {self.max_steps}, expected at least 1")

    def _solve(self, operator: LinearOperator, b: Tensor) -> Solution:
        x, r, p = torch.zeros_like(b), b, b
        rr = dot(r, r)
        active = rr > self.tol**2
        negative = torch.zeros_like(active)
        rayleigh = b.new_full((len(b),), torch.inf)
        needed = torch.zeros(len(b), dtype=torch.int64, device=b.device)
        check_every = 8 if b.is_cuda else 1  # a look at `active` waits for the device
        products = 0
        for step in range(self.max_steps):
            if step % check_every == 0 and not active.any():
                break
            ap = operator.matvec(p)
            products += 1
            needed += active.squeeze(-1)
            curvature = dot(p, ap)
            seen = torch.where(active.squeeze(-1), rayleigh_quotient(p, ap), torch.inf)
            rayleigh = torch.minimum(rayleigh, seen)
            negative = negative | (active & (curvature <= 0))
            active = active & (curvature > 0)
            alpha = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0)
            x = x + alpha * p
            r = r - alpha * torch.where(active, ap, 0.0)
            rr_next = torch.where(active, dot(r, r), rr)
            p = torch.where(active, r + rr_next / torch.where(active, rr, 1.0) * p, p)
            rr = rr_next
            active = active & (rr > self.tol**2)
        residual = rr.sqrt()
        if bool((residual <= max(self.tol, torch.finfo(b.dtype).eps ** 0.5)).any()):
            # the recurrence drifts from b − Ax by round-off: a residual this small is measured before it is claimed
            residual = torch.where(negative, residual, (b - operator.matvec(x)).norm(dim=-1, keepdim=True))
            products += 1
        status = torch.where(residual <= self.tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(negative, int(Status.NEGATIVE_CURVATURE), status).squeeze(-1)
        residual = torch.where(rayleigh.isnan(), torch.nan, residual.squeeze(-1))
        return Solution(x, status, residual, products, needed, rayleigh)
