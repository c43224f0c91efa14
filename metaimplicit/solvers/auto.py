"""The solver that chooses among the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import Apply, Solution, Solver, State, Status, check_limits
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

    max_steps: int = 10
    tol: float = 1e-6
    dense: int = 256
    memory: int = 2**30

    def __post_init__(self) -> None:
        check_limits("Auto", self.max_steps, self.tol)
        for name in ("dense", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"Auto {name}: got {getattr(self, name)}, expected at least 0")

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: State, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        tasks, n = operator.shape
        need = 4 * min(self.max_steps, n) * tasks * n * b.element_size()
        if n <= self.dense:
            solution, chosen = (
                Dense()._solve(operator, b, {}, None),
                f"Dense: n = {n} ≤ {self.dense}",
            )
        elif need > self.memory:
            solution = CG(self.max_steps, self.tol, negative="minres")._solve(
                operator, b, state, None
            )
            chosen = f"CG: a basis of {need / 2**20:.0f} MiB is above {self.memory / 2**20:.0f} MiB"
        elif "made" in state:
            solution, chosen = self._recycled(operator, b, state)
        else:
            solution, chosen = self._lanczos(operator, b, state)
        return replace(solution, chosen=chosen)

    def _lanczos(self, operator: LinearOperator, b: Tensor, state: State) -> tuple[Solution, str]:
        sequence = "value" in state
        solution = Lanczos(self.max_steps, self.tol, recycle=sequence)._solve(
            operator, b, state, None
        )
        kept = {name: tensor for name, tensor in solution.state.items() if name != "value"}
        if kept and bool(
            (kept["inverse"] > 0).any()
        ):  # else every task is indefinite, or was solved before
            kept["made"] = torch.tensor(
                [float(solution.residual.max()), int(solution.needed.max())]
            ).double()
        else:
            kept = {}
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
        return replace(solution, state={"value": solution.value, **kept}), why

    def _recycled(self, operator: LinearOperator, b: Tensor, state: State) -> tuple[Solution, str]:
        kept = {name: state[name] for name in ("basis", "inverse", "rayleigh", "made")}
        known = LowRank(kept["basis"], kept["inverse"], kept["rayleigh"])
        solution = conjugate_gradients(
            operator, b, state, lambda r: known.precondition(r, 0.0), self.max_steps, self.tol
        )
        bent, left = (
            solution.status == int(Status.NEGATIVE_CURVATURE),
            self.max_steps - solution.products,
        )
        if bent.any() and left > 0:
            solution = continue_with(solution, bent, Lanczos(left, self.tol), operator, b)
        reached, spent = kept["made"].tolist()
        worth = (
            float(solution.residual.max()) <= max(reached, self.tol)
            and int(solution.needed.max()) <= spent
        )
        solution = replace(solution, state={**solution.state, **(kept if worth else {})})
        return solution, "CG on kept Ritz vectors, " + (
            "which still pay" if worth else "which pay no more"
        )
