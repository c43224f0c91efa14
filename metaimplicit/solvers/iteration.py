"""What the iterative solvers share: their start, which tasks are active, and how a task ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.solvers.arithmetic import divisor, dot, norm
from metaimplicit.solvers.base import LinearSystem, Solution, SolverState
from metaimplicit.solvers.status import Status


@dataclass
class Progress:
    """Which tasks are still active, and what the iteration has counted and seen so far.

    Attributes:
        active: Whether a task still iterates, `[tasks, 1]`.
        needed: The products that each task needed, `[tasks, 1]`.
        rayleigh: The smallest vᵀAv/vᵀv that was seen for each task, `[tasks, 1]`.
        products: The products that were executed, each over all tasks.

    Example:
        >>> progress = Progress.start(torch.tensor([[1.0], [0.0]]), tol=1e-6, products=0)
        >>> progress.active.tolist()
        [[True], [False]]
        >>> progress.stop(torch.tensor([[True], [False]]))
        >>> all_ended(progress.active, step=0)
        True
    """

    active: Tensor
    needed: Tensor
    rayleigh: Tensor
    products: int

    @classmethod
    def start(
        cls,
        residual: Tensor,
        tol: float,
        products: int,
    ) -> Progress:
        """The progress before the first step. Tasks above the tolerance are active.

        Args:
            residual: ‖b − Ax‖, `[tasks, 1]`.
            tol: The residual at which a task has converged.
            products: The products that were executed so far.
        """
        return cls(
            active=residual > tol,
            needed=torch.full_like(residual, products, dtype=torch.int64),
            rayleigh=torch.full_like(residual, torch.inf),
            products=products,
        )

    def multiply(self, system: LinearSystem, v: Tensor) -> Tensor:
        """A v, `[tasks, n]`, by one product, which every active task needs."""
        self.products += 1
        self.needed = self.needed + self.active
        return system.operator.matvec(v)

    def record_quotient(self, quotient: Tensor) -> None:
        """Take the minimum with the quotients vᵀAv/vᵀv `[tasks, 1]` of the active tasks."""
        seen = torch.where(self.active, quotient, torch.inf)
        self.rayleigh = torch.minimum(self.rayleigh, seen)

    def stop(self, where: Tensor) -> None:
        """End the tasks in `where`, `[tasks, 1]`."""
        self.active = self.active & ~where

    def recompute_residual(
        self, system: LinearSystem, x: Tensor, residual: Tensor, *, doubtful: Tensor
    ) -> Tensor:
        """‖b − Ax‖ of all tasks, `[tasks, 1]`, if one is doubtful. Otherwise `residual` itself.

        Round-off makes the recurrence of a residual drift from b − Ax. So one that is small, or
        that the drift may have reached, is computed by one product more before it is reported.
        """
        if not doubtful.any():
            return residual
        self.products += 1
        return norm(system.b - system.operator.matvec(x))

    def solution(
        self, x: Tensor, residual: Tensor, status: Tensor, state: SolverState | None = None
    ) -> Solution:
        """The result of a solve, from residuals and statuses `[tasks, 1]`.

        If `state` is None, it holds x.
        """
        # The quotient is NaN if a product was not finite.
        residual = torch.where(self.rayleigh.isnan(), torch.nan, residual)
        return Solution(
            value=x,
            status=status.squeeze(-1),
            residual=residual.squeeze(-1),
            products=self.products,
            needed=self.needed.squeeze(-1),
            rayleigh=self.rayleigh.squeeze(-1),
            state=SolverState(solution=x) if state is None else state,
        )


def all_ended(active: Tensor, step: int) -> bool:
    """Whether no task is active any more.

    On CUDA a look at `active` waits for the device, so only every eighth step takes one. Steps
    past the end change nothing, as the loops mask tasks that are not active.

    Args:
        active: A mask, of any shape.
        step: The number of the step, from 0.

    Example:
        >>> all_ended(torch.tensor([[False]]), step=0)
        True
    """
    check_every = 8 if waits_to_read(active) else 1
    return step % check_every == 0 and not bool(active.any())


def waits_to_read(x: Tensor) -> bool:
    """Whether the program waits for a device when it reads the values of a tensor.

    Example:
        >>> waits_to_read(torch.zeros(2))
        False
    """
    return x.is_cuda


def warm_start(system: LinearSystem) -> tuple[Tensor, Tensor, int]:
    """Where an iteration starts.

    It is the multiple of the last solution with the smallest residual, so never worse than zero.

    Returns:
        x and b − Ax, both `[tasks, n]`, and the number of products they took: 0 without a state.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> warm_start(LinearSystem(Identity(b), b, SolverState(solution=5 * b)))
        (tensor([[1., 0.]]), tensor([[0., 0.]]), 1)
    """
    b = system.b
    if system.state.solution is None:
        return torch.zeros_like(b), b, 0
    x = system.state.solution.to(b)
    ax = system.operator.matvec(x)
    # ‖b − cAx‖ is smallest at c = bᵀAx/‖Ax‖².
    square = dot(ax, ax)
    c = torch.where(square > 0, dot(b, ax) / divisor(square), 0.0)
    return c * x, b - c * ax, 1


def final_status(
    residual: Tensor,
    tol: float,
    exceptions: Mapping[Status, Tensor],
) -> Tensor:
    """CONVERGED where the residual is within the tolerance, and MAX_STEPS elsewhere.

    Args:
        residual: Relative residuals, of any shape.
        tol: The tolerance.
        exceptions: For other statuses, where they hold instead. Later entries win.

    Example:
        >>> diverged = torch.tensor([False, True])
        >>> final_status(torch.tensor([0.0, 9.0]), 0.1, {Status.BREAKDOWN: diverged})
        tensor([0, 3])
    """
    status = torch.where(residual <= tol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    for exception, where in exceptions.items():
        status = torch.where(where, int(exception), status)
    return status


def is_asymmetric(skew: Tensor, size: Tensor) -> Tensor:
    """Whether a number that is zero for a symmetric A is too large to be round-off.

    Args:
        skew: The number.
        size: The size of the terms that cancel in it for a symmetric A.

    Example:
        >>> is_asymmetric(torch.tensor([0.01, -0.1]), size=torch.tensor(1.0))
        tensor([False,  True])
    """
    return skew.abs() > 0.05 * size


def check_limits(name: str, max_steps: int, tol: float) -> None:
    """Raise ValueError if the limits of the solver `name` are out of range.

    Example:
        >>> check_limits("CG", max_steps=0, tol=1e-6)
        Traceback (most recent call last):
        ValueError: CG max_steps: got 0, expected at least 1
    """
    check_count(f"{name} max_steps", max_steps)
    if not tol >= 0:
        raise ValueError(f"{name} tol: got {tol}, expected a number ≥ 0")
