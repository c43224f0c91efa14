"""A quasi-Newton inner loop, for problems that are to be solved to a tolerance."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves

TINY = 1e-30  # Losses and lengths below it have no units of their own.


@dataclass(frozen=True)
class LBFGS(InnerLoop):
    """Limited-memory BFGS with a strong Wolfe line search, that of torch.

    The tasks are solved as one problem: they share the line search. A task whose loss or gradient
    is not finite at its start ends as NaN, and the others are solved without it. The loop ends at a
    point with ‖∂f/∂θ‖ ≤ tol in every task. If it ends without one, its result is the point with the
    lowest sum of losses. The steps are not differentiable, so the loop serves implicit methods
    only.

    Args:
        steps: The largest number of gradient evaluations, ≥ 1. `Report.inner_steps` is their
            number.
        tol: ‖∂f/∂θ‖ at which the loop ends. If None, it does not end before `steps` gradients,
            unless the line search makes no more progress. The line search compares losses, so it
            makes none far below the square root of the working precision.
        history: The number of pairs (step, change of the gradient) that model the curvature, ≥ 1.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> loop = LBFGS(steps=20, tol=1e-6)
        >>> def loss(params, t):
        ...     return (params["w"] - 3).square().sum(1)
        >>> start = {"w": torch.zeros(1, 2)}
        >>> loop.run(loss, start, {}, differentiated_steps=0).params["w"].round(decimals=3)
        tensor([[3., 3.]])
    """

    steps: int = 500
    tol: float | None = 1e-6
    history: int = 10

    differentiable = False
    keeps_iterates = False

    def __post_init__(self) -> None:
        self.check()
        check_count("LBFGS history", self.history, unit=" pair")

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
        """Run the loop; see `InnerLoop.run`. There is no state, so `state` is not read.

        Raises:
            ValueError: Differentiated steps or the iterates are asked for.
        """
        if differentiated_steps or keep_iterates:
            raise ValueError(
                "inner: got LBFGS with a method that needs its steps or its iterates, expected an "
                "implicit method"
            )
        objective = _Objective(loss, start, steps=self.steps, tol=self.tol)
        with suppress(_Finished):
            is_running = True
            while is_running:
                variables = list(objective.variables.values())
                optimizer = torch.optim.LBFGS(
                    variables,
                    max_iter=self.steps,
                    max_eval=2 * self.steps,
                    history_size=self.history,
                    tolerance_grad=0,
                    tolerance_change=torch.finfo(variables[0].dtype).eps,
                    line_search_fn="strong_wolfe",
                )
                optimizer.step(objective.evaluate)
                is_running = objective.take_smaller_units()

        norm = objective.gradient_norm
        steps = torch.full_like(norm, objective.calls, dtype=torch.int64)
        best = {name: p.detach() for name, p in objective.best.items()}
        return Trajectory(best, steps, norm)


class _Objective:
    """The sum of the losses as a closure for torch, which remembers the best point.

    Torch stops where the loss or the variables change by less than fixed numbers. Where both are
    far below 1 it stops too early, and goes on in units of their size: x with θ = θ₁ + sx, and
    f/u. At the point θ₁ that it has reached u is |f|, and s the smaller one of |f|/‖∂f/∂θ‖ there
    and at the start.

    Attributes:
        variables: x, `{name: [tasks, *shape]}`, which torch moves; at first θ itself.
        calls: The number of evaluations.
        best: The point to return: one that meets the tolerance, or the one with the lowest loss. It
            is NaN for a task that is not finite at its start.
        gradient_norm: ‖∂f/∂θ‖ of each task at `best`, `[tasks]`. It is NaN likewise.
    """

    def __init__(
        self,
        loss: StepLoss,
        start: Params,
        *,
        steps: int,
        tol: float | None,
    ) -> None:
        first = next(iter(start.values()))
        self._loss = loss
        self._steps = steps
        self._tol = tol
        self._lowest = float("inf")
        self._size_at_start = 0.0  # of the loss
        self._slope_at_start = 0.0
        self.calls = 0
        # Copies, because torch writes the points of its line search into them.
        self.variables = leaves({n: p.detach().contiguous().clone() for n, p in start.items()})
        self._center: Params = {}  # θ₁, zero if empty
        self._length = 1.0  # s
        self._loss_unit = 1.0  # u
        self._lowest_point: Params = {}
        self.best = start
        self.gradient_norm = torch.full((len(first),), torch.inf, device=first.device)
        self._finite: Tensor | None = None  # at the start, `[tasks]`

    def evaluate(self) -> float:
        """f/u at x, with its gradient in `.grad`.

        Raises:
            _Finished: The tolerance is met, or this was the last evaluation that is allowed.
        """
        points = leaves(self._points())
        with torch.enable_grad():
            losses = self._loss(points, self.calls)
            gradients = torch.autograd.grad(losses.sum(), list(points.values()), allow_unused=True)
        self.calls += 1
        slopes = {}
        for (name, p), gradient in zip(points.items(), gradients, strict=True):
            slopes[name] = torch.zeros_like(p) if gradient is None else gradient

        norm = flatten(slopes).norm(dim=-1)
        if self._finite is None:
            self._finite = losses.detach().isfinite() & norm.isfinite()
        finite = self._finite
        for name, x in self.variables.items():
            slope = torch.where(_like(finite, x), slopes[name], 0.0)
            slope = slope * (self._length / self._loss_unit)
            x.grad = slope.contiguous()  # torch views it as a vector

        total = torch.where(finite, losses.detach(), 0.0).sum().item()
        if self.calls == 1:
            self._size_at_start = abs(total)
            self._slope_at_start = norm.nan_to_num(0.0, 0.0).norm().item()
        solved = self._tol is not None and bool((~finite | (norm <= self._tol)).all())
        norm = torch.where(finite, norm, torch.nan)
        if solved or total < self._lowest:
            self._lowest = total
            self._lowest_point = {name: p.detach() for name, p in points.items()}
            self.best = {
                name: torch.where(_like(finite, p), p, torch.nan)
                for name, p in self._lowest_point.items()
            }
            self.gradient_norm = norm
        if solved or self.calls == self._steps:
            raise _Finished
        return total / self._loss_unit

    def take_smaller_units(self) -> bool:
        """Go on from the best point in units of its loss. False if those of now are small enough.

        A loss that has fallen to the round-off of its first value is small enough, too.
        """
        size = abs(self._lowest)
        slope = self.gradient_norm.nan_to_num(0.0).norm().item()
        if not torch.finfo(self.gradient_norm.dtype).eps * self._size_at_start < size < math.inf:
            return False
        if not 0 < slope <= self._slope_at_start < math.inf:
            return False
        loss_unit = min(1.0, size)
        length = min(size / slope, self._size_at_start / self._slope_at_start)
        if min(loss_unit, length) < TINY:
            return False
        if loss_unit > 0.1 * self._loss_unit and length > 0.1 * self._length:
            return False
        self._loss_unit = loss_unit
        self._length = length
        self._center = self._lowest_point
        self.variables = leaves({n: torch.zeros_like(p) for n, p in self._center.items()})
        return True

    def _points(self) -> Params:
        """θ = θ₁ + sx, in tensors of their own."""
        if not self._center:
            return {name: x.detach().clone() for name, x in self.variables.items()}
        return {
            name: self._center[name] + self._length * x.detach()
            for name, x in self.variables.items()
        }


def _like(tasks: Tensor, p: Tensor) -> Tensor:
    """A mask `[tasks]` with the axes of a parameter, `[tasks, *shape]`."""
    return tasks.reshape(-1, *(1,) * (p.dim() - 1))


class _Finished(Exception):  # noqa: N818
    """Leaves torch in the middle of its line search. It is no error."""
