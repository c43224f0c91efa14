"""Reptile, a baseline that takes no derivative."""

from __future__ import annotations

from dataclasses import dataclass

from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Adaptation, Gradients, Method, vector_jacobian_product
from metaimplicit.methods.report import Report
from metaimplicit.methods.shared import reject_half_precision, run_inner
from metaimplicit.params import Params, detached
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class Reptile(Method):
    """The direction mean_tasks(θ_0 − θ_T) in place of a gradient.

    It ignores the outer loss (Nichol, Achiam & Schulman 2018, §3).

    Example:
        >>> import torch
        >>> from metaimplicit import BilevelProblem, GradientDescent
        >>> from metaimplicit.hypergradient import hypergradient
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["w"]},
        ...     inner_loss=lambda params, meta, data: params["w"].square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> inner = GradientDescent(steps=2, lr=0.25)
        >>> meta = {"w": torch.tensor(1.0)}
        >>> hypergradient(problem, meta, data=None, inner=inner, method=Reptile()).grads
        {'w': tensor(0.7500)}
    """

    flag = "reptile"
    reach = frozenset({"start"})
    remedy = (
        "it moves the initialisation towards θ_T and gives no other gradient; "
        "use 'unrolled' or an implicit method"
    )
    argmin_objection = "no derivative"
    second_derivatives = False

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop without a graph."""
        run = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        reject_half_precision(self.flag, run.start)
        trajectory = run.trajectory
        params = detached(trajectory.params)
        report = Report(self.flag, trajectory.steps, trajectory.gradient_norm)

        def pullback(_: Params, state: SolverState) -> tuple[Gradients, Report]:
            start = detached(run.start)
            directions = {name: (start[name] - p) / problem.tasks for name, p in params.items()}
            return vector_jacobian_product(run.start, meta, directions), report

        return Adaptation(
            params,
            report,
            run.dependencies,
            trajectory.end,
            pullback,
        )
