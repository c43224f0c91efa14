"""The best of a Krylov space, from a basis of it that is kept."""

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
    warm_start,
)
from metaimplicit.solvers.low_rank import LowRank


@dataclass(frozen=True)
class Lanczos(Solver):
    """Galerkin or minimum-residual solutions in span{b, Ab, …, A^{K−1}b}, with full reorthogonalisation.

    From A V = V T + β v eᵀ with orthonormal V (Lanczos 1950): where T is positive definite, x = V T⁻¹ Vᵀ b, in exact
    arithmetic the iterate of CG; elsewhere x = V argmin ‖b − A V y‖, that of MINRES. Those two lose the orthogonality
    of their directions to round-off, and with it digits where the spectrum decays fast: here V is kept, some 3 K·n
    numbers for each task at the peak, and every step counts.

    Where A is so ill-conditioned for the precision that a space closes before b is solved, the iteration starts again
    from what it has, once, and as long as that halves the residual.

    Args:
        max_steps: steps at the most, ≥ 1, a product each; a state, and a residual that is measured, cost one more.
        tol: relative residual at which a task has converged.
        recycle: whether the state keeps the Ritz vectors of a positive definite T, K·n numbers for each task.
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6
    recycle: bool = False

    def __post_init__(self) -> None:
        check_limits("Lanczos", self.max_steps, self.tol)

    def with_budget(self, products: int) -> Lanczos:
        return replace(self, max_steps=products, tol=0.0)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        x, r, products = warm_start(operator, b, state)
        eps, budget = torch.finfo(b.dtype).eps, self.max_steps
        residual = r.norm(dim=-1, keepdim=True)
        needed = torch.full((len(b),), products, dtype=torch.int64, device=b.device)
        rayleigh = b.new_full((len(b),), torch.inf)
        kept: LowRank | None = None
        stuck = anew = torch.zeros_like(residual, dtype=torch.bool)
        while budget > 0:
            run = _iterate(operator, r, budget, self.tol, self.recycle and kept is None)
            if run.products == 0:
                break
            kept = run.ritz if kept is None else kept
            products, budget, needed = (
                products + run.products,
                budget - run.products,
                needed + run.needed,
            )
            rayleigh, ahead = torch.minimum(rayleigh, run.rayleigh), x + run.correction
            doubtful = run.doubtful | run.ended | (run.residual <= max(self.tol, eps**0.5))
            if not doubtful.any():
                x, residual = ahead, run.residual
                break
            r = b - operator.matvec(ahead)
            products, budget, before = products + 1, budget - 1, residual
            measured = r.norm(dim=-1, keepdim=True)
            taken = ~anew | ~(measured >= before)  # a new start has to be better; NaN goes through
            x, residual = torch.where(taken, ahead, x), torch.where(taken, measured, before)
            again = (
                run.ended
                & ~run.skewed
                & (residual > self.tol)
                & (~anew | (measured <= 0.5 * before))
            )
            stuck = stuck | (run.ended & ~again & (residual > max(self.tol, eps**0.5)))
            if not again.any():
                break
            r, anew = torch.where(again, r, 0.0), torch.ones_like(again)
        status = torch.where(residual <= self.tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(stuck, int(Status.BREAKDOWN), status).squeeze(-1)
        return Solution(
            x, status, residual.squeeze(-1), products, needed, rayleigh, SolverState(x, kept)
        )


@dataclass(frozen=True)
class _Run:
    """One Krylov space: A⁻¹r in it, and how it ended; `doubtful` where the residual is not that of the correction."""

    correction: Tensor
    residual: Tensor
    ended: Tensor
    skewed: Tensor
    doubtful: Tensor
    products: int
    needed: Tensor
    rayleigh: Tensor
    ritz: LowRank | None


def _iterate(operator: LinearOperator, r: Tensor, steps: int, tol: float, keep: bool) -> _Run:
    eps, (tasks, n) = torch.finfo(r.dtype).eps, r.shape
    first = r.norm(dim=-1, keepdim=True)
    basis = [r / torch.where(first > 0, first, 1.0)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []  # of T: 0 after a task has ended
    closing: list[Tensor] = []  # the β where it ended
    started = active = first > tol
    definite, skewed, ended = (
        torch.ones_like(active),
        torch.zeros_like(active),
        torch.zeros_like(active),
    )
    needed = torch.zeros(tasks, dtype=torch.int64, device=r.device)
    residual, least, last = first, first, first
    pivot, beta, size = torch.ones_like(first), torch.zeros_like(first), torch.zeros_like(first)
    cosine, sine, delta_bar = (
        -torch.ones_like(first),
        torch.zeros_like(first),
        torch.zeros_like(first),
    )
    check_every = 8 if r.is_cuda else 1
    for step in range(min(steps, n)):
        if step % check_every == 0 and not active.any():
            break
        w = operator.matvec(basis[-1])
        needed += active.squeeze(-1)
        # a task that has ended goes on with a zero vector, beside its T a multiple of the identity
        alpha = torch.where(active, dot(w, basis[-1]), diagonal[0] if diagonal else 1.0)
        known = torch.stack(basis)
        if step == 1:  # vᵀAv of the first two basis vectors is β, unless A is not symmetric
            skewed = active & is_asymmetric(dot(w, basis[0]) - beta, w.norm(dim=-1, keepdim=True))
            active, ended = active & ~skewed, ended | skewed
        for _ in range(2):
            w = w - torch.einsum("kt,ktn->tn", torch.einsum("ktn,tn->kt", known, w), known)
        size = torch.maximum(size, alpha.abs())
        # T = L D Lᵀ is as definite as D, and the last entry of T⁻¹e₁ gives Galerkin's residual
        last = beta / pivot * last if diagonal else last
        pivot = alpha - beta * (beta / pivot)
        definite = definite & (~active | (pivot > eps**0.75 * size))
        pivot = torch.where(pivot.abs() > 0, pivot, 1.0)
        gamma_bar = sine * delta_bar - cosine * alpha
        beta = torch.where(active, w.norm(dim=-1, keepdim=True), 0.0)
        size = torch.maximum(size, beta)
        beta = torch.where(beta > 10 * eps * size, beta, 0.0)  # else the Krylov space is whole
        delta_bar, gamma = -cosine * beta, torch.hypot(gamma_bar, beta)
        gamma = torch.where(gamma > 0, gamma, 1.0)
        cosine, sine = gamma_bar / gamma, beta / gamma
        least = torch.where(active, sine * least, least)
        residual = torch.where(
            active, torch.where(definite, beta * (last / pivot).abs(), least), residual
        )
        ended = ended | (active & ~(beta > 0))
        active = active & (beta > 0) & (residual > tol)
        diagonal.append(alpha)
        beside.append(torch.where(active, beta, 0.0))
        closing.append(torch.where(active, 0.0, beta))
        basis.append(torch.where(active, w / torch.where(beta > 0, beta, 1.0), 0.0))
    infinite = r.new_full((tasks,), torch.inf)
    if not diagonal:
        return _Run(torch.zeros_like(r), residual, ended, skewed, skewed, 0, needed, infinite, None)
    closing[-1] = torch.maximum(closing[-1], beside.pop())
    y, values, vectors, sure = _coordinates(diagonal, beside, closing, first, definite.squeeze(-1))
    y = torch.where(started, y, 0.0)
    known = torch.stack(basis[:-1])
    return _Run(
        correction=torch.einsum("tk,ktn->tn", y.to(r), known),
        residual=residual,
        ended=ended,
        skewed=skewed,
        doubtful=started & definite & ~sure,
        products=len(diagonal),
        needed=needed,
        rayleigh=torch.where(started.squeeze(-1), values[:, 0].to(r), infinite),
        ritz=_ritz(values, vectors, known, started) if keep else None,
    )


def _coordinates(
    diagonal: list[Tensor],
    beside: list[Tensor],
    closing: list[Tensor],
    first: Tensor,
    definite: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of x = V y, the eigenvalues and eigenvectors of T, in float64, and whether y is Galerkin's."""
    t = torch.diag_embed(torch.cat(diagonal, -1).double().nan_to_num(0.0, 0.0, 0.0))
    if beside:
        off = torch.diag_embed(torch.cat(beside, -1).double().nan_to_num(0.0, 0.0, 0.0), 1)
        t = t + off + off.mT
    right = torch.zeros_like(t[..., :1])
    right[:, 0] = first.double()
    (values, vectors), eps = torch.linalg.eigh(t), torch.finfo(first.dtype).eps
    sure = (definite & (values[:, 0] > eps**0.75 * values[:, -1]))[:, None, None]
    galerkin = torch.linalg.solve(torch.where(sure, t, torch.eye(t.shape[-1]).to(t)), right)
    tall = torch.cat(
        [t, torch.cat(closing, -1).double().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-2)], dim=-2
    )
    inverse = torch.linalg.pinv(tall, rtol=eps**0.75)
    least = inverse @ torch.cat([right, torch.zeros_like(right[:, :1])], dim=-2)
    return torch.where(sure, galerkin, least).squeeze(-1), values, vectors, sure.squeeze(-1)


def _ritz(values: Tensor, vectors: Tensor, basis: Tensor, started: Tensor) -> LowRank:
    """The Ritz pairs as a `LowRank` holds them; none of a task whose T is empty, or not positive definite."""
    definite = started & (values > 0).all(-1, keepdim=True)
    spread = torch.einsum("tkj,ktn->tjn", vectors.to(basis), basis)
    return LowRank(
        basis=torch.where(definite.unsqueeze(-1), spread, 0.0),
        inverse=torch.where(definite, 1 / torch.where(definite, values, 1.0), 0.0),
        rayleigh=values[:, 0].to(basis),
    )
