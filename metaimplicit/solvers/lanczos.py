"""The best of a Krylov space, from a basis that is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.options import option
from metaimplicit.solvers.arithmetic import divisor, dot, norm, reciprocal
from metaimplicit.solvers.base import LinearSystem, Solution, Solver, SolverState
from metaimplicit.solvers.iteration import (
    Progress,
    all_ended,
    check_limits,
    final_status,
    is_asymmetric,
    warm_start,
)
from metaimplicit.solvers.low_rank import LowRank
from metaimplicit.solvers.status import Status
from metaimplicit.solvers.tridiagonal import GalerkinResidual, GivensQR


@dataclass(frozen=True)
class Lanczos(Solver):
    """Galerkin or minimum-residual solutions in span{b, Ab, …, A^{K−1}b}, reorthogonalised fully.

    Lanczos's process (1950) gives A V = V T + β v eᵀ with orthonormal V. Where T is positive
    definite, x = V T⁻¹ Vᵀ b, in exact arithmetic the iterate of CG. Elsewhere
    x = V argmin_y ‖b − A V y‖, that of MINRES. Round-off costs these two the orthogonality of
    their directions, and with it digits where the spectrum decays fast. Here V is stored, about
    3 K·n numbers for each task at the peak, and every step counts.

    If the Krylov space is exhausted before the tolerance is met, since A is too ill-conditioned for
    the precision, the iteration restarts from the current solution. It restarts again only while
    each restart halves the residual.

    Args:
        max_steps: Steps at most, ≥ 1, with one product each. A state costs one product more, and
            so does the check of a small residual.
        tol: The relative residual at which a task has converged, ≥ 0.
        recycle: Whether the state keeps the Ritz vectors of a positive definite T, K·n numbers for
            each task.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> Lanczos(max_steps=10).solve(Identity(b, scale=2.0), b).value
        tensor([[0.5000, 0.0000]])
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6
    recycle: bool = False

    def __post_init__(self) -> None:
        check_limits("Lanczos", self.max_steps, self.tol)

    def with_budget(self, products: int) -> Lanczos:
        """The same solver with this many steps."""
        return replace(self, max_steps=products, tol=0.0)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        x, r, products = warm_start(system)
        residual = norm(r)
        progress = Progress.start(residual, self.tol, products)
        small = max(self.tol, torch.finfo(x.dtype).eps ** 0.5)
        budget = self.max_steps
        low_rank: LowRank | None = None
        restarted = False
        broken = torch.zeros_like(progress.active)

        while budget > 0:
            space = _KrylovSpace(r, self.tol)
            space.expand(system, max_steps=budget)
            if not space.steps:
                break
            budget -= space.steps
            progress.products += space.steps
            progress.needed = progress.needed + space.needed
            projection = space.project()
            if low_rank is None and self.recycle:
                low_rank = projection.ritz_pairs()
            progress.rayleigh = torch.minimum(progress.rayleigh, projection.smallest)
            x_next = x + projection.correction

            doubtful = projection.doubtful | space.ended | (space.residual <= small)
            if not doubtful.any():
                x = x_next
                residual = space.residual
                break

            r = system.b - system.operator.matvec(x_next)
            progress.products += 1
            budget -= 1
            true_residual = norm(r)
            # The first space always counts. A restart has to improve the task, or to show a NaN.
            better = ~(true_residual >= residual) | (not restarted)
            halved = (true_residual <= 0.5 * residual) | (not restarted)
            x = torch.where(better, x_next, x)
            residual = torch.where(better, true_residual, residual)
            again = space.ended & ~space.asymmetric & (residual > self.tol) & halved
            broken = broken | (space.ended & ~again & (residual > small))
            if not again.any():
                break
            r = torch.where(again, r, 0.0)
            restarted = True

        status = final_status(residual, self.tol, {Status.BREAKDOWN: broken})
        return progress.solution(x, residual, status, state=SolverState(x, low_rank))


class _KrylovSpace:
    """span{r, Ar, …} by Lanczos's process, for tasks that end at different steps.

    A v_k = β_{k+1} v_{k+1} + α_k v_k + β_k v_{k−1}, where every v is orthogonalised against all
    before it. A task that is no longer active continues with zero vectors, and T as a multiple of
    the identity.

    Attributes:
        needed: The products that each task needed, `[tasks, 1]`.
        residual: The residual of the solution in the space, by recurrence, `[tasks, 1]`.
        ended: Whether the space of the task cannot grow, because it is exhausted, or A is not
            symmetric, `[tasks, 1]`. A task that is solved is not `active`, but has not ended so.
        asymmetric: Whether A is not symmetric, `[tasks, 1]`.
        definite: Whether T is positive definite so far, `[tasks, 1]`.
    """

    def __init__(self, r: Tensor, tol: float) -> None:
        length = norm(r)
        self.tol = tol
        self.length = length
        self.started = length > tol
        self.active = self.started
        self.needed = torch.zeros_like(length, dtype=torch.int64)
        self.residual = length
        self.definite = torch.ones_like(self.active)
        self.asymmetric = torch.zeros_like(self.active)
        self.ended = torch.zeros_like(self.active)

        self.basis = [r / divisor(length)]
        self.alphas: list[Tensor] = []  # the diagonal of T
        self.betas: list[Tensor] = []  # beside it; 0 from the last active step on
        self.last_betas: list[Tensor] = []  # β_{k+1} of a task's last active step k, else 0

        self._eps = torch.finfo(r.dtype).eps
        self._size = torch.zeros_like(length)  # the largest |α| or β so far
        self._galerkin = GalerkinResidual(length)
        self._least_squares = length
        self._qr = GivensQR(length)

    @property
    def steps(self) -> int:
        """The size of T."""
        return len(self.alphas)

    def expand(self, system: LinearSystem, *, max_steps: int) -> None:
        """Take steps until all tasks have ended, or there were `max_steps` or n of them."""
        for step in range(min(max_steps, system.b.shape[1])):
            if all_ended(self.active, step):
                return
            self.needed = self.needed + self.active
            self._step(system.operator.matvec(self.basis[-1]))

    def _step(self, av: Tensor) -> None:
        """Extend the basis by what is new in A v_k."""
        # A v_k = β_{k+1} v_{k+1} + α_k v_k + β_k v_{k−1}
        filler = self.alphas[0] if self.alphas else 1.0  # for tasks that are not active
        alpha = torch.where(self.active, dot(av, self.basis[-1]), filler)
        if self.steps == 1:
            self._check_symmetry(av)
        w = self._orthogonalise(av)
        self._size = torch.maximum(self._size, alpha.abs())
        self._check_definite(alpha)

        beta = torch.where(self.active, norm(w), 0.0)
        self._size = torch.maximum(self._size, beta)
        # A smaller β is round-off: the space is exhausted.
        beta = torch.where(beta > 10 * self._eps * self._size, beta, 0.0)
        self._update_residual(alpha, beta)
        self.ended = self.ended | (self.active & ~(beta > 0))
        self.active = self.active & (beta > 0) & (self.residual > self.tol)

        self.alphas.append(alpha)
        self.betas.append(torch.where(self.active, beta, 0.0))
        self.last_betas.append(torch.where(self.active, 0.0, beta))
        self.basis.append(torch.where(self.active, w / divisor(beta), 0.0))

    def _check_symmetry(self, av: Tensor) -> None:
        # v₁ᵀA v₂ = β₂ for a symmetric A.
        skew = dot(av, self.basis[0]) - self.betas[0]
        self.asymmetric = self.active & is_asymmetric(skew, norm(av))
        self.active = self.active & ~self.asymmetric
        self.ended = self.ended | self.asymmetric

    def _check_definite(self, alpha: Tensor) -> None:
        # T = L D Lᵀ is as definite as the pivots D.
        pivot = self._galerkin.add_pivot(alpha)
        positive = pivot > self._eps**0.75 * self._size
        self.definite = self.definite & (positive | ~self.active)

    def _update_residual(self, alpha: Tensor, beta: Tensor) -> None:
        column = self._qr.append(alpha, beta)
        least_squares = column.sine * self._least_squares
        self._least_squares = torch.where(self.active, least_squares, self._least_squares)
        galerkin = self._galerkin.norm(beta)
        residual = torch.where(self.definite, galerkin, self._least_squares)
        self.residual = torch.where(self.active, residual, self.residual)

    def _orthogonalise(self, w: Tensor) -> Tensor:
        """The part of w, `[tasks, n]`, that is orthogonal to the vectors of the basis, likewise.

        The vectors of a task have norm 1, or 0 after it has ended.

        Gram–Schmidt's process is run twice, because once leaves round-off.
        """
        basis = torch.stack(self.basis)
        for _ in range(2):
            coordinates = torch.einsum("ktn,tn->kt", basis, w)
            w = w - torch.einsum("kt,ktn->tn", coordinates, basis)
        return w

    def project(self) -> _Projection:
        """The solution in the space, by float64 algebra with T."""
        off_diagonal = self.betas[:-1]
        # After the last step, β_{k+1} closes the tasks that are still active.
        last_betas = [*self.last_betas[:-1], torch.maximum(self.last_betas[-1], self.betas[-1])]
        t = torch.diag_embed(_joined(self.alphas))
        if off_diagonal:
            upper = torch.diag_embed(_joined(off_diagonal), offset=1)
            t = t + upper + upper.mT
        right = torch.zeros_like(t[..., :1])  # Vᵀr = ‖r‖e₁
        right[:, 0] = self.length.double()

        cutoff = self._eps**0.75
        values, vectors = torch.linalg.eigh(t)
        definite = self.definite & (values[:, :1] > cutoff * values[:, -1:])
        # Galerkin's y solves T y = ‖r‖e₁.
        eye = torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
        galerkin = torch.linalg.solve(torch.where(definite.unsqueeze(-1), t, eye), right)
        # Least squares: y minimises the distance of (T; β eᵀ) y to ‖r‖e₁.
        tall = torch.cat([t, _joined(last_betas).unsqueeze(-2)], dim=-2)
        right = torch.cat([right, torch.zeros_like(right[:, :1])], dim=-2)
        least_squares = torch.linalg.pinv(tall, rtol=cutoff) @ right

        y = torch.where(definite.unsqueeze(-1), galerkin, least_squares).squeeze(-1)
        y = torch.where(self.started, y, 0.0)
        basis = torch.stack(self.basis[:-1])
        return _Projection(
            correction=torch.einsum("tk,ktn->tn", y.to(basis), basis),
            doubtful=self.started & self.definite & ~definite,
            started=self.started,
            values=values,
            vectors=vectors,
            basis=basis,
        )


@dataclass(frozen=True)
class _Projection:
    """The solution in a Krylov space."""

    correction: Tensor  # V y ≈ A⁻¹r, [tasks, n]
    doubtful: Tensor  # whether the residual by recurrence is not that of y, [tasks, 1]
    started: Tensor  # whether the task took a step, [tasks, 1]
    values: Tensor  # the eigenvalues of T, [tasks, k], float64
    vectors: Tensor  # its eigenvectors, [tasks, k, k], float64
    basis: Tensor  # V, [k, tasks, n]

    @property
    def smallest(self) -> Tensor:
        """The smallest eigenvalue of T, `[tasks, 1]`, or +inf for a task that took no step."""
        return torch.where(self.started, self.values[:, :1].to(self.basis), torch.inf)

    def ritz_pairs(self) -> LowRank:
        """Eigenpairs of V T Vᵀ. A task has none if T is empty, or not positive definite."""
        definite = self.started & (self.values > 0).all(-1, keepdim=True)
        vectors = torch.einsum("tkj,ktn->tjn", self.vectors.to(self.basis), self.basis)
        return LowRank(
            basis=torch.where(definite.unsqueeze(-1), vectors, 0.0),
            inverse=reciprocal(self.values, where=definite),
            rayleigh=self.values[:, 0].to(self.basis),
        )


def _joined(numbers: list[Tensor]) -> Tensor:
    """Numbers `[tasks, 1]` of k steps as `[tasks, k]`, float64. NaN and infinity become 0."""
    return torch.cat(numbers, dim=-1).double().nan_to_num(0.0, 0.0, 0.0)
