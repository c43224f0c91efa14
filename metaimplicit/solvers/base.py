"""What a solver is: it takes a linear system, and returns a value, a status, counts and a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.low_rank import LowRank
from metaimplicit.solvers.normalise import NormalisedRHS
from metaimplicit.solvers.status import Status
from metaimplicit.solvers.widened import HALF, Widened

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolverState:
    """What makes the next solve of a nearby system cheaper.

    A solver reads the fields that it knows.

    Args:
        solution: x of the last solve, `[tasks, n]`.
        low_rank: A sketch of A, or its Ritz pairs.
        age: The number of solves that `low_rank` has served, a scalar tensor.
        record: The residual and the products of the solve that made the Ritz pairs, `[2]`.
        direction: The last vector of a power iteration, `[tasks, n]`.

    Example:
        >>> state = SolverState(solution=torch.ones(1, 2))
        >>> SolverState.from_dict(state.to_dict()).solution
        tensor([[1., 1.]])
    """

    solution: Tensor | None = None
    low_rank: LowRank | None = None
    age: Tensor | None = None
    record: Tensor | None = None
    direction: Tensor | None = None

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "low_rank"}
        if self.low_rank is not None:
            pairs = self.low_rank.to_dict()
            values |= {f"low_rank.{name}": tensor for name, tensor in pairs.items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Tensor]) -> SolverState:
        """The inverse of `to_dict`.

        Raises:
            ValueError: `stored` has a name that no state has.
        """
        plain = {name: value for name, value in stored.items() if not name.startswith("low_rank.")}
        unknown = sorted(set(plain) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"state: got {unknown[0]!r}, expected the entries of SolverState.to_dict()"
            )
        pairs = {
            name.removeprefix("low_rank."): value
            for name, value in stored.items()
            if name not in plain
        }
        return cls(**plain, low_rank=LowRank(**pairs) if pairs else None)

    def to(self, device: torch.device) -> SolverState:
        """The same state with its vectors on a device. `age` and `record` stay where they are."""
        return replace(
            self,
            solution=None if self.solution is None else self.solution.to(device),
            low_rank=None if self.low_rank is None else self.low_rank.to(device),
            direction=None if self.direction is None else self.direction.to(device),
        )


@dataclass(frozen=True)
class Solution:
    """The result of `Solver.solve`.

    Attributes:
        value: x ≈ A⁻¹b, `[tasks, n]`. It is NaN where the status is NON_FINITE, so that nothing
            trains on it.
        status: Members of `Status`, `[tasks]`, int64.
        residual: ‖b − Ax‖/‖b‖ for each task, `[tasks]`. It is 0 where b is 0 or not finite.
        products: The operator products that were executed, each over all tasks.
        needed: The products that each task needed before it ended, `[tasks]`.
        rayleigh: The smallest vᵀAv/vᵀv that was seen, `[tasks]`. It is +inf if none was.
        state: What makes the next solve of a nearby system cheaper. Pass it to that solve, or save
            it.
        chosen: What `Auto` chose, and why. It is empty for the other solvers.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> from metaimplicit.solvers import CG
        >>> solution = CG().solve(Identity(torch.ones(1, 2), scale=2.0), torch.ones(1, 2))
        >>> solution.value, Status(int(solution.status)).name
        (tensor([[0.5000, 0.5000]]), 'CONVERGED')
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    products: int
    needed: Tensor
    rayleigh: Tensor
    state: SolverState = field(default_factory=SolverState)
    chosen: str = ""


@dataclass(frozen=True)
class LinearSystem:
    """A x = b as `Solver.solve_unit` receives it.

    Args:
        operator: A, symmetric, shape `(tasks, n)`.
        b: Right-hand sides of norm one or zero, `[tasks, n]`.
        state: What an earlier solve left, scaled to this b.
        preconditioner: r ↦ P r with P ≈ A⁻¹, or None.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> LinearSystem(Identity(b, scale=2.0), b).operator.matvec(b)
        tensor([[2., 0.]])
    """

    operator: LinearOperator
    b: Tensor
    state: SolverState = field(default_factory=SolverState)
    preconditioner: Apply | None = None


class Solver(ABC):
    """A⁻¹b for each task, where A is known by its products alone.

    Subclasses are frozen dataclasses that implement `solve_unit`. A new solver is one file, one
    export, and one row of `METHODS`.

    Attributes:
        takes_preconditioner: Whether `solve` accepts a preconditioner.
        takes_asymmetric: Whether A may be asymmetric.
        widens: Whether systems in half precision are solved with vectors in single precision.
        sketches: Whether it multiplies A by a batch of vectors, n at most.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> from metaimplicit.solvers import CG
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> solution = CG().solve(Identity(b, scale=2.0), b)
        >>> solution.value, Status(int(solution.status))
        (tensor([[0.5000, 1.0000]]), <Status.CONVERGED: 0>)
    """

    takes_preconditioner: ClassVar[bool] = False
    sketches: ClassVar[bool] = False
    takes_asymmetric: ClassVar[bool] = False
    widens: ClassVar[bool] = True

    def damping(self, sigma: float) -> float:
        """The damping ρ that this solver adds to σ, for A = B + σI. Most solvers add none."""
        return 0.0

    def with_budget(self, products: int) -> Solver | None:
        """The same solver with a budget of `products` ≥ 1 products with A and no tolerance.

        One product more may give the residual. If None, a budget makes no sense for this solver.
        """
        return None

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        *,
        state: SolverState | None = None,
        preconditioner: Apply | None = None,
    ) -> Solution:
        """Solve A x = b.

        Args:
            operator: A, symmetric, shape `(tasks, n)`.
            b: Right-hand sides, `[tasks, n]`. They are normalised before the solve, so their scale
                does not matter. Where b = 0, so is x. If n = 0, there is nothing to solve.
            state: `Solution.state` of an earlier solve with this solver. A and b may have changed
                since. If None, the solve starts from zero.
            preconditioner: r ↦ P r, `[tasks, n] -> [tasks, n]`, with P ≈ A⁻¹ symmetric positive
                definite, for solvers that take one. It leaves r as it is.

        Raises:
            ValueError: `operator` or `b` is of another kind, `b` does not have the shape and the
                type of the operator, the state does not have its shape, or this solver takes no
                preconditioner.
        """
        if not isinstance(operator, LinearOperator):
            raise ValueError(
                f"operator: got {type(operator).__name__}, expected a LinearOperator; write a "
                "subclass with `matvec`"
            )
        if not isinstance(b, Tensor) or not b.is_floating_point():
            got = b.dtype if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(
                f"b: got {got}, expected a tensor of real floating-point numbers, [tasks, n]"
            )
        if b.shape != operator.shape:
            raise ValueError(
                f"b: got shape {tuple(b.shape)}, expected {operator.shape}, the operator's"
            )
        if preconditioner is not None and not self.takes_preconditioner:
            raise ValueError(f"preconditioner: {type(self).__name__} takes none; use CG")
        if operator.dtype in HALF and self.widens:
            wide = Widened(operator)
            solution = self.solve(
                wide,
                b.float(),
                state=state,
                preconditioner=wide.widen(preconditioner),
            )
            return replace(solution, value=solution.value.to(b.dtype))
        if b.dtype != operator.dtype:
            raise ValueError(
                f"b: got {b.dtype}, expected {operator.dtype}, the operator's; convert one of them"
            )
        if b.shape[1] == 0:
            return _nothing_solved(b)
        rhs = NormalisedRHS.of(b)
        start = _checked(state, b)
        if start.solution is not None:
            start = replace(start, solution=rhs.scale(start.solution))
        system = LinearSystem(
            operator,
            rhs.unit,
            state=start,
            preconditioner=preconditioner,
        )
        solution = self.solve_unit(system)

        finite = rhs.finite & solution.residual.isfinite().unsqueeze(-1)
        finite = finite & solution.value.isfinite().all(-1, keepdim=True)
        value = torch.where(finite, rhs.unscale(solution.value), torch.nan)
        status = torch.where(finite.squeeze(-1), solution.status, int(Status.NON_FINITE))
        end = solution.state
        if end.solution is not None:
            end = replace(end, solution=value.nan_to_num())
        return replace(solution, value=value, status=status, state=end)

    @abstractmethod
    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve A x = b for right-hand sides of norm one or zero.

        `solve` checks the shapes, scales b and the result, and flags results that are not finite.
        """

    def continue_from(
        self,
        system: LinearSystem,
        solution: Solution,
        where: Tensor,
    ) -> Solution:
        """Continue the tasks in `where` with this solver, started from another solver's solution.

        A task keeps its old result if the new residual is larger.

        Args:
            system: The system. Its preconditioner is not used.
            solution: What the other solver's `solve_unit` returned.
            where: `[tasks]`, bool.
        """
        start = SolverState(solution=solution.value)
        other = self.solve_unit(replace(system, state=start, preconditioner=None))
        better = where & ~(other.residual > solution.residual)  # or NaN, which must not be hidden
        value = torch.where(better.unsqueeze(-1), other.value, solution.value)
        return Solution(
            value=value,
            status=torch.where(better, other.status, solution.status),
            residual=torch.where(better, other.residual, solution.residual),
            products=solution.products + other.products,
            needed=solution.needed + torch.where(where, other.needed, 0),
            rayleigh=torch.minimum(solution.rayleigh, other.rayleigh),
            state=SolverState(solution=value),
        )


def _nothing_solved(b: Tensor) -> Solution:
    """The solution of systems without unknowns, for b of shape `[tasks, 0]`."""
    zero = b.new_zeros(len(b))
    return Solution(
        value=b,
        status=torch.full_like(zero, int(Status.CONVERGED), dtype=torch.int64),
        residual=zero,
        products=0,
        needed=torch.zeros_like(zero, dtype=torch.int64),
        rayleigh=torch.full_like(zero, torch.inf),
    )


def _checked(state: SolverState | None, b: Tensor) -> SolverState:
    if state is None:
        return SolverState()
    if not isinstance(state, SolverState):
        raise ValueError(
            f"state: got {type(state).__name__}, expected a SolverState; SolverState.from_dict "
            "makes one from a dict"
        )
    if state.solution is not None and state.solution.shape != b.shape:
        raise ValueError(
            f"state: got a solution of shape {tuple(state.solution.shape)}, expected "
            f"{tuple(b.shape)}; a state fits the problem it came from"
        )
    return state.to(b.device)
