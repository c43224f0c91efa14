"""A hypergradient from first derivatives alone: the value function of f as a penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.buffers import at_rest
from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import UNSET, Adaptation, Gradients, Method
from metaimplicit.methods.linearize import reject_random_numbers
from metaimplicit.methods.report import Report
from metaimplicit.methods.shared import (
    data_at_solution,
    penalised_inner,
    reject_half_precision,
    run_inner,
)
from metaimplicit.options import option
from metaimplicit.params import Params, detached, flatten, leaves
from metaimplicit.solvers import SolverState, Status

RESIDUAL_TOLERANCE = 1e-2  # where a loop drifts; the bias is of this order at the usual strengths


@dataclass(frozen=True)
class ValueFunction(Method):
    """dg/dφ ≈ ∂g/∂φ(y) + λ(∂f/∂φ(y) − ∂f/∂φ(z)), where z ≈ argmin_θ f and y ≈ argmin_θ f + g/λ.

    It is the gradient of min_θ g + λ(f − min_θ f), which differs from the exact one by O(1/λ) if f
    is strongly convex (Kwon et al. 2023, F2SA, lemma 3.1). The loop for y starts from z. If the
    call continues another (`start`), it continues the y of that call.

    Args:
        strength: λ > 0. The larger, the smaller is the bias, and the more accurately y and z must
            be solved, since their errors are multiplied by λ.
        batch: With a `Stream`, the data of ∂f/∂φ.

    Raises:
        ValueError: λ is not positive, `start` is the end of a forward method, or the `batch` does
            not suit the data.

    Example:
        >>> from metaimplicit import BilevelProblem, GradientDescent
        >>> from metaimplicit.hypergradient import hypergradient
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: 0.5 * (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> result = hypergradient(
        ...     problem,
        ...     {"target": torch.tensor(3.0)},
        ...     data=None,
        ...     inner=GradientDescent(steps=1, lr=1.0),  # y = target − 1/λ
        ...     method=ValueFunction(strength=4.0),
        ... )
        >>> result.grads["target"]
        tensor(1.)
    """

    strength: float = option(10.0, flag="penalty")
    batch: Any = field(default=UNSET, repr=False)
    flag = "f2sa"
    reach = frozenset({"loss"})
    remedy = (
        "it reaches what the inner loss reads, but no step size and no starting point; "
        "use 'forward' or 'unrolled'"
    )
    argmin_objection = "no derivative without its outer loss"
    second_derivatives = False
    rereads = "all"

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"ValueFunction strength: got {self.strength}, expected a number > 0")

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop for z, and then for y, without a graph."""
        if problem.start is not None and problem.start.sensitivity is not None:
            raise ValueError(
                "start: got the end of 'forward' or 'real-time', expected that of 'f2sa'"
            )
        data = data_at_solution(problem, self.batch, "ValueFunction")
        outer_data = problem.at(inner.steps)
        run = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        reject_half_precision(self.flag, run.start)
        trajectory = run.trajectory
        report = Report(self.flag, trajectory.steps, trajectory.gradient_norm, drift=inner.drift)
        z = trajectory.end
        # Parameters that g alone reads stay where they are, since nothing would hold them.
        unread = {name: z.params[name] for name in run.dependencies.idle}

        # Losses at y and z are subtracted, so they see the same buffers, those of the loop for z.
        @at_rest
        def outer(params: Params, phi: Params) -> Tensor:
            return problem.outer(params | unread, phi, outer_data)[0]

        y = self._minimise_penalised(problem, inner, detached(meta), z=z, outer=outer)
        g_of = reject_random_numbers(lambda params: outer(params, meta), "outer loss")
        f_of = reject_random_numbers(at_rest(penalised_inner(problem, run, meta, data)))

        def pullback(vectors: Params, _: SolverState) -> tuple[Gradients, Report]:
            at_y = leaves(y.params)
            at_z = leaves(z.params)
            # The caller adds ∂g/∂φ(z), which the difference of the outer losses turns to ∂g/∂φ(y).
            g_at_y = g_of(at_y)
            g_at_z = g_of(at_z)
            f_at_y = f_of(at_y)
            f_at_z = f_of(at_z)
            value = (g_at_y - g_at_z).mean() + self.strength * (f_at_y - f_at_z).mean()

            # What only θ₀ depends on is out of reach. None makes the caller raise an error.
            thetas = [*at_y.values(), *at_z.values()]
            in_loss = find_dependencies([f_at_y, f_at_z], meta, params=thetas)
            reject_half_precision(self.flag, {name: meta[name] for name in in_loss})
            only_in_start = run.dependencies.start - in_loss

            phi = {name: m for name, m in meta.items() if m.requires_grad}
            values = torch.autograd.grad(value, list(phi.values()), allow_unused=True)
            gradients: Gradients = dict.fromkeys(meta)
            gradients |= dict(zip(phi, values, strict=True))
            gradients |= dict.fromkeys(only_in_start)
            residual = self._residual(g_of, f_of, y=y.params, z=z.params)
            near = residual <= RESIDUAL_TOLERANCE
            status = torch.where(near, int(Status.CONVERGED), int(Status.NOT_STATIONARY))
            return gradients, replace(report, residual=residual, status=status)

        end = replace(z, companion=y)
        return Adaptation(z.params, report, run.dependencies, end, pullback)

    def _residual(
        self,
        outer: Callable[[Params], Tensor],
        inner: Callable[[Params], Tensor],
        *,
        y: Params,
        z: Params,
    ) -> Tensor:
        """‖v − λ (∂f/∂θ(z) − ∂f/∂θ(y))‖/‖v‖ with v = ∂g/∂θ(y), `[tasks]`. It is 0 at the argmins.

        To first order, ∂f/∂θ(z) − ∂f/∂θ(y) = A (z − y), so this is the residual of A u = v at
        u = λ (z − y), by which the method replaces A⁻¹v.
        """
        at_y = leaves(y)
        at_z = leaves(z)
        g = outer(at_y).sum()
        v = _gradient(g, at_y)
        difference = _gradient(inner(at_z).sum(), at_z) - _gradient(inner(at_y).sum(), at_y)
        size = v.norm(dim=-1).clamp(min=torch.finfo(v.dtype).tiny)
        residual: Tensor = (v - self.strength * difference).norm(dim=-1) / size
        return residual

    def _minimise_penalised(
        self,
        problem: LiftedProblem,
        inner: InnerLoop,
        meta: Params,
        *,
        z: Iterate,
        outer: Callable[[Params, Params], Tensor],
    ) -> Iterate:
        """Where the inner loop on f + g/λ ends. It starts from z, or from the last call's y."""
        companion = None if problem.start is None else problem.start.companion
        start = replace(z, state={}) if companion is None else companion
        inner_loss = at_rest(problem.with_weights_at(z.params).inner)

        def penalised(params: Params, t: int) -> Tensor:
            f = inner_loss(params, meta, problem.at(t))
            return f + outer(params, meta) / self.strength

        trajectory = inner.run(
            penalised,
            start.params,
            meta,
            differentiated_steps=0,
            state=start.state,
        )
        return trajectory.end


def _gradient(total: Tensor, params: Params) -> Tensor:
    """∂total/∂θ, `[tasks, n]`."""
    gradients = torch.autograd.grad(
        total, list(params.values()), allow_unused=True, materialize_grads=True
    )
    return flatten(dict(zip(params, gradients, strict=True)))
