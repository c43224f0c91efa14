"""Implicit differentiation of a fixed point of the inner optimiser's step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.graph import check_twice_differentiable
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.adjoint import TransposedJacobian, check_solver
from metaimplicit.methods.base import UNSET, Adaptation, Gradients, Method
from metaimplicit.methods.linearize import reject_random_numbers, without_unread
from metaimplicit.methods.report import Report, relative_leftover
from metaimplicit.methods.shared import data_at_solution, run_inner, warn_or_raise
from metaimplicit.methods.step_functions import (
    differentiable_step,
    slot_tensors,
    with_slot_tensors,
)
from metaimplicit.options import option
from metaimplicit.params import Params, flatten
from metaimplicit.solvers import GMRES, Neumann, Richardson, Solver, SolverState


@dataclass(frozen=True)
class FixedPoint(Method):
    """(dθ*/dφ)ᵀ v = (∂Φ/∂φ)ᵀ λ with (I − ∂Φ/∂s)ᵀ λ = v, where s* = Φ(s*, φ).

    Φ is the step of the inner optimiser, and s = (θ, its state). So whatever the loop converges to
    is differentiated, whether it minimises f or not: with decoupled weight decay, say, or with
    proximal steps. It is exact if the loop has converged, the solve is exact, and the step is
    differentiable at its fixed point. Memory is flat in the steps (Bai et al. 2019; Blondel et al.
    2022).

    With gradient descent and `Neumann(terms=K)` it equals `Implicit(Neumann(terms=K, scale=lr))` on
    the Hessian, term for term: K terms are K steps of the adjoint iteration λ ← v + (∂Φ/∂s)ᵀ λ.

    Args:
        solver: Solves the system, which is not symmetric: `GMRES`, `Neumann` or `Richardson`. The
            scale of the latter two is 1 unless given.
        radius_steps: The steps of a power iteration that estimates the spectral radius of ∂Φ/∂s,
            one product each. If 0, the report has no estimate.
        batch: With a `Stream`, the data that the step sees.
        strict: Raise FloatingPointError on breakdown or non-finite numbers. If False, the report
            records them and a warning is given.

    Raises:
        ValueError: The solver needs a symmetric matrix, or `radius_steps` is negative. On adapting:
            the step of the inner loop is not differentiable at its fixed point, or the loss draws
            random numbers.
        FloatingPointError: On solving, if `strict`.

    Example:
        A step on f = (w − t)² with decoupled decay is w ← 0.9 w − 0.2 (w − t), so w* = 2t/3.

        >>> from metaimplicit import BilevelProblem, TorchOptimizer
        >>> from metaimplicit.inner import SGDW
        >>> from metaimplicit.hypergradient import hypergradient
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["t"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> inner = TorchOptimizer(SGDW, steps=100, lr=0.1, decoupled_weight_decay=1.0)
        >>> meta = {"t": torch.tensor(3.0)}
        >>> result = hypergradient(problem, meta, data=None, inner=inner, method=FixedPoint())
        >>> round(result.params["w"].item(), 4), round(result.grads["t"].item(), 4)
        (2.0, 0.6667)
    """

    solver: Solver = field(default_factory=lambda: GMRES(max_steps=20))
    radius_steps: int = option(10, flag=None)
    batch: Any = field(default=UNSET, repr=False)
    strict: bool = False
    flag = "fixed-point"
    reach = frozenset({"loss", "loop"})
    remedy = (
        "a starting point that the inner loss does not read does not move the fixed point; use "
        "'unrolled', or let the inner loss depend on it (a proximal term for the initialisation)"
    )

    def __post_init__(self) -> None:
        check_count("FixedPoint radius_steps", self.radius_steps, least=0)
        check_solver("FixedPoint", self.solver)

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop without a graph. The step is differentiated where it ends."""
        data_at_solution(problem, self.batch, "FixedPoint")
        if inner.fixed_point_objection:
            raise ValueError(
                f"fixed-point: got {type(inner).__name__}, {inner.fixed_point_objection}; use an "
                "implicit method if the loop ends where ∂f/∂θ = 0, or 'unrolled'"
            )
        run = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        report = Report(repr(self), run.trajectory.steps, run.trajectory.gradient_norm)
        end = run.trajectory.end

        def pullback(vectors: Params, state: SolverState) -> tuple[Gradients, Report]:
            return self._pull_back(
                problem,
                inner,
                end,
                meta=meta,
                vectors=vectors,
                report=report,
                state=state,
            )

        return Adaptation(end.params, report, run.dependencies, end, pullback)

    def _pull_back(
        self,
        problem: LiftedProblem,
        inner: InnerLoop,
        end: Iterate,
        *,
        meta: Params,
        vectors: Params,
        report: Report,
        state: SolverState,
    ) -> tuple[Gradients, Report]:
        data = data_at_solution(problem, self.batch, "FixedPoint")
        step = _LinearizedStep(problem, inner, end, meta=meta, data=data)
        operator = TransposedJacobian(step.residuals, step.point)
        # Φ(s) − s is what one more step would change.
        still_to_go = -operator.join(step.residuals)
        v = without_unread(
            step.pad(vectors),
            still_to_go,
            operator,
            lambda w: (operator.pull_back(w, meta, retain_graph=True), still_to_go),
        )

        # (I − ∂Φ/∂s)ᵀ λ = v, and F = s − Φ(s, φ) has ∂F/∂φ = −∂Φ/∂φ.
        solver = self.solver
        if isinstance(solver, (Neumann, Richardson)) and solver.scale is None:
            solver = replace(solver, scale=1.0)
        solution = solver.solve(operator, v, state=state)
        warn_or_raise(solver, solution, strict=self.strict)
        radius = spectral_radius(operator, v, self.radius_steps) if self.radius_steps else None

        gradients = operator.pull_back(-solution.value, meta)
        return gradients, replace(
            report,
            inner_gradient_norm=flatten(step.gradient).detach().norm(dim=-1),
            products=solution.products + self.radius_steps,
            residual=solution.residual,
            status=solution.status,
            # λ says by how much g would change.
            leftover=problem.tasks * (solution.value * still_to_go).sum(-1),
            relative_leftover=relative_leftover(
                solution.value, still_to_go, v=v, params=end.params
            ),
            spectral_radius=radius,
            state=solution.state,
        )


class _LinearizedStep:
    """F = s − Φ(s, φ) at the end of the inner loop, with its graph to s and φ.

    Attributes:
        point: s as leaves: θ, then the tensors of the optimiser's state, each `[tasks, *shape]`.
        residuals: F, in the same order.
        gradient: ∂f/∂θ by parameter.
    """

    def __init__(
        self, problem: LiftedProblem, inner: InnerLoop, end: Iterate, *, meta: Params, data: Any
    ) -> None:
        tensors = slot_tensors(end)
        leaves = {slot: x.detach().requires_grad_() for slot, x in tensors.items()}

        @reject_random_numbers
        def loss(params: Params) -> Tensor:
            losses = problem.inner(params, meta, data)
            check_twice_differentiable([losses], params.values(), ends=meta.values())
            return losses

        next_end, self.gradient = differentiable_step(
            loss,
            inner,
            with_slot_tensors(end, leaves),
            meta,
        )
        next_tensors = slot_tensors(next_end)
        self.point = list(leaves.values())
        self.residuals = [x - next_tensors[slot] for slot, x in leaves.items()]

    def pad(self, vectors: Params) -> Tensor:
        """∂g/∂s `[tasks, N]` from ∂g/∂θ: g does not read the state of the optimiser."""
        v = flatten(vectors)
        rest = sum(x[0].numel() for x in self.point) - v.shape[1]
        return torch.cat([v, v.new_zeros(len(v), rest)], dim=1)


def spectral_radius(operator: TransposedJacobian, start: Tensor, steps: int) -> Tensor:
    """An estimate of the largest |eigenvalue| of I − A for each task, `[tasks]`.

    It is the mean growth of a power iteration over its last half. The loop converges near its fixed
    point if the radius is below 1, by this factor a step in the long run.

    Args:
        operator: A, whose product costs one differentiated step.
        start: The first vector, `[tasks, N]`.
        steps: The number of products, ≥ 1.
    """
    x = start
    log_growth = []
    for _ in range(steps):
        size = x.norm(dim=-1, keepdim=True)
        x = x / torch.where(size > 0, size, 1.0)
        x = x - operator.matvec(x)
        log_growth.append(x.norm(dim=-1).log())
    return torch.stack(log_growth[steps // 2 :]).mean(0).exp()
