"""The minimum-residual method, for systems that need not be positive definite."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.options import option
from metaimplicit.solvers.arithmetic import divisor, dot, norm
from metaimplicit.solvers.base import LinearSystem, Solution, Solver
from metaimplicit.solvers.iteration import (
    Progress,
    all_ended,
    check_limits,
    final_status,
    is_asymmetric,
    warm_start,
)
from metaimplicit.solvers.status import Status
from metaimplicit.solvers.tridiagonal import GivensQR


@dataclass(frozen=True)
class MINRES(Solver):
    """The minimum-residual method (Paige & Saunders 1975) for symmetric systems, definite or not.

    K steps from zero give the x in span{b, Ab, …, A^{K−1}b} with the smallest ‖b − Ax‖, so the
    residual never grows. On a singular system it ends at a least-squares solution, with the status
    BREAKDOWN if that leaves a residual.

    Args:
        max_steps: Steps at most, ≥ 1, with one product each. A state costs one product more, and
            so does the check of a residual that round-off may have touched.
        tol: The relative residual at which a task has converged, ≥ 0.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> MINRES(max_steps=10).solve(Identity(b, scale=-2.0), b).value
        tensor([[-0.5000, -1.0000]])
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6

    def __post_init__(self) -> None:
        check_limits("MINRES", self.max_steps, self.tol)

    def with_budget(self, products: int) -> MINRES:
        """The same solver with this many steps."""
        return replace(self, max_steps=products, tol=0.0)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        x, r, products = warm_start(system)
        residual = norm(r)
        progress = Progress.start(residual, self.tol, products)
        lanczos = _LanczosProcess(r / divisor(residual))
        qr = GivensQR(residual)
        w = torch.zeros_like(x)
        w_old = torch.zeros_like(x)
        eps = torch.finfo(x.dtype).eps
        broken = torch.zeros_like(progress.active)

        for step in range(self.max_steps):
            if all_ended(progress.active, step):
                break
            v = lanczos.v
            av = progress.multiply(system, v)
            asymmetric = progress.active & lanczos.is_asymmetric(av, step, eps)
            alpha, beta = lanczos.advance(av)
            progress.record_quotient(alpha)

            # x_k = x_{k−1} + c_k φ_{k−1} w_k with the residual φ_k = s_k φ_{k−1}. Since W R = V,
            # w_k = (v_k − ε_k w_{k−2} − δ_k w_{k−1})/γ_k.
            column = qr.append(alpha, beta)
            w_next = (v - column.epsilon * w_old - column.delta * w) / column.gamma
            w_old = w
            w = w_next
            x_next = x + column.cosine * residual * w

            # At a least-squares solution a step gains nothing, and a vast one is round-off.
            least_squares = column.slope <= 100 * eps * lanczos.size
            vast = lanczos.size * norm(x_next) * eps**0.75 > 1
            stalled = progress.active & (least_squares | vast | asymmetric)
            progress.stop(stalled)
            x = torch.where(progress.active, x_next, x)
            residual = torch.where(progress.active, column.sine * residual, residual)

            # With β = 0 the Krylov space does not grow any further.
            exhausted = progress.active & (beta <= 10 * eps * lanczos.size)
            broken = broken | stalled | (exhausted & (residual > max(self.tol, 10 * eps)))
            progress.stop(exhausted | ~(residual > self.tol))

        drift = eps * (lanczos.size * norm(x)).square()
        doubtful = (residual <= max(self.tol, eps**0.5)) | broken | (drift > 0.1 * residual)
        residual = progress.recompute_residual(
            system,
            x,
            residual,
            doubtful=doubtful,
        )
        worse_than_zero = residual > 1 + eps**0.5
        exceptions = {Status.BREAKDOWN: (broken & (residual > self.tol)) | worse_than_zero}
        return progress.solution(x, residual, final_status(residual, self.tol, exceptions))


class _LanczosProcess:
    """A v_k = β_{k+1} v_{k+1} + α_k v_k + β_k v_{k−1} for symmetric A (Lanczos 1950)."""

    def __init__(self, v: Tensor) -> None:
        self.v = v
        self.size = torch.zeros_like(v[:, :1])  # the largest |α| or β so far, `[tasks, 1]`
        self._v_old = torch.zeros_like(v)
        self._beta = torch.zeros_like(v[:, :1])

    def advance(self, av: Tensor) -> tuple[Tensor, Tensor]:
        """From A v_k to v_{k+1}. Returns α_k and β_{k+1}, `[tasks, 1]`."""
        alpha = dot(self.v, av)
        v_next = av - alpha * self.v - self._beta * self._v_old
        beta = norm(v_next)
        self.size = torch.maximum(self.size, torch.maximum(alpha.abs(), beta))
        self._v_old = self.v
        self.v = v_next / divisor(beta)
        self._beta = beta
        return alpha, beta

    def is_asymmetric(
        self,
        av: Tensor,
        step: int,
        eps: float,
    ) -> Tensor:
        """Whether v₁ᵀA v₂ differs from β₂, `[tasks, 1]`, which only the second step can tell."""
        if step != 1:
            return torch.zeros_like(self._beta, dtype=torch.bool)
        roundoff = 1e3 * eps * self.size * (self.size / self._beta)  # of v₂
        return is_asymmetric(dot(self._v_old, av) - self._beta, norm(av) + roundoff)
