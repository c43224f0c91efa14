"""The solver that chooses among the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.operators import Invertible
from metaimplicit.options import option
from metaimplicit.solvers.base import LinearSystem, Solution, Solver, SolverState
from metaimplicit.solvers.cg import CG
from metaimplicit.solvers.conjugate_gradients import conjugate_gradients
from metaimplicit.solvers.dense import Dense
from metaimplicit.solvers.factored import Factored
from metaimplicit.solvers.iteration import check_limits
from metaimplicit.solvers.lanczos import Lanczos
from metaimplicit.solvers.low_rank import LowRank
from metaimplicit.solvers.status import Status

MIB = 2**20


@dataclass(frozen=True)
class Auto(Solver):
    """Choose a solver by size, memory and the residuals so far. `Solution.chosen` says which.

    - `Factored` if the inner loop left the inverse of A (`Ridge`, `Newton`). It takes no products.
    - `Dense` if n ≤ `dense`.
    - `CG` if Lanczos's basis would exceed `memory`, and `MINRES` from where CG meets negative
      curvature.
    - `Lanczos` otherwise, definite or not, and CG from where the precision stops it.

    Given the state of an earlier solve, Lanczos starts from its solution and keeps its Ritz
    vectors. From then on these precondition CG (Krylov recycling, Parks et al. 2006), and Lanczos
    continues the tasks where CG meets negative curvature. The Ritz vectors are reused until a solve
    needs more products, or ends with a larger residual, than the solve that produced them.

    Args:
        max_steps: Steps at most, ≥ 1, counted as `Lanczos` counts them, unless the solve is dense.
        tol: The relative residual at which a task has converged, ≥ 0.
        dense: The largest n for a dense solve of n products in batches. If 0, none is dense.
        memory: The bytes that a basis may take at its peak, where there are four copies of it.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> solution = Auto().solve(Identity(b, scale=2.0), b)
        >>> solution.value, solution.chosen
        (tensor([[0.5000, 1.0000]]), 'Dense: n = 2 ≤ 256')
    """

    max_steps: int = option(5, flag="solver_steps")
    tol: float = 1e-6
    dense: int = 256
    memory: int = 2**30

    def __post_init__(self) -> None:
        check_limits("Auto", self.max_steps, self.tol)
        for name in ("dense", "memory"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"Auto {name}: got {value}, expected at least 0")

    def with_budget(self, products: int) -> Auto:
        """The same solver with this many products, none of them dense."""
        return replace(self, max_steps=products, tol=0.0, dense=0)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        core, shift = system.operator.split()
        if isinstance(core, Invertible) and core.closed_form and shift > 0:
            solution = Factored().solve_unit(system)
            return replace(solution, chosen="Factored: the inner loop left its inverse")

        tasks, n = system.operator.shape
        if n <= self.dense:
            solution = Dense().solve_unit(replace(system, state=SolverState()))
            return replace(solution, chosen=f"Dense: n = {n} ≤ {self.dense}")

        basis = 4 * min(self.max_steps, n) * tasks * n * system.b.element_size()
        if basis > self.memory:
            cg = CG(self.max_steps, self.tol, negative="minres")
            chosen = f"CG: a basis of {basis / MIB:.0f} MiB is above {self.memory / MIB:.0f} MiB"
            return replace(cg.solve_unit(system), chosen=chosen)

        low_rank = system.state.low_rank
        record = system.state.record
        if low_rank is not None and record is not None:
            return self._solve_recycling(system, low_rank, record)
        return self._solve_by_lanczos(system)

    def _solve_by_lanczos(self, system: LinearSystem) -> Solution:
        in_sequence = system.state.solution is not None
        lanczos = Lanczos(self.max_steps, self.tol, recycle=in_sequence)
        solution = lanczos.solve_unit(system)
        low_rank = solution.state.low_rank
        record = None
        if low_rank is not None and bool((low_rank.inverse > 0).any()):
            record = _record(solution)
        else:  # every task is indefinite, or was solved before
            low_rank = None

        # Lanczos has reached the end of the precision. CG corrects itself as it goes.
        broken = solution.status == int(Status.BREAKDOWN)
        left = self.max_steps - solution.products
        if left > 0 and broken.any():
            solution = CG(left, self.tol).continue_from(system, solution, broken)
            singular = broken & (solution.status == int(Status.NEGATIVE_CURVATURE))
            status = torch.where(singular, int(Status.BREAKDOWN), solution.status)
            solution = replace(solution, status=status)

        chosen = f"Lanczos: n = {system.b.shape[1]} > {self.dense}"
        if in_sequence:
            chosen += ", from the last solution"
        state = SolverState(solution.value, low_rank, record=record)
        return replace(solution, state=state, chosen=chosen)

    def _solve_recycling(
        self,
        system: LinearSystem,
        low_rank: LowRank,
        record: Tensor,
    ) -> Solution:
        def precondition(r: Tensor) -> Tensor:
            return low_rank.precondition(r, 0.0)

        preconditioned = replace(system, preconditioner=precondition)
        solution = conjugate_gradients(preconditioned, self.max_steps, self.tol)
        indefinite = solution.status == int(Status.NEGATIVE_CURVATURE)
        left = self.max_steps - solution.products
        if left > 0 and indefinite.any():
            solution = Lanczos(left, self.tol).continue_from(system, solution, indefinite)

        residual, products = _record(solution).tolist()
        first_residual, first_products = record.tolist()
        chosen = "CG with recycled Ritz vectors, "
        as_accurate = residual <= max(first_residual, self.tol)
        if not as_accurate or products > first_products:
            return replace(solution, chosen=chosen + "which are dropped")
        state = replace(solution.state, low_rank=low_rank, record=record)
        return replace(solution, state=state, chosen=chosen + "which are kept")


def _record(solution: Solution) -> Tensor:
    """The largest residual of a task, and the most products that a task needed, `[2]`, float64."""
    numbers = [float(solution.residual.max()), int(solution.needed.max())]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
