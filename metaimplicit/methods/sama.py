"""An implicit gradient without second derivatives: the optimiser's step inverts the curvature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from metaimplicit.forward_mode import push_forward
from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import UNSET, Adaptation, Gradients, Method
from metaimplicit.methods.microbatches import check_size, in_microbatches
from metaimplicit.methods.report import Report
from metaimplicit.methods.shared import (
    data_at_solution,
    mixed_difference,
    penalised_inner,
    run_inner,
)
from metaimplicit.options import option
from metaimplicit.params import Params, detached, flatten, leaves
from metaimplicit.problem import BilevelProblem
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class SAMA(Method):
    """(dθ*/dφ)ᵀ v ≈ −(∂²f/∂θ∂φ)ᵀ D v, where D = ∂u/∂g of the optimiser's next step θ − u(g).

    D stands for A⁻¹, as it does in an adaptive optimiser, and g = ∂f/∂θ. The mixed product is the
    difference of two gradients ∂f/∂φ, at θ ± hDv (Choe et al. 2023, eq. 3–5). It is exact if
    A = D⁻¹. With plain gradient descent, D = ηI, and the method is T1–T2.

    Args:
        batch: With a `Stream`, the data of g and of the mixed product.
        microbatch: Evaluate the losses on at most this many examples at a time, as `Implicit` does.

    Raises:
        ValueError: A `Stream` without a `batch`, or a `batch` without a `Stream`. The losses or the
            data allow no `microbatch`, or it is below 1.

    Example:
        >>> from metaimplicit import BilevelProblem, GradientDescent
        >>> from metaimplicit.hypergradient import hypergradient
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros((), dtype=torch.float64)},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> result = hypergradient(
        ...     problem,
        ...     {"target": torch.tensor(3.0, dtype=torch.float64)},
        ...     data=None,
        ...     inner=GradientDescent(steps=1, lr=0.5),  # D = 0.5 I, and A = 2 I is its inverse
        ...     method=SAMA(),
        ... )
        >>> round(result.grads["target"].item(), 6)
        1.0
    """

    batch: Any = field(default=UNSET, repr=False)
    microbatch: int | None = option(None, flag=None)
    flag = "sama"
    reach = frozenset({"loss"})
    remedy = (
        "it reaches what the inner loss reads, but no step size and no starting point; "
        "use 'forward' or 'unrolled'"
    )
    second_derivatives = False
    rereads = "last"

    def __post_init__(self) -> None:
        check_size(self.microbatch)

    def prepare(self, problem: BilevelProblem, *, batched: bool) -> BilevelProblem:
        """The problem with its losses in microbatches, if there is a size."""
        return in_microbatches(problem, self.microbatch, batched=batched)

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop without a graph, and take ∂f/∂θ where it ends."""
        data = data_at_solution(problem, self.batch, "SAMA")
        run = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        end = run.trajectory.end
        constants = detached(meta)
        gradient = _gradient(problem, end.params, constants, data=data)
        report = Report(self.flag, run.trajectory.steps, flatten(gradient).norm(dim=-1))

        def next_params(g: Params) -> Params:
            stepped, _ = inner.take_step(end.params, g, end.state, constants)
            return {name: stepped[name] for name in g}

        def pullback(vectors: Params, _: SolverState) -> tuple[Gradients, Report]:
            # The step is θ' = θ − u(g), so its tangent along v is −Dv.
            v = {name: vectors[name] for name in gradient}
            minus_dv = {name: torch.zeros_like(p) for name, p in end.params.items()}
            minus_dv |= push_forward(next_params, (gradient,), (v,))[1]

            # −(∂²f/∂θ∂φ)ᵀ D v = ∂/∂φ (slope of f along −Dv).
            loss = penalised_inner(problem, run, meta, data)
            along = flatten(minus_dv)
            return mixed_difference(loss, end.params, along, meta), report

        return Adaptation(end.params, report, run.dependencies, end, pullback)


def _gradient(problem: LiftedProblem, params: Params, meta: Params, *, data: Any) -> Params:
    """∂f/∂θ, without the parameters that the loss does not read."""
    theta = leaves(params)
    loss = problem.inner(theta, meta, data).sum()
    gradients = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    pairs = zip(theta, gradients, strict=True)
    return {name: g for name, g in pairs if g is not None}
