"""The minimum-residual method, for systems that need not be positive definite."""

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
    check_limits,
    dot,
    is_asymmetric,
    recompute_residual,
    warm_start,
)


@dataclass(frozen=True)
class MINRES(Solver):
    """The minimum-residual method (Paige & Saunders 1975) for symmetric systems, definite or not.

    K steps from zero give the x in span{b, Ab, …, A^{K−1}b} of the smallest ‖b − Ax‖, so the residual never grows.
    On a singular system it ends at a least-squares solution, and says BREAKDOWN if that leaves a residual.

    Args:
        max_steps: steps at the most, ≥ 1, a product each; a state, and a residual that is measured, cost one more.
        tol: relative residual at which a task has converged.
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6

    def __post_init__(self) -> None:
        check_limits("MINRES", self.max_steps, self.tol)

    def with_budget(self, products: int) -> MINRES:
        return replace(self, max_steps=products, tol=0.0)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        x, r, products = warm_start(operator, b, state)
        residual = r.norm(dim=-1, keepdim=True)
        active, ended = residual > self.tol, torch.zeros_like(residual, dtype=torch.bool)
        v, v_old, w, w_old = (
            r / torch.where(residual > 0, residual, 1.0),
            *(torch.zeros_like(b) for _ in range(3)),
        )
        beta, size = torch.zeros_like(residual), torch.zeros_like(residual)
        cosine, sine, delta_bar, epsilon = (
            -torch.ones_like(beta),
            *(torch.zeros_like(beta) for _ in range(3)),
        )
        rayleigh = b.new_full((len(b),), torch.inf)
        needed = torch.full((len(b),), products, dtype=torch.int64, device=b.device)
        check_every, eps = 8 if b.is_cuda else 1, torch.finfo(b.dtype).eps
        for step in range(self.max_steps):
            if step % check_every == 0 and not active.any():
                break
            av = operator.matvec(v)
            products += 1
            needed += active.squeeze(-1)
            # Lanczos: A v = β_next v_next + α v + β v_old
            alpha = dot(v, av)
            skewed = torch.zeros_like(active)
            if (
                step == 1
            ):  # vᵀAv of the first two is β, unless A is not symmetric; v is known to eps size/β
                blur = 1e3 * eps * size * (size / beta)
                skewed = active & is_asymmetric(
                    dot(v_old, av) - beta, av.norm(dim=-1, keepdim=True) + blur
                )
            rayleigh = torch.minimum(rayleigh, torch.where(active, alpha, torch.inf).squeeze(-1))
            ahead = av - alpha * v - beta * v_old
            beta_next = ahead.norm(dim=-1, keepdim=True)
            size = torch.maximum(size, torch.maximum(alpha.abs(), beta_next))
            # the last column of the tridiagonal matrix, rotated; ‖A r‖ = slope ‖r‖ for the residual r so far
            delta = cosine * delta_bar + sine * alpha
            gamma_bar = sine * delta_bar - cosine * alpha
            epsilon_old, epsilon, delta_bar = epsilon, sine * beta_next, -cosine * beta_next
            slope = torch.hypot(gamma_bar, delta_bar)
            gamma = torch.hypot(gamma_bar, beta_next)
            gamma = torch.where(gamma > 0, gamma, 1.0)
            cosine, sine = gamma_bar / gamma, beta_next / gamma
            w, w_old = (v - epsilon_old * w_old - delta * w) / gamma, w
            ahead_x = x + cosine * residual * w
            # a least-squares solution, or a step that only rounding makes: nothing further to gain
            vast = size * ahead_x.norm(dim=-1, keepdim=True) * eps**0.75 > 1
            stuck = active & ((slope <= 100 * eps * size) | vast | skewed)
            ended, active = ended | stuck, active & ~stuck
            x = torch.where(active, ahead_x, x)
            residual = torch.where(active, sine * residual, residual)
            closed = active & (beta_next <= 10 * eps * size)  # the Krylov space is whole
            ended = ended | (closed & (residual > self.tol))
            active = active & ~closed & (residual > self.tol)
            v, v_old, beta = ahead / torch.where(beta_next > 0, beta_next, 1.0), v, beta_next
        small = residual <= max(self.tol, eps**0.5)
        residual, products = recompute_residual(operator, b, x, residual, small | ended, products)
        status = torch.where(residual <= self.tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(ended & (residual > self.tol), int(Status.BREAKDOWN), status).squeeze(
            -1
        )
        residual = torch.where(rayleigh.isnan(), torch.nan, residual.squeeze(-1))
        return Solution(x, status, residual, products, needed, rayleigh, SolverState(solution=x))
