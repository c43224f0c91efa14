"""Reverse mode through the inner loop: all of it, its last steps, or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Adaptation, Method, Report, run_inner
from metaimplicit.options import option
from metaimplicit.params import Params


@dataclass(frozen=True)
class Unrolled(Method):
    """Reverse mode through the T inner steps (Maclaurin et al. 2015; MAML, Finn et al. 2017), exact for θ_T.

    Memory grows with T. The result of `argmin` is differentiable at will.

    Args:
        iterates: give the outer loss all of θ_0 … θ_T, stacked as `[T+1, *shape]` (multi-step losses), not θ_T.
    """

    iterates: bool = option(False, flag=None)
    flag = "unrolled"
    graph = True

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        if self.iterates and inner.tol is not None and inner.differentiable:
            raise ValueError(
                f"Unrolled iterates: got an inner loop with tol={inner.tol}, expected a fixed T; use tol=None"
            )
        return _reverse(self.flag, problem, inner, meta, inner.steps, self.iterates)


@dataclass(frozen=True)
class Truncated(Method):
    """Reverse mode through the last K inner steps (Shaban et al. 2019).

    The T − K before them pull back as the identity on the initialisation, and as zero on everything else.

    Args:
        steps: K, 0 ≤ K ≤ T; K = T is `Unrolled`, K = 0 is `FirstOrder`.
    """

    steps: int = option(1, flag="solver_steps")
    flag = "truncated"
    graph = True
    remedy = (
        "with steps=0 it reaches the initialisation alone; give it more steps or use 'unrolled'"
    )

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"Truncated steps: got {self.steps}, expected at least 0")

    @property
    def reach(self) -> frozenset[str]:  # type: ignore[override]
        return Method.reach if self.steps else FirstOrder.reach

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        if self.steps > inner.steps:
            raise ValueError(
                f"Truncated steps: got {self.steps}, expected at most the inner loop's {inner.steps}"
            )
        if inner.tol is not None and inner.differentiable:
            raise ValueError(
                f"Truncated: got an inner loop with tol={inner.tol}, which hides its last step; use tol=None"
            )
        return _reverse(self.flag, problem, inner, meta, self.steps)


@dataclass(frozen=True)
class FirstOrder(Method):
    """The outer gradient at θ_T taken as the initialisation's (FOMAML, Finn et al. 2017, §5.2): dθ_T/dθ_0 ≈ I.

    What both losses read keeps its direct gradient ∂g/∂φ alone.
    """

    flag = "first-order"
    graph = True
    reach = frozenset({"start"})
    remedy = (
        "it reaches the initialisation alone, not a step size or a regulariser; use 'unrolled', or for what the inner "
        "loss reads an implicit method"
    )

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        return _reverse(self.flag, problem, inner, meta, 0)


def _reverse(
    flag: str,
    problem: LiftedProblem,
    inner: InnerLoop,
    meta: Params,
    differentiated_steps: int,
    iterates: bool = False,
) -> Adaptation:
    _, trajectory, reads = run_inner(
        problem, inner, meta, differentiated_steps=differentiated_steps, keep_iterates=iterates
    )
    params = trajectory.params
    if iterates:
        params = {
            name: torch.stack([point[name] for point in trajectory.iterates], dim=1)
            for name in params
        }
    return Adaptation(
        params, Report(flag, trajectory.steps, trajectory.gradient_norm), reads, trajectory.end
    )
