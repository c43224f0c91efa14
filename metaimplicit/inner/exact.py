"""Inner loops that end at the argmin of a linear head, wherever they start."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory, gradient_norm
from metaimplicit.inner.convex_losses import ConvexLoss, SquaredError
from metaimplicit.inner.head_curvature import HeadHessian, HeadLayout, solve
from metaimplicit.inner.head_objective import HeadObjective
from metaimplicit.inner.linear_head import LinearHead
from metaimplicit.iterate import OptimizerState
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params, detached
from metaimplicit.problem import Stream
from metaimplicit.solvers.iteration import all_ended

SUFFICIENT_DECREASE = 1e-4  # of a damped step, as a share of what its slope promises
STEP_SIZES = 30  # a damped step is 2⁻ʲ of the full one, j < 30


class Minimum(NamedTuple):
    """What an exact loop finds.

    Attributes:
        end: V*, `[tasks, k, outputs]`, without a graph.
        steps: The number of steps of each task, `[tasks]`.
        factors: The Cholesky factors at V* that it has, by their shift.
    """

    end: Tensor
    steps: Tensor
    factors: dict[float, Tensor]


class ExactLoop(InnerLoop):
    """A loop that ends at the argmin of a `LinearHead`, for all tasks at once.

    To those who count steps it is one, from θ_0 to the argmin. `Trajectory.steps` counts its own.
    It serves implicit methods and `Unrolled`. It leaves its Hessian, which knows its own inverse:
    the solver `Auto` takes that inverse, and other solvers multiply by the Hessian in closed form.
    """

    exact: ClassVar[bool] = True
    problem: LiftedProblem | None

    def bound_to(self, problem: LiftedProblem) -> InnerLoop:
        """The loop for this problem, whose inner loss is a `LinearHead`.

        Raises:
            ValueError: The inner loss is no `LinearHead`, or has a loss that this loop does not
                minimise. The data are a `Stream`.
        """
        self.check_loss(self._head_of(problem).convex_loss)
        if isinstance(problem.data, Stream):
            name = type(self).__name__
            raise ValueError(f"{name}: got a Stream, expected data that stay; pass one batch")
        return self.updated(problem=problem)

    def run(
        self,
        loss: StepLoss,
        start: Params,
        meta: Params,
        *,
        differentiated_steps: int,
        keep_iterates: bool = False,
        state: OptimizerState | None = None,
    ) -> Trajectory:
        """Run the loop; see `InnerLoop.run`. What is differentiated is the argmin."""
        name = type(self).__name__
        if self.problem is None:
            raise ValueError(f"{name}: got no problem to minimise; call bound_to(problem)")
        if differentiated_steps and keep_iterates:
            raise ValueError(
                f"{name}: got a method that differentiates all iterates, expected one that "
                "differentiates the argmin, such as 'auto' or 'unrolled'"
            )
        head = self._head_of(self.problem)
        objective = HeadObjective.of(self.problem, head, start, meta)
        layout = HeadLayout(start, head.weight, head.bias)

        constants = objective.detach()
        with torch.no_grad():
            minimum = self.minimise(constants, layout.to_matrix(detached(start)))
            end = minimum.end
            hessian = HeadHessian(constants.curvature(end), layout, minimum.factors)
        params = layout.to_params(self.argmin(objective, end) if differentiated_steps else end)
        return Trajectory(
            params,
            minimum.steps,
            gradient_norm(loss, params),
            iterates=(start, params) if keep_iterates else (),
            curvature=hessian,
        )

    def with_steps(self, steps: int) -> InnerLoop:
        """The loop itself, since it ends at the argmin."""
        return self

    def _head_of(self, problem: LiftedProblem) -> LinearHead:
        head = problem.problem.inner_loss
        if not isinstance(head, LinearHead):
            raise ValueError(
                f"{type(self).__name__}: got an inner loss of type {type(head).__name__}, expected "
                "a LinearHead; use NewtonCG or LBFGS for other losses"
            )
        return head

    @abstractmethod
    def check_loss(self, loss: ConvexLoss) -> None:
        """Raise ValueError if this loop does not minimise a head with this loss."""

    @abstractmethod
    def minimise(self, objective: HeadObjective, start: Tensor) -> Minimum:
        """The argmin of an objective without a graph, from V_0 = `start`."""

    @abstractmethod
    def argmin(self, objective: HeadObjective, minimum: Tensor) -> Tensor:
        """V* as a function of what `objective` depends on, with its graph.

        Args:
            objective: The objective.
            minimum: V*, without a graph.
        """


@dataclass(frozen=True)
class Ridge(ExactLoop):
    """Ridge regression in closed form (Bertinetto et al. 2019, eq. 6).

        V* = (RᵀR + λI)⁻¹ Rᵀ y = Rᵀ (RRᵀ + λI)⁻¹ y

    The smaller of the two matrices is factorised, once for all tasks and outputs.

    Args:
        problem: The lifted problem that the loop is bound to; see `bound_to`.

    Raises:
        ValueError: On a run: the inner loss is no `LinearHead` with `SquaredError`.

    Example:
        >>> from metaimplicit import argmin
        >>> from metaimplicit.inner import LinearHead, SquaredError
        >>> head = LinearHead(
        ...     features=lambda meta, x: x,
        ...     targets=lambda meta, x: torch.ones(1, 1),
        ...     loss=SquaredError(),
        ...     strength=1.0,
        ...     bias=None,
        ... )
        >>> x = torch.tensor([[2.0]])
        >>> argmin(
        ...     head,
        ...     init=lambda meta, x: {"weight": torch.zeros(1, 1)},
        ...     meta={"unused": torch.zeros(())},
        ...     data=x,
        ...     inner=Ridge(),
        ...     method="auto",
        ... )["weight"]  # 2/(2² + 1)
        tensor([[0.4000]])
    """

    problem: LiftedProblem | None = field(default=None, repr=False, compare=False)
    steps: int = field(default=1, init=False, repr=False)
    tol: float | None = field(default=None, init=False, repr=False)

    def check_loss(self, loss: ConvexLoss) -> None:
        """Raise ValueError unless the loss is `SquaredError`."""
        if not isinstance(loss, SquaredError):
            raise ValueError(
                f"Ridge: got a LinearHead with {type(loss).__name__}, expected SquaredError; "
                "use Newton"
            )

    def minimise(self, objective: HeadObjective, start: Tensor) -> Minimum:
        """The closed form, with its factor."""
        end, factor = _ridge(objective)
        steps = torch.ones(len(start), dtype=torch.int64, device=start.device)
        return Minimum(end, steps, {float(objective.strength): factor})

    def argmin(self, objective: HeadObjective, minimum: Tensor) -> Tensor:
        """The closed form, which can be differentiated any number of times."""
        return _ridge(objective)[0]


@dataclass(frozen=True)
class Newton(ExactLoop):
    """Newton's method on a linear head with any `ConvexLoss`: V_{t+1} = V_t − s A⁻¹ ∂f/∂V.

    A is factorised in the span of the support features if that is the smaller matrix, so that it
    has the size shots × ways × outputs at most (shots × ways for separable losses). Each task has
    its own step size s, the largest of 1, ½, ¼, … for which f falls by 10⁻⁴ of what its slope
    promises, up to round-off. A task ends at the tolerance, or after two steps that change f by
    round-off alone.

    Under `Unrolled`, three steps from V* carry the graph, with the constant A at V*. The k-th of
    them makes the k-th derivatives exact.

    Args:
        max_steps: The largest number of steps, ≥ 1.
        tol: ‖∂f/∂V‖ at which a task ends. If None, tasks end at round-off.
        problem: The lifted problem that the loop is bound to; see `bound_to`.

    Raises:
        ValueError: A number is out of range. On a run: the inner loss is no `LinearHead`.

    Example:
        >>> Newton(tol=1e-8).updated(max_steps=50)
        Newton(max_steps=50, tol=1e-08)
    """

    max_steps: int = 30
    tol: float | None = 1e-12
    problem: LiftedProblem | None = field(default=None, repr=False, compare=False)
    steps: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        self.check()
        check_count("Newton max_steps", self.max_steps, unit=" step")

    def check_loss(self, loss: ConvexLoss) -> None:
        """Every convex loss will do."""

    def minimise(self, objective: HeadObjective, start: Tensor) -> Minimum:
        """Damped Newton steps, with a mask of the tasks that have not ended."""
        v = start
        steps = torch.zeros(len(v), dtype=torch.int64, device=v.device)
        active = torch.ones_like(steps, dtype=torch.bool)
        within_roundoff = torch.zeros_like(steps)
        for t in range(self.max_steps):
            gradient = objective.gradient(v)
            norm = gradient.flatten(1).norm(dim=1)
            active = active & (norm > (self.tol or 0.0))  # False where it is NaN
            if all_ended(active, t):
                break
            direction = -_newton_direction(objective, v, gradient)
            size, at_roundoff = _step_size(objective, v, gradient, direction=direction)
            # Such a step leaves an error of 1e-8 at most, which a second one squares.
            within_roundoff += at_roundoff
            active = active & (size > 0) & (within_roundoff <= 2)

            moved = v + size[:, None, None] * direction
            v = torch.where(active[:, None, None], moved, v)
            steps += active
        return Minimum(v, steps, {})

    def argmin(self, objective: HeadObjective, minimum: Tensor) -> Tensor:
        """The values of V*, with the graph of three steps from there."""
        constants = objective.detach()
        curvature = constants.curvature(minimum)
        factor = curvature.factorise(constants.strength)
        v = minimum
        for _ in range(3):
            v = v - curvature.inverse(objective.gradient(v), factor, constants.strength)
        return minimum + (v - v.detach())


def _ridge(objective: HeadObjective) -> tuple[Tensor, Tensor]:
    """V* and the factor that it comes from."""
    rows = objective.rows
    curvature = objective.curvature(torch.zeros_like(rows.mT @ objective.targets))
    factor = curvature.factorise(objective.strength)
    if curvature.is_dual:
        return rows.mT @ solve(factor, objective.targets), factor
    return solve(factor, rows.mT @ objective.targets), factor


def _newton_direction(objective: HeadObjective, v: Tensor, gradient: Tensor) -> Tensor:
    """A⁻¹ ∂f/∂V with the Hessian A at V."""
    curvature = objective.curvature(v)
    factor = curvature.factorise(objective.strength)
    return curvature.inverse(gradient, factor, objective.strength)


def _step_size(
    objective: HeadObjective, v: Tensor, gradient: Tensor, *, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """The step size of each task, 0 where none will do, and whether f changes by round-off alone.

    Both are `[tasks]`.
    """
    exponents = torch.arange(STEP_SIZES, dtype=v.dtype, device=v.device)
    sizes = torch.cat([exponents.new_zeros(1), 2.0**-exponents])
    values = objective.values_along(v, direction, sizes)
    # The round-off of f is that of the outputs, of which a small loss is a difference.
    outputs = (objective.rows @ v).abs().amax(-1).sum(-1)
    roundoff = 10 * torch.finfo(v.dtype).eps * (values[0].abs() + outputs)
    slope = (gradient * direction).sum((1, 2))

    expected = SUFFICIENT_DECREASE * sizes[1:, None] * slope
    suffices = values[1:] <= values[0] + expected + roundoff
    largest = suffices.int().argmax(0)  # the first that suffices
    size = torch.where(suffices.any(0), sizes[1:][largest], 0.0)
    return size, -slope <= roundoff
