"""An implicit gradient without any second derivative: the optimiser's own step in place of the inverse curvature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

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
    vector_jacobian_product,
)
from metaimplicit.operators import central_difference
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class SAMA(Method):
    """(dθ*/dφ)ᵀ v ≈ −(∂²f/∂θ∂φ)ᵀ D v, D = ∂u/∂g of the inner optimiser's next step θ − u(g), g = ∂f/∂θ.

    The curvature is taken for D⁻¹, as adaptive optimisers do, and the mixed product is a difference of two gradients
    at θ ± hDv (Choe et al. 2023, SAMA, eq. 3–5). Exact where A = D⁻¹; with plain gradient descent D = ηI, T1–T2.

    Args:
        batch: with a `Stream`, the data of g and of the mixed derivative.
    """

    batch: Any = field(default=UNSET, repr=False)
    flag = "sama"
    reach = frozenset({"loss"})
    remedy = "it reaches what the inner loss reads, not a step size nor a starting point; use 'forward' or 'unrolled'"

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        data = data_at_solution(problem, self.batch, "SAMA")
        _, trajectory, reads = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        end = trajectory.end
        fixed, theta = {name: m.detach() for name, m in meta.items()}, leaves(end.params)
        loss = problem.inner(theta, fixed, data).sum()
        found = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        g = {name: x for name, x in zip(theta, found, strict=True) if x is not None}
        report = Report(self.flag, trajectory.steps, flatten(g).norm(dim=-1))

        def pullback(vectors: Params, _: SolverState) -> tuple[Gradients, Report]:
            def step(gradient: Params) -> Params:
                stepped = inner.take_step(end.params, gradient, end.state, fixed)[0]
                return {name: stepped[name] for name in gradient}

            moved = torch.func.jvp(step, (g,), ({name: vectors[name] for name in g},))[
                1
            ]  # ∂θ'/∂g v = −Dv
            along = {name: moved.get(name, torch.zeros_like(p)) for name, p in end.params.items()}
            slope = central_difference(
                lambda p: problem.inner(p, meta, data), end.params, flatten(along)
            )
            return vector_jacobian_product(
                {"f": slope}, meta, {"f": torch.ones_like(slope)}
            ), report

        return Adaptation(end.params, report, reads, end, pullback)
