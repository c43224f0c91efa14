"""The solver that chooses among the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.options import option
from metaimplicit.solvers.base import Apply, Solution, Solver, SolverState, Status, check_limits
from metaimplicit.solvers.cg import CG, conjugate_gradients, continue_with
from metaimplicit.solvers.dense import Dense
from metaimplicit.solvers.lanczos import Lanczos
from metaimplicit.solvers.low_rank import LowRank


@dataclass(frozen=True)
class Auto(Solver):
    """What size, memory and the residuals so far ask for; `Solution.chosen` says what, and why.

    n ≤ `dense`: `Dense`. A basis above `memory`: `CG`, and `MINRES` from where it meets negative curvature. Else
    `Lanczos`, A definite or not, and CG from where the precision stops it. Given the state of a solve before, it
    starts from there and keeps its Ritz vectors; from then on these precondition CG (Krylov recycling, Parks et al.
    2006), for as long as the residual gets as low, in as few products, as in the solve that made them; where they meet
    negative curvature, Lanczos goes on.

    Args:
        max_steps: steps at the most, ≥ 1, as `Lanczos` counts them, unless it is dense.
        tol: relative residual at which a task has converged.
        dense: the largest n for a dense solve of n products in batches; 0: never.
        memory: bytes that a basis may take, four times over as it is at the peak.
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6
    dense: int = 256
    memory: int = 2**30

    def __post_init__(self) -> None:
        check_limits("Auto", self.max_steps, self.tol)
        for name in ("dense", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"Auto {name}: got {getattr(self, name)}, expected at least 0")

    def with_budget(self, products: int) -> Auto:
        return replace(self, max_steps=products, tol=0.0, dense=0)

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        tasks, n = operator.shape
        need = 4 * min(self.max_steps, n) * tasks * n * b.element_size()
        pairs, record = state.low_rank, state.record
        if n <= self.dense:
            solution, chosen = (
                Dense()._solve(operator, b, SolverState(), None),
                f"Dense: n = {n} ≤ {self.dense}",
            )
        elif need > self.memory:
            solution = CG(self.max_steps, self.tol, negative="minres")._solve(
                operator, b, state, None
            )
            chosen = f"CG: a basis of {need / 2**20:.0f} MiB is above {self.memory / 2**20:.0f} MiB"
        elif pairs is not None and record is not None:
            solution, chosen = self._recycled(operator, b, state, pairs, record)
        else:
            solution, chosen = self._lanczos(operator, b, state)
        return replace(solution, chosen=chosen)

    def _lanczos(
        self, operator: LinearOperator, b: Tensor, state: SolverState
    ) -> tuple[Solution, str]:
        sequence = state.solution is not None
        solution = Lanczos(self.max_steps, self.tol, recycle=sequence)._solve(
            operator, b, state, None
        )
        pairs, record = solution.state.low_rank, None
        if pairs is not None and bool(
            (pairs.inverse > 0).any()
        ):  # else every task is indefinite, or was solved before
            record = torch.tensor(
                [float(solution.residual.max()), int(solution.needed.max())]
            ).double()
        else:
            pairs = None
        left = self.max_steps - solution.products
        if left > 0:  # Lanczos is at the end of the precision, which CG corrects as it goes
            broken = solution.status == int(Status.BREAKDOWN)
            solution = (
                continue_with(solution, broken, CG(left, self.tol), operator, b)
                if broken.any()
                else solution
            )
            singular = broken & (solution.status == int(Status.NEGATIVE_CURVATURE))
            solution = replace(
                solution, status=torch.where(singular, int(Status.BREAKDOWN), solution.status)
            )
        why = f"Lanczos: n = {b.shape[1]} > {self.dense}" + (
            ", from the solution before" if sequence else ""
        )
        return replace(solution, state=SolverState(solution.value, pairs, record=record)), why

    def _recycled(
        self,
        operator: LinearOperator,
        b: Tensor,
        state: SolverState,
        known: LowRank,
        record: Tensor,
    ) -> tuple[Solution, str]:
        solution = conjugate_gradients(
            operator, b, state, lambda r: known.precondition(r, 0.0), self.max_steps, self.tol
        )
        bent, left = (
            solution.status == int(Status.NEGATIVE_CURVATURE),
            self.max_steps - solution.products,
        )
        if bent.any() and left > 0:
            solution = continue_with(solution, bent, Lanczos(left, self.tol), operator, b)
        reached, spent = record.tolist()
        worth = (
            float(solution.residual.max()) <= max(reached, self.tol)
            and int(solution.needed.max()) <= spent
        )
        if worth:
            solution = replace(
                solution, state=replace(solution.state, low_rank=known, record=record)
            )
        return solution, "CG on kept Ritz vectors, " + (
            "which still pay" if worth else "which pay no more"
        )
