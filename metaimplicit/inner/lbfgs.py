"""A quasi-Newton inner loop, for problems that are to be solved to a tolerance."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves


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
        >>> loop.run(loss, start, {}, differentiated_steps=0).params["w"]
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
        # Copies, because torch writes the points of its line search into them.
        copies = {name: p.detach().contiguous().clone() for name, p in start.items()}
        points = leaves(copies)
        objective = _Objective(loss, points, steps=self.steps, tol=self.tol)
        variables = list(points.values())
        optimizer = torch.optim.LBFGS(
            variables,
            max_iter=self.steps,
            max_eval=2 * self.steps,
            history_size=self.history,
            tolerance_grad=0,
            tolerance_change=torch.finfo(variables[0].dtype).eps,
            line_search_fn="strong_wolfe",
        )
        with suppress(_Finished):
            optimizer.step(objective.evaluate)

        norm = objective.gradient_norm
        steps = torch.full_like(norm, objective.calls, dtype=torch.int64)
        best = {name: p.detach() for name, p in objective.best.items()}
        return Trajectory(best, steps, norm)


class _Objective:
    """The sum of the losses at `points` as a closure for torch, which remembers the best point.

    Attributes:
        calls: The number of evaluations.
        best: The point to return: one that meets the tolerance, or the one with the lowest loss. It
            is NaN for a task that is not finite at its start.
        gradient_norm: ‖∂f/∂θ‖ of each task at `best`, `[tasks]`. It is NaN likewise.
    """

    def __init__(
        self,
        loss: StepLoss,
        points: Params,
        *,
        steps: int,
        tol: float | None,
    ) -> None:
        first = next(iter(points.values()))
        self._loss = loss
        self._points = points
        self._steps = steps
        self._tol = tol
        self._lowest = float("inf")
        self.calls = 0
        self.best = points
        self.gradient_norm = torch.full((len(first),), torch.inf, device=first.device)
        self._finite: Tensor | None = None  # at the start, `[tasks]`

    def evaluate(self) -> float:
        """The loss at `points`, with its gradient in `.grad`.

        Raises:
            _Finished: The tolerance is met, or this was the last evaluation that is allowed.
        """
        variables = list(self._points.values())
        with torch.enable_grad():
            losses = self._loss(self._points, self.calls)
            gradients = torch.autograd.grad(losses.sum(), variables, allow_unused=True)
        self.calls += 1
        slopes = {}
        for (name, p), gradient in zip(self._points.items(), gradients, strict=True):
            slopes[name] = torch.zeros_like(p) if gradient is None else gradient

        norm = flatten(slopes).norm(dim=-1)
        if self._finite is None:
            self._finite = losses.detach().isfinite() & norm.isfinite()
        finite = self._finite
        for name, p in self._points.items():
            slope = torch.where(_like(finite, p), slopes[name], 0.0)
            p.grad = slope.contiguous()  # torch views it as a vector

        total = torch.where(finite, losses.detach(), 0.0).sum().item()
        solved = self._tol is not None and bool((~finite | (norm <= self._tol)).all())
        norm = torch.where(finite, norm, torch.nan)
        if solved or total < self._lowest:
            self._lowest = total
            self.best = {
                name: torch.where(_like(finite, p), p.detach(), torch.nan)
                for name, p in self._points.items()
            }
            self.gradient_norm = norm
        if solved or self.calls == self._steps:
            raise _Finished
        return total


def _like(tasks: Tensor, p: Tensor) -> Tensor:
    """A mask `[tasks]` with the axes of a parameter, `[tasks, *shape]`."""
    return tasks.reshape(-1, *(1,) * (p.dim() - 1))


class _Finished(Exception):  # noqa: N818
    """Leaves torch in the middle of its line search. It is no error."""
