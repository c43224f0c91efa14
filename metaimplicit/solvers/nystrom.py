"""Nyström's approximation: as a solver without iterations, and as a preconditioner of CG."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.operators import LinearOperator
from metaimplicit.options import option
from metaimplicit.solvers.arithmetic import norm
from metaimplicit.solvers.base import LinearSystem, Solution, SolverState
from metaimplicit.solvers.conjugate_gradients import conjugate_gradients
from metaimplicit.solvers.direct import direct_solution
from metaimplicit.solvers.iteration import check_limits, final_status
from metaimplicit.solvers.low_rank import (
    Probes,
    Sketch,
    is_indefinite,
    whiten,
)
from metaimplicit.solvers.sketching import SketchingSolver
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class Nystrom(SketchingSolver):
    """(|B_k| + sI)⁻¹ b for A = B + σI, with B_k = Y (ΩᵀY)⁺ Yᵀ, Y = BΩ and s = σ + ρ.

    The core B is sketched, never A, so σ is exact. Ω selects k columns of B (Hataya & Yamada 2023,
    eq. 6), or is Gaussian (Frangella, Tropp & Udell 2021). All k × k algebra is float64. Directions
    that Y does not span to working precision, such as a sampled unit that is dead, drop out. The
    negative eigenvalues of an indefinite B_k count by their size, so nothing is ever singular.

    Args:
        rank: k ≥ 1, products with B taken in one batch. It is n if that is smaller.
        rho: ρ ≥ 0, the damping that this solver adds. If None, it is 0 where σ > 0, else 0.01.
        sketch: Ω: `"columns"` of the identity, sampled without replacement, or `"gaussian"`; the
            same for all tasks.
        refresh: The number of solves that one sketch serves, given the state of the solve before.
        generator: The CPU generator that Ω is drawn from. If None, torch's default.
        chunk: κ ≥ 1, the products in one batch. If None, or κ ≥ k, all are in one batch, and Y is
            stored, k·n numbers for each task. If κ < k, Y is never stored, but every product is
            taken twice, since YᵀY = Ωᵀ B(BΩ): 2k + 2 products in κ·n numbers.
        tol: Let the rank grow: it doubles from `rank` until an estimate of ‖B − B_k‖/s is at most
            this number > 0, which bounds the relative error of the damped solution for B ⪰ 0. If
            None, the rank is `rank`.

    Raises:
        ValueError: A number is out of range, or `chunk` is given beside `tol` or `refresh`. On a
            solve: σ + ρ ≤ 0.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> Nystrom(rank=2, rho=1.0).solve(Identity(b, scale=1.0), b).value  # B = 0, σ + ρ = 2
        tensor([[0.5000, 1.0000]])
    """

    chunk: int | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is not None:
            check_count("Nystrom chunk", self.chunk, unit=", or None")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"Nystrom tol: got {self.tol}, expected a number > 0, or None")
        if self.chunk is not None and (self.tol is not None or self.refresh > 1):
            raise ValueError(
                f"Nystrom chunk: got {self.chunk} beside tol or refresh, which keep Y; "
                "expected None"
            )

    def with_budget(self, products: int) -> Nystrom:
        """The same solver with this rank."""
        return replace(self, rank=products, chunk=None, tol=None)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        b = system.b
        core, shift = self.split(system.operator)
        state = SolverState()
        rank = min(self.rank, core.shape[1])
        if self.chunk is not None and self.chunk < rank:
            x, smallest, indefinite = self._stream(
                core,
                b,
                shift,
                chunk=self.chunk,
            )
            products = 2 * rank + 2
        else:
            error = None if self.tol is None else self.tol * shift
            low_rank, products, state = self.sketch_core(core, system, error=error)
            x = low_rank.damped_inverse(b, shift)
            smallest = low_rank.rayleigh
            indefinite = low_rank.indefinite

        _, sigma = system.operator.split()
        solution = direct_solution(
            system,
            x,
            products=products,
            rayleigh=smallest + float(sigma),
        )
        indefinite = (indefinite | (solution.rayleigh <= 0)) & (norm(b).squeeze(-1) > 0)
        residual = solution.residual
        tol = torch.finfo(b.dtype).eps ** 0.5
        exceptions = {
            Status.BREAKDOWN: residual > 1,
            Status.NEGATIVE_CURVATURE: indefinite & ~(residual <= tol),
        }
        status = final_status(residual, tol, exceptions)
        return replace(solution, status=status, state=state)

    def _stream(
        self, core: LinearOperator, b: Tensor, shift: float, *, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, the smallest quotient ωᵀBω/ωᵀω, and whether B_k is indefinite, κ products at a time.

        x = (b − B Ω F Ωᵀ B b)/s with F = W diag(1/(1 + s|e|)) Wᵀ, where W and e = 1/d follow from
        ΩᵀY and YᵀY.
        """
        tasks, n = core.shape
        k = min(self.rank, n)
        probes = Probes(self.sketch, n, self.generator, like=b, most=k)
        parts = [(start, min(start + chunk, k)) for start in range(0, k, chunk)]

        def coordinates(v: Tensor) -> Tensor:
            """Ωᵀ v, `[tasks, m, n] -> [tasks, m, k]`."""
            return torch.cat([probes.coordinates(v, *part) for part in parts], dim=-1)

        gram = b.new_zeros(tasks, k, k, dtype=torch.float64)  # YᵀΩ
        square = torch.zeros_like(gram)  # YᵀY
        for start, stop in parts:
            images = probes.products(core, start, stop)
            gram[:, start:stop] = coordinates(images)
            twice = core.matmat(images.transpose(0, 1)).transpose(0, 1)
            square[:, start:stop] = coordinates(twice)
            del images, twice  # before the next are allocated

        # R with RᵀR = YᵀY. Eigenvalues of YᵀY known to ε give roots known to √ε.
        square = (0.5 * (square + square.mT)).nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(square)
        root = values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT
        roundoff = (k * torch.finfo(b.dtype).eps) ** 0.5
        weights, _, inverse = whiten(root, gram.nan_to_num(0.0, 0.0, 0.0), tolerance=roundoff)

        c = coordinates(core.matvec(b).unsqueeze(1)).mT
        c = weights @ ((weights.mT @ c) / (1 + shift * inverse.abs()).unsqueeze(-1))
        spread = torch.zeros_like(b)
        for start, stop in parts:
            probes.add(spread, c[:, start:stop, 0], start=start, stop=stop)
        x = core.matvec(spread).sub_(b).div_(-shift)
        smallest = gram.diagonal(dim1=-2, dim2=-1).amin(-1).to(b)
        return x, smallest, is_indefinite(inverse, b.dtype)


@dataclass(frozen=True)
class NystromCG(SketchingSolver):
    """Conjugate gradients on A, preconditioned by its Nyström approximation.

    It is Alg. 5.1 of Frangella, Tropp & Udell (2021). Unlike `Nystrom` it converges to A⁻¹b. It
    takes k products for the preconditioner, then one a step.

    Args:
        rank: k ≥ 1, products with B taken in one batch. It is n if that is smaller.
        rho: ρ ≥ 0, added to σ in the preconditioner alone. If None, it is 0 where σ > 0, else 0.01.
        sketch: Ω: `"columns"` of the identity, sampled without replacement, or `"gaussian"`; the
            same for all tasks.
        refresh: The number of solves that one sketch serves, given the state of the solve before.
        generator: The CPU generator that Ω is drawn from. If None, torch's default.
        max_steps: Steps of CG at most, ≥ 1.
        tol: The relative residual at which a task has converged, ≥ 0.

    Raises:
        ValueError: A number is out of range. On a solve: σ + ρ ≤ 0.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> NystromCG(rank=1).solve(Identity(b, scale=2.0), b).value
        tensor([[0.5000, 1.0000]])
    """

    sketch: Sketch = "gaussian"
    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits("NystromCG", self.max_steps, self.tol)

    def with_budget(self, products: int) -> NystromCG:
        """The same solver with half of the products for its rank, and half for its steps."""
        rank = (products + 1) // 2
        return replace(self, rank=rank, max_steps=max(1, products // 2), tol=0.0)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        core, shift = self.split(system.operator)
        low_rank, products, state = self.sketch_core(core, system)

        def precondition(r: Tensor) -> Tensor:
            return low_rank.precondition(r, shift)

        preconditioned = replace(system, preconditioner=precondition)
        solution = conjugate_gradients(preconditioned, self.max_steps, self.tol)
        return replace(
            solution,
            products=solution.products + products,
            needed=solution.needed + products,
            state=replace(state, solution=solution.value),
        )
