"""What the solvers share that sketch the core of A = B + σI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from metaimplicit.counts import check_count
from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import LinearSystem, SolverState
from metaimplicit.solvers.core import CoreSolver
from metaimplicit.solvers.low_rank import LowRank, Probes, Sketch


@dataclass(frozen=True)
class SketchingSolver(CoreSolver):
    """A solver that takes products of B with k vectors Ω, the same for all tasks.

    Args:
        rank: k ≥ 1, products with B taken in one batch. It is n if that is smaller.
        rho: ρ ≥ 0, the damping that this solver adds. If None, it is 0 where σ > 0, else 0.01.
        sketch: Ω: `"columns"` of the identity, sampled without replacement, or `"gaussian"`.
        refresh: The number of solves that one sketch serves, given the state of the solve before.
        generator: The CPU generator that Ω is drawn from. If None, torch's default.
    """

    sketches: ClassVar[bool] = True

    rank: int = 10
    rho: float | None = None
    sketch: Sketch = "columns"
    refresh: int = 1
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        for argument in ("rank", "refresh"):
            value = getattr(self, argument)
            check_count(f"{name} {argument}", value)
        self.check_rho()
        if self.sketch not in ("columns", "gaussian"):
            raise ValueError(
                f"{name} sketch: got {self.sketch!r}, expected 'columns' or 'gaussian'"
            )

    def split(self, operator: LinearOperator) -> tuple[LinearOperator, float]:
        """The core B and the shift s = σ + ρ.

        Raises:
            ValueError: The shift is not positive.
        """
        core, shift = super().split(operator)
        return core, shift

    def sketch_core(
        self, core: LinearOperator, system: LinearSystem, *, error: float | None = None
    ) -> tuple[LowRank, int, SolverState]:
        """B_k, from the state if its sketch still serves.

        Args:
            core: B.
            system: The system, whose state may hold a sketch.
            error: The rank doubles from `rank` until an estimate of ‖B − B_k‖ is at most this for
                every task, or k = n. If None, it does not grow.

        Returns:
            B_k, the products it took, and the state that keeps it for the next solve.

        Raises:
            ValueError: The sketch in the state has another shape.
        """
        state = system.state
        low_rank = state.low_rank
        if low_rank is not None and state.age is not None and int(state.age) < self.refresh:
            shape = tuple(low_rank.basis.shape[::2])
            if shape != core.shape:
                raise ValueError(
                    f"state: got a sketch of {shape} tasks and parameters, expected {core.shape}; "
                    "a state fits the problem it came from"
                )
            return low_rank, 0, SolverState(low_rank=low_rank, age=state.age + 1)

        n = core.shape[1]
        rank = min(self.rank, n)
        probes = Probes(self.sketch, n, self.generator, like=system.b)
        rows = probes.rows(0, rank)
        images = probes.products(core, 0, rank)
        low_rank = LowRank.from_products(rows, images)
        estimates = 0  # products that estimated errors
        while error is not None and rank < n:
            estimate, spent = low_rank.error(core)
            estimates += spent
            if bool((estimate <= error).all()):
                break
            larger = min(2 * rank, n)
            rows = torch.cat([rows, probes.rows(rank, larger)])
            images = torch.cat([images, probes.products(core, rank, larger)], dim=1)
            rank = larger
            low_rank = LowRank.from_products(rows, images)
        # A sketch that is not finite serves no other solve.
        age = torch.where(images.isfinite().all(), 1, self.refresh)
        return low_rank, rank + estimates, SolverState(low_rank=low_rank, age=age)
