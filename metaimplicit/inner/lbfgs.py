"""A quasi-Newton inner loop, for problems that are to be solved to a tolerance."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves


@dataclass(frozen=True)
class LBFGS(InnerLoop):
    """Limited-memory BFGS with a strong Wolfe line search (torch's), until ‖∂f/∂θ‖ ≤ tol in every task.

    All tasks share the line search. Its steps are not differentiable: for implicit methods.

    Args:
        steps: gradient evaluations at most, ≥ 1; then the point of the lowest loss stands. `Report.inner_steps` counts
            those made.
        tol: stop once ‖∂f/∂θ‖ ≤ tol. The line search compares losses, so far below the square root of the working
            precision it stalls; `Report.inner_gradient_norm` says where.
        history: pairs kept.
    """

    steps: int = 500
    tol: float | None = 1e-6
    history: int = 10

    differentiable = False

    def __post_init__(self) -> None:
        self.check()
        if self.history < 1:
            raise ValueError(f"LBFGS history: got {self.history}, expected at least 1 pair")

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
        if differentiated_steps or keep_iterates:
            raise ValueError(
                "inner: got LBFGS with a method that needs its iterates, expected an implicit method"
            )
        points = leaves(
            {name: p.detach().contiguous().clone() for name, p in start.items()}
        )  # written in place
        variables = list(points.values())
        eps = torch.finfo(variables[0].dtype).eps
        optimizer = torch.optim.LBFGS(
            variables, max_iter=self.steps, max_eval=2 * self.steps, history_size=self.history, tolerance_grad=0,
            tolerance_change=eps, line_search_fn="strong_wolfe",
        )  # fmt: skip
        best, lowest, calls = points, float("inf"), 0
        norm = torch.full((len(variables[0]),), torch.inf, device=variables[0].device)

        def evaluate() -> float:
            nonlocal best, lowest, calls, norm
            with torch.enable_grad():
                value = loss(points, calls).sum()
                gradients = torch.autograd.grad(value, variables, allow_unused=True)
            calls += 1
            for p, g in zip(variables, gradients, strict=True):
                p.grad = torch.zeros_like(p) if g is None else g
            total = value.item()
            slope = flatten(
                {str(i): p.grad for i, p in enumerate(variables) if p.grad is not None}
            ).norm(dim=-1)
            solved = self.tol is not None and bool((slope <= self.tol).all())
            if solved or total < lowest:
                best, lowest, norm = (
                    {name: p.detach().clone() for name, p in points.items()},
                    total,
                    slope,
                )
            if solved or calls == self.steps:
                raise _Done
            return total

        with suppress(_Done):
            optimizer.step(evaluate)
        taken = torch.full_like(norm, calls, dtype=torch.int64)
        return Trajectory({name: p.detach() for name, p in best.items()}, taken, norm)


class _Done(Exception):  # noqa: N818  # leaves a line search in the middle
    pass
