"""Gradient descent on the linear system, a few steps from where the last solve ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.options import option
from metaimplicit.solvers.arithmetic import (
    divisor,
    norm,
    rayleigh_quotient,
)
from metaimplicit.solvers.base import LinearSystem, Solution, Solver, SolverState
from metaimplicit.solvers.iteration import final_status
from metaimplicit.solvers.power_iteration import largest_eigenvalue
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class Richardson(Solver):
    """x ← x + s(b − Ax): K steps of gradient descent on ½xᵀAx − bᵀx, from the last solution.

    It is the linear half of stochastic bilevel optimisation, where every call takes A and b from
    another minibatch and x moves along. One step a call is SOBA (Dagréou et al. 2022, eq. 5); see
    `OneStep`. A few steps a call are AmIGO (Arbel & Mairal 2022). From zero, K steps are K terms of
    the Neumann series, and one step, x = sb, takes A for the identity over s: T1–T2 (Luketina et
    al. 2016). It converges if 0 < s < 2/λ_max(A) and A is positive definite, and does not stop
    where it diverges.

    Args:
        steps: K ≥ 1, with one product each, except that the first step from zero takes none. One
            product more gives the residual.
        scale: s > 0. If None, it is 1/λ̂ with λ̂ from a power iteration. The first call takes five
            products for it; later calls continue it with one product each.
        warm: Whether to start from the state. If False, every solve starts from zero.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> solver = Richardson(scale=0.5)
        >>> first = solver.solve(Identity(b), b)
        >>> second = solver.solve(Identity(b), b, state=first.state)
        >>> first.value, second.value
        (tensor([[0.5000, 0.0000]]), tensor([[0.7500, 0.0000]]))
    """

    steps: int = option(1, flag="solver_steps")
    scale: float | None = None
    warm: bool = True

    takes_asymmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("Richardson steps", self.steps)
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Richardson scale: got {self.scale}, expected a number > 0")

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        b = system.b
        scale, products, direction = self._scale(system)
        rayleigh = torch.full_like(b[:, :1], torch.inf)
        steps = self.steps
        if self.warm and system.state.solution is not None:
            x = system.state.solution.to(b)
        else:
            x = scale * b  # the first step from zero
            steps -= 1

        for _ in range(steps):
            ax = system.operator.matvec(x)
            rayleigh = torch.minimum(rayleigh, rayleigh_quotient(x, ax))
            x = x + scale * (b - ax)
        ax = system.operator.matvec(x)
        rayleigh = torch.minimum(rayleigh, rayleigh_quotient(x, ax))
        residual = norm(b - ax)

        exceptions = {
            Status.BREAKDOWN: residual > 1,
            Status.NEGATIVE_CURVATURE: rayleigh <= 0,
        }
        status = final_status(residual, torch.finfo(b.dtype).eps ** 0.5, exceptions).squeeze(-1)
        products += steps + 1
        return Solution(
            value=x,
            status=status,
            residual=residual.squeeze(-1),
            products=products,
            needed=torch.full_like(status, products),
            rayleigh=rayleigh.squeeze(-1),
            state=SolverState(solution=x, direction=direction),
        )

    def _scale(self, system: LinearSystem) -> tuple[float | Tensor, int, Tensor | None]:
        """The scale s, the products that it took, and the vector for the next call."""
        if self.scale is not None:
            return self.scale, 0, None
        if system.state.direction is None:
            start = system.b
            steps = 5
            random_part = 1.0
        else:
            start = system.state.direction.to(system.b)
            steps = 1
            random_part = 0.1
        size, direction = largest_eigenvalue(
            system.operator,
            start,
            steps,
            random_part=random_part,
        )
        return 1 / divisor(size), steps, direction


@dataclass(frozen=True)
class OneStep(Richardson):
    """x ← x + s(b − Ax), once: SOBA, or from zero T1–T2.

    Args:
        scale: s > 0. If None, it is found as by `Richardson`.
        warm: Whether to start from the state. If False, x = sb.

    Raises:
        ValueError: The scale is out of range.

    Example:
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> from metaimplicit.operators import Identity
        >>> OneStep(scale=0.5, warm=False).solve(Identity(b), b).value
        tensor([[0.5000, 0.0000]])
    """

    steps: int = field(default=1, init=False, repr=False)
