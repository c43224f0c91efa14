"""Conjugate gradients: the iteration that `CG`, trust regions and Newton's method share."""

from __future__ import annotations

import torch
from torch import Tensor

from metaimplicit.solvers.arithmetic import dot, norm, rayleigh_quotient
from metaimplicit.solvers.base import Apply, LinearSystem, Solution
from metaimplicit.solvers.iteration import (
    Progress,
    all_ended,
    final_status,
    is_asymmetric,
    warm_start,
)
from metaimplicit.solvers.status import Status


class CGIteration:
    """Preconditioned conjugate gradients on A x = b for all tasks (Hestenes & Stiefel 1952).

    With r = b − Ax and z = Pr, a step of length α along the direction p is

        x ← x + αp,   r ← r − αAp,   β = rᵀz/(rᵀz before),   p ← z + βp,

    and α = rᵀz/pᵀAp minimises ½xᵀAx − bᵀx along p. The caller multiplies by A, chooses α, and
    says which tasks step.

    Args:
        x: The start, `[tasks, n]`.
        r: b − Ax there, `[tasks, n]`.
        preconditioner: P. If None, the identity.

    Attributes:
        x: The iterate.
        r: The residual b − Ax, by its recurrence.
        p: The direction.
        rz: rᵀz, `[tasks, 1]`.

    Example:
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> cg = CGIteration(torch.zeros(1, 2), b)
        >>> ap = 2 * cg.p  # A = 2I
        >>> cg.step(ap, cg.exact_length(dot(cg.p, ap)), where=torch.tensor([[True]]))
        >>> cg.x
        tensor([[0.5000, 1.0000]])
    """

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        preconditioner: Apply | None = None,
    ) -> None:
        self._precondition = preconditioner or (lambda r: r)
        self.x = x
        self.r = r
        self.p = self._precondition(r)
        self.rz = dot(r, self.p)

    def exact_length(self, curvature: Tensor) -> Tensor:
        """The step length that minimises along p, `[tasks, 1]`, given pᵀAp."""
        return self.rz / curvature

    def step(
        self,
        ap: Tensor,
        length: Tensor,
        *,
        where: Tensor,
    ) -> None:
        """Step along p in the tasks `where`. The others stay as they are.

        Args:
            ap: Ap, `[tasks, n]`.
            length: α, `[tasks, 1]`.
            where: `[tasks, 1]`, bool.
        """
        self.x = torch.where(where, self.x + length * self.p, self.x)
        self.r = torch.where(where, self.r - length * ap, self.r)
        z = self._precondition(self.r)
        rz = dot(self.r, z)
        beta = rz / self.rz
        self.p = torch.where(where, z + beta * self.p, self.p)
        self.rz = torch.where(where, rz, self.rz)


def conjugate_gradients(
    system: LinearSystem,
    max_steps: int,
    tol: float,
) -> Solution:
    """Solve a system by conjugate gradients, as `CG` does.

    A task that meets a direction of negative curvature stops, with the status NEGATIVE_CURVATURE
    and its iterate of the smallest residual.

    Args:
        system: A, b of norm one or zero, the state and the preconditioner.
        max_steps: Steps at most, one product each. A state costs one product more, and so does the
            check of a residual that round-off may have touched.
        tol: The residual at which a task has converged.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> conjugate_gradients(LinearSystem(Identity(b, 2.0), b), max_steps=5, tol=1e-6).value
        tensor([[0.5000, 0.0000]])
    """
    x, r, products = warm_start(system)
    cg = CGIteration(x, r, system.preconditioner)
    residual = norm(r)
    progress = Progress.start(residual, tol, products)
    best = x
    best_residual = residual
    eps = torch.finfo(x.dtype).eps
    first = cg.p
    roundoff = torch.zeros_like(residual)  # in the second direction, from the first product
    indefinite = torch.zeros_like(progress.active)
    asymmetric = torch.zeros_like(progress.active)
    largest = torch.zeros_like(residual)  # of the quotients pᵀAp/pᵀp

    for step in range(max_steps):
        if all_ended(progress.active, step):
            break
        ap = progress.multiply(system, cg.p)
        quotient = rayleigh_quotient(cg.p, ap)
        progress.record_quotient(quotient)
        largest = torch.maximum(largest, torch.where(progress.active, quotient, 0.0))

        if step == 0:
            roundoff = 1e3 * eps * norm(ap)
        elif step == 1:
            # The first two directions are conjugate, p₀ᵀAp₁ = 0, if A is symmetric.
            size = norm(first) * (norm(ap) + roundoff)
            asymmetric = progress.active & is_asymmetric(dot(first, ap), size)
            progress.stop(asymmetric)
        # The curvature along p is not positive, to working precision.
        flat = quotient <= 10 * eps * largest
        indefinite = indefinite | (progress.active & flat)
        progress.stop(flat)

        cg.step(ap, cg.exact_length(dot(cg.p, ap)), where=progress.active)
        residual = torch.where(progress.active, norm(cg.r), residual)
        progress.stop(~(residual > tol))  # or NaN
        best = torch.where(residual < best_residual, cg.x, best)
        best_residual = torch.minimum(best_residual, residual)

    x = torch.where(indefinite, best, cg.x)
    residual = torch.where(indefinite, best_residual, residual)
    drift = eps * largest * norm(x)
    doubtful = (residual <= max(tol, eps**0.5)) | (drift > 0.1 * residual)
    residual = progress.recompute_residual(system, x, residual, doubtful=doubtful)
    exceptions = {
        Status.NEGATIVE_CURVATURE: indefinite & (residual > tol),
        Status.BREAKDOWN: asymmetric,
    }
    return progress.solution(x, residual, final_status(residual, tol, exceptions))
