"""Reptile, a baseline: no derivative of anything, and named so."""

from __future__ import annotations

from dataclasses import dataclass

from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import (
    Adaptation,
    Gradients,
    Method,
    Report,
    run_inner,
    vector_jacobian_product,
)
from metaimplicit.params import Params
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class Reptile(Method):
    """The direction mean_tasks(θ_0 − θ_T) (Nichol, Achiam & Schulman 2018, §3), blind to the outer loss."""

    flag = "reptile"
    reach = frozenset({"start"})
    remedy = "it moves the initialisation towards θ_T and knows no other gradient; use 'unrolled' or an implicit method"

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        start, trajectory, reads = run_inner(
            problem, inner, meta, differentiated_steps=0, detach=True
        )
        params = {name: p.detach() for name, p in trajectory.params.items()}
        report = Report(self.flag, trajectory.steps, trajectory.gradient_norm)

        def pullback(_: Params, state: SolverState) -> tuple[Gradients, Report]:
            moved = {name: (start[name].detach() - p) / problem.tasks for name, p in params.items()}
            return vector_jacobian_product(start, meta, moved), report

        return Adaptation(params, report, reads, trajectory.end, pullback)
