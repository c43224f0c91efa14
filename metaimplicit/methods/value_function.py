"""A hypergradient from first derivatives alone: the value function as a penalty."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import (
    UNSET,
    Adaptation,
    Gradients,
    Method,
    Report,
    data_at_solution,
    run_inner,
)
from metaimplicit.options import option
from metaimplicit.params import Params, leaves
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class ValueFunction(Method):
    """dg/dφ ≈ ∂g/∂φ(y) + λ(∂f/∂φ(y) − ∂f/∂φ(z)), z ≈ argmin_θ f, y ≈ argmin_θ f + g/λ.

    The gradient of min_θ g + λ(f − min f), whose distance to the exact one is O(1/λ) where f is strongly convex (Kwon
    et al. 2023, F2SA, lemma 3.1). y runs the inner loop from z, and goes on from its own end where z does.

    Args:
        strength: λ > 0. The larger, the nearer, and the better y and z must be solved: their errors are multiplied.
        batch: with a `Stream`, the data of ∂f/∂φ.
    """

    strength: float = option(10.0, flag="penalty")
    batch: Any = field(default=UNSET, repr=False)
    flag = "f2sa"
    reach = frozenset({"loss"})
    remedy = "it reaches what the inner loss reads, not a step size nor a starting point; use 'forward' or 'unrolled'"

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"ValueFunction strength: got {self.strength}, expected a number > 0")

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        data = data_at_solution(problem, self.batch, "ValueFunction")
        outer = problem.at(inner.steps)
        _, trajectory, reads = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        fixed = {name: m.detach() for name, m in meta.items()}
        z, y = trajectory.end, None if problem.start is None else problem.start.companion

        def penalised(params: Params, t: int) -> torch.Tensor:
            g, _ = problem.outer(params, fixed, outer)
            return problem.inner(params, fixed, problem.at(t)) + g / self.strength

        if problem.start is not None and problem.start.sensitivity is not None:
            raise ValueError(
                "start: got the end of 'forward' or 'real-time', expected that of 'f2sa'"
            )
        y = replace(z, state={}) if y is None else y
        y = inner.run(penalised, y.params, fixed, differentiated_steps=0, state=y.state).end
        report = Report(self.flag, trajectory.steps, trajectory.gradient_norm)

        def pullback(_: Params, __: SolverState) -> tuple[Gradients, Report]:
            names = [name for name, m in meta.items() if m.requires_grad]
            at_y, at_z = leaves(y.params), leaves(z.params)
            # the caller adds ∂g/∂φ(z): the difference makes it ∂g/∂φ(y)
            outward = problem.outer(at_y, meta, outer)[0] - problem.outer(at_z, meta, outer)[0]
            inward = problem.inner(at_y, meta, data) - problem.inner(at_z, meta, data)
            value = outward.mean() + self.strength * inward.mean()
            lost = reads.start - find_dependencies(
                [inward], meta, [*at_y.values(), *at_z.values()], None
            )  # read by init alone
            found = torch.autograd.grad(value, [meta[name] for name in names], allow_unused=True)
            return dict.fromkeys(meta) | dict(zip(names, found, strict=True)) | dict.fromkeys(
                lost
            ), report

        return Adaptation(z.params, report, reads, replace(z, companion=y), pullback)
