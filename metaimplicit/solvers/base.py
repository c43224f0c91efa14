"""What a solve is: an operator and a right-hand side in; a value, a status, counts and a state for the next one out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.low_rank import LowRank

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolverState:
    """What makes the next solve of a nearby system cheaper. A solver reads the fields that it knows.

    Args:
        solution: x of the last solve, `[tasks, n]`.
        low_rank: A sketch of A, or its Ritz pairs.
        age: The number of solves that `low_rank` has served, a scalar tensor.
        record: The residual and the products of the solve that made the Ritz pairs, `[2]`.
        direction: Where a power iteration stands, `[tasks, n]`.

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
            values |= {
                f"low_rank.{name}": tensor for name, tensor in self.low_rank.to_dict().items()
            }
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
        """The same state with its vectors on a device."""
        return SolverState.from_dict(
            {name: t.to(device) if t.dim() > 1 else t for name, t in self.to_dict().items()}
        )


class Status(IntEnum):
    """How a task's solve ended."""

    CONVERGED = 0  # the residual met the tolerance, or the method is direct
    MAX_STEPS = 1  # steps, terms, rank or precision ran out before the tolerance was met
    NEGATIVE_CURVATURE = 2  # vᵀAv ≤ 0, to working precision, was met: A is not positive definite
    BREAKDOWN = 3  # the iteration diverges, A is singular or not symmetric, or the result is worse than zero
    NON_FINITE = 4  # NaN or Inf in the operator or the right-hand side


ADVICE = {
    Status.NEGATIVE_CURVATURE: (
        "the curvature is not positive definite; use curvature='gauss-newton', add damping= or a larger proximal "
        "strength, or solve it as it is with MINRES"
    ),
    Status.BREAKDOWN: (
        "it diverged, the matrix is singular or not symmetric, or the residual is above 1; add damping=, raise "
        "Nystrom's rank or rho, or give Neumann a smaller scale"
    ),
    Status.NON_FINITE: "NaN or Inf in the curvature or the outer gradient; look at the losses and the inner step size",
}


@dataclass(frozen=True)
class Solution:
    """The result of `Solver.solve`.

    Attributes:
        value: x ≈ A⁻¹b, `[tasks, n]`; NaN where the status is NON_FINITE, so that nothing trains on it.
        status: `[tasks]`, int64, members of `Status`.
        residual: ‖b − Ax‖/‖b‖ for each task, `[tasks]`; 0 where b = 0.
        products: operator products executed, each over all tasks.
        needed: `[tasks]`, the products each task needed before it ended.
        rayleigh: `[tasks]`, the smallest vᵀAv/vᵀv seen; +inf if none was.
        state: what makes the next solve of a system nearby cheaper: hand it to that solve, or save it.
        chosen: what `Auto` chose, and why.
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    products: int
    needed: Tensor
    rayleigh: Tensor
    state: SolverState = field(default_factory=SolverState)
    chosen: str = ""


class Solver(ABC):
    """A⁻¹b for each task. Leaves say how in `_solve`, for right-hand sides of norm one (or zero).

    A solver that approximates the core B of A = B + σI owns one damping ρ, added to σ; all others have none.
    """

    sketches: ClassVar[bool] = False  # whether it multiplies A by a batch of vectors, n at most

    def damping(self, sigma: float) -> float:
        """ρ as used beside a shift σ."""
        return 0.0

    def with_budget(self, products: int) -> Solver | None:
        """The same solver, which spends `products` ≥ 1 products with A whatever the residual.

        One product more may measure the residual. If None, a budget makes no sense for this solver.
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
            b: right-hand sides `[tasks, n]`; normalised before the solve, so their scale is immaterial.
            state: `Solution.state` of an earlier solve with this solver; A and b may have moved since.
            preconditioner: r ↦ P r, `[tasks, n] -> [tasks, n]`, P ≈ A⁻¹ symmetric positive definite; for solvers that
                take one.

        Raises:
            ValueError: `b` or the state is not of the operator's shape; a preconditioner for a solver that takes none.
        """
        if b.shape != operator.shape:
            raise ValueError(
                f"b: got shape {tuple(b.shape)}, expected {operator.shape}, the operator's"
            )
        peak = b.abs().amax(-1, keepdim=True)
        finite = peak.isfinite()
        safe = torch.where(finite & (peak > 0), peak, 1.0)
        scaled = torch.where(
            finite, b / safe, 0.0
        )  # by the peak first: the square of a tiny norm underflows
        norm = scaled.norm(dim=-1, keepdim=True)
        unit = scaled.div_(torch.where(norm > 0, norm, 1.0))
        if not isinstance(state, (SolverState, type(None))):
            raise ValueError(
                f"state: got {type(state).__name__}, expected a SolverState; SolverState.from_dict makes one of a dict"
            )
        given = SolverState() if state is None else state.to(b.device)
        if given.solution is not None:
            if given.solution.shape != b.shape:
                raise ValueError(
                    f"state: got a solution of shape {tuple(given.solution.shape)}, expected {tuple(b.shape)}; a state "
                    "fits the problem it came from"
                )
            given = replace(
                given, solution=given.solution / torch.where(norm > 0, norm * safe, 1.0)
            )
        solution = self._solve(operator, unit, given, preconditioner)
        finite = (
            finite
            & solution.residual.isfinite().unsqueeze(-1)
            & solution.value.isfinite().all(-1, keepdim=True)
        )
        value = torch.where(finite, solution.value * norm * safe, torch.nan)
        status = torch.where(finite.squeeze(-1), solution.status, int(Status.NON_FINITE))
        kept = solution.state
        if kept.solution is not None:
            kept = replace(kept, solution=value.nan_to_num())
        return replace(solution, value=value, status=status, state=kept)

    @abstractmethod
    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution: ...

    def _takes_no(self, preconditioner: Apply | None) -> None:
        if preconditioner is not None:
            raise ValueError(f"preconditioner: {type(self).__name__} takes none; use CG")


def check_limits(name: str, max_steps: int, tol: float) -> None:
    if max_steps < 1:
        raise ValueError(f"{name} max_steps: got {max_steps}, expected at least 1")
    if not tol >= 0:
        raise ValueError(f"{name} tol: got {tol}, expected a number ≥ 0")


def is_asymmetric(skew: Tensor, size: Tensor) -> Tensor:
    """Whether what is zero for a symmetric A is too large, beside `size`, to be round-off."""
    return skew.abs() > 0.05 * size


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each task, `[tasks, 1]`."""
    return (a * b).sum(-1, keepdim=True)


def rayleigh_quotient(v: Tensor, av: Tensor) -> Tensor:
    """vᵀAv/vᵀv, `[tasks]`; +inf where v = 0, NaN where A v is not finite."""
    vv = dot(v, v)
    quotient = dot(v, av) / torch.where(vv > 0, vv, 1.0)
    quotient = torch.where(quotient.isfinite(), quotient, torch.nan)
    return torch.where(vv > 0, quotient, torch.inf).squeeze(-1)


def warm_start(
    operator: LinearOperator, b: Tensor, state: SolverState
) -> tuple[Tensor, Tensor, int]:
    """(x, b − Ax, products): the last solution scaled to the smallest residual, so it is never worse than zero."""
    if state.solution is None:
        return torch.zeros_like(b), b, 0
    x = state.solution.to(b)
    ax = operator.matvec(x)
    square = dot(ax, ax)
    scale = torch.where(square > 0, dot(b, ax) / torch.where(square > 0, square, 1.0), 0.0)
    return scale * x, b - scale * ax, 1


def recompute_residual(
    operator: LinearOperator,
    b: Tensor,
    x: Tensor,
    residual: Tensor,
    doubtful: Tensor,
    products: int,
) -> tuple[Tensor, int]:
    """The recurrence of a residual drifts from b − Ax by round-off: one in doubt is measured before it is claimed."""
    if not doubtful.any():
        return residual, products
    return (b - operator.matvec(x)).norm(dim=-1, keepdim=True), products + 1


def direct_solution(
    operator: LinearOperator, b: Tensor, x: Tensor, products: int, rayleigh: Tensor | None = None
) -> Solution:
    """The solution of a method without iterations, its residual measured by one product more."""
    ax = operator.matvec(x)
    seen = rayleigh_quotient(x, ax)
    status = torch.full((len(b),), int(Status.CONVERGED), device=b.device)
    return Solution(
        value=x,
        status=status,
        residual=(b - ax).norm(dim=-1),
        products=products + 1,
        needed=torch.full_like(status, products + 1),
        rayleigh=seen if rayleigh is None else torch.minimum(seen, rayleigh),
    )
