"""Nyström's approximation: as a solver without iterations, and as a preconditioner of conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    direct_solution,
)
from metaimplicit.solvers.cg import conjugate_gradients
from metaimplicit.solvers.low_rank import LowRank, Probes, Sketch, indefinite, whitened


@dataclass(frozen=True)
class _Sketching(Solver):
    sketches = True

    rank: int = 10
    rho: float | None = None
    sketch: Sketch = "columns"
    refresh: int = 1
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        for argument in ("rank", "refresh"):
            if getattr(self, argument) < 1:
                raise ValueError(
                    f"{name} {argument}: got {getattr(self, argument)}, expected at least 1"
                )
        if self.rho is not None and not self.rho >= 0:
            raise ValueError(f"{name} rho: got {self.rho}, expected a number ≥ 0, or None")
        if self.sketch not in ("columns", "gaussian"):
            raise ValueError(
                f"{name} sketch: got {self.sketch!r}, expected 'columns' or 'gaussian'"
            )

    def damping(self, sigma: float) -> float:
        return self.rho if self.rho is not None else (0.0 if sigma > 0 else 0.01)

    def _core(self, operator: LinearOperator) -> tuple[LinearOperator, float]:
        """B and s = σ + ρ."""
        core, sigma = operator.split()
        shift, name = float(sigma) + self.damping(float(sigma)), type(self).__name__
        if not shift > 0:
            raise ValueError(
                f"{name}: got σ + ρ = {shift}, expected > 0; give rho > 0 or a proximal strength"
            )
        if self.rank > operator.shape[1]:
            raise ValueError(
                f"{name} rank: got {self.rank}, expected at most n = {operator.shape[1]}, the adapted parameters"
            )
        return core, shift

    def _sketched(
        self,
        core: LinearOperator,
        b: Tensor,
        shift: float,
        state: SolverState,
        tol: float | None = None,
    ) -> tuple[LowRank, int, SolverState]:
        """B_k, the products it took, and the state that keeps it for `refresh` solves."""
        kept = state.low_rank
        if kept is not None and state.age is not None and int(state.age) < self.refresh:
            if kept.basis.shape[::2] != core.shape:
                raise ValueError(
                    f"state: got a sketch of {tuple(kept.basis.shape[::2])} tasks and parameters, expected "
                    f"{core.shape}; a state fits the problem it came from"
                )
            return kept, 0, SolverState(low_rank=kept, age=state.age + 1)
        n = core.shape[1]
        draw, rank = Probes(self.sketch, n, self.generator, b), self.rank
        rows, images, taken = draw.rows(0, rank), draw.images(core, 0, rank), rank
        low_rank = LowRank.from_products(rows, images)
        while tol is not None and rank < n:
            error, spent = low_rank.error(core)
            taken += spent
            if bool((error <= tol * shift).all()):
                break
            more = min(2 * rank, n)
            rows = torch.cat([rows, draw.rows(rank, more)])
            images = torch.cat([images, draw.images(core, rank, more)], dim=1)
            taken, rank = taken + more - rank, more
            low_rank = LowRank.from_products(rows, images)
        age = torch.where(
            images.isfinite().all(), 1, self.refresh
        )  # one of NaNs serves no other solve
        return low_rank, taken, SolverState(low_rank=low_rank, age=age)


@dataclass(frozen=True)
class Nystrom(_Sketching):
    """(|B_k| + sI)⁻¹ b with B_k = Y (ΩᵀY)⁺ Yᵀ, Y = BΩ, s = σ + ρ and A = B + σI; no iteration.

    The core B is sketched, never A: σ is exact. Ω selects k columns of B (Hataya & Yamada 2023, eq. 6) or is Gaussian
    (Frangella, Tropp & Udell 2021). All k×k algebra is float64. Directions that Y does not span to working precision
    (a sampled unit that is dead) drop out, and the negative eigenvalues of an indefinite B_k count by their size, so
    nothing is ever singular.

    Args:
        rank: k ≥ 1, products taken in one batch.
        rho: ρ ≥ 0, the damping this solver owns. None: 0 if σ > 0, else 0.01.
        sketch: `"columns"`, sampled without replacement, or `"gaussian"`; the same for all tasks.
        refresh: solves that one sketch serves, given the state of the solve before.
        generator: the CPU generator that Ω is drawn from; None, torch's default.
        chunk: κ, products in one batch. None, or κ ≥ k: all of them, and Y is kept, k·n numbers for each task.
            κ < k: Y is never kept but every product taken twice, 2k + 2 in κ·n numbers, since YᵀY = Ωᵀ B(BΩ).
        tol: let the rank grow: double it from `rank` until an estimate of ‖B − B_k‖/s is at most this, which bounds
            the relative error of the damped solution for B ⪰ 0. None: the rank as given.

    Raises:
        ValueError: on solving, if the rank exceeds n or σ + ρ ≤ 0.
    """

    chunk: int | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"Nystrom chunk: got {self.chunk}, expected at least 1, or None")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"Nystrom tol: got {self.tol}, expected a number > 0, or None")
        if self.chunk is not None and (self.tol is not None or self.refresh > 1):
            raise ValueError(
                f"Nystrom chunk: got {self.chunk} beside tol or refresh, which keep Y; expected None"
            )

    def with_budget(self, products: int) -> Nystrom:
        return replace(self, rank=products, chunk=None, tol=None)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        core, shift = self._core(operator)
        kept = SolverState()
        if self.chunk is not None and self.chunk < self.rank:
            x, seen, bent = self._streamed(core, b, shift)
            taken = 2 * self.rank + 2
        else:
            low_rank, taken, kept = self._sketched(core, b, shift, state, self.tol)
            x, seen, bent = (
                low_rank.damped_inverse(b, shift),
                low_rank.rayleigh,
                low_rank.indefinite,
            )
        solution = direct_solution(
            operator, b, x, taken, rayleigh=seen + float(operator.split()[1])
        )
        bent = (bent | (solution.rayleigh <= 0)) & (b.norm(dim=-1) > 0)
        status = torch.where(solution.residual > 1, int(Status.BREAKDOWN), int(Status.MAX_STEPS))
        status = torch.where(bent, int(Status.NEGATIVE_CURVATURE), status)
        status = torch.where(
            solution.residual <= torch.finfo(b.dtype).eps ** 0.5, solution.status, status
        )
        return replace(solution, status=status, state=kept)

    def _streamed(
        self, core: LinearOperator, b: Tensor, shift: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, the smallest Rayleigh quotient and whether B_k is indefinite, from κ products at a time.

        x = (b − B Ω F Ωᵀ B b)/s with F = W diag(1/(1 + s|e|)) Wᵀ, W and e from ΩᵀY and YᵀY.
        """
        (tasks, n), k = core.shape, self.rank
        draw = Probes(self.sketch, n, self.generator, b, most=k)
        parts = [(a, min(a + (self.chunk or k), k)) for a in range(0, k, self.chunk or k)]
        gram, square = (b.new_zeros(tasks, k, k, dtype=torch.float64) for _ in range(2))

        def coordinates(v: Tensor) -> Tensor:
            """Ωᵀ v for `[tasks, m, n]`: `[tasks, m, k]`."""
            return torch.cat([draw.coordinates(v, a, z) for a, z in parts], dim=-1)

        for a, z in parts:
            images = draw.images(core, a, z)
            gram[:, a:z] = coordinates(images)
            square[:, a:z] = coordinates(core.matmat(images.transpose(0, 1)).transpose(0, 1))
            del images  # before the next are made
        values, vectors = torch.linalg.eigh((0.5 * (square + square.mT)).nan_to_num(0.0, 0.0, 0.0))
        root = values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT
        tolerance = (k * torch.finfo(b.dtype).eps) ** 0.5  # of a square
        weights, inverse = whitened(root, gram.nan_to_num(0.0, 0.0, 0.0), tolerance)
        c = coordinates(core.matvec(b).unsqueeze(1)).mT
        c = weights @ ((weights.mT @ c) / (1 + shift * inverse.abs()).unsqueeze(-1))
        spread = torch.zeros_like(b)
        for a, z in parts:
            draw.add(spread, c[:, a:z, 0], a, z)
        x = core.matvec(spread).sub_(b).div_(-shift)
        return x, gram.diagonal(dim1=-2, dim2=-1).amin(-1).to(b), indefinite(inverse, b.dtype)


@dataclass(frozen=True)
class NystromCG(_Sketching):
    """Conjugate gradients on A, preconditioned by its Nyström approximation (Frangella, Tropp & Udell 2021, alg. 5.1).

    Unlike `Nystrom` it converges to A⁻¹b: k products for the preconditioner, then one a step.

    Args:
        rank, rho, sketch, refresh, generator: as in `Nystrom`; ρ shapes the preconditioner alone.
        max_steps: steps of CG at the most, ≥ 1.
        tol: relative residual at which a task has converged.

    Raises:
        ValueError: on solving, if the rank exceeds n or σ + ρ ≤ 0.
    """

    sketch: Sketch = "gaussian"
    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits("NystromCG", self.max_steps, self.tol)

    def with_budget(self, products: int) -> NystromCG:
        rank = (products + 1) // 2
        return replace(self, rank=rank, max_steps=max(1, products // 2), tol=0.0)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        core, shift = self._core(operator)
        low_rank, taken, kept = self._sketched(core, b, shift, state)
        solution = conjugate_gradients(
            operator, b, state, lambda r: low_rank.precondition(r, shift), self.max_steps, self.tol
        )
        return replace(
            solution,
            products=solution.products + taken,
            needed=solution.needed + taken,
            state=replace(kept, solution=solution.state.solution),
        )
