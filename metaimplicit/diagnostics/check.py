"""Is a hypergradient right? Finite differences, a dense solve, and a verdict in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.data import recordable
from metaimplicit.diagnostics.differences import (
    dot,
    extrapolated_differences,
    find_padding,
    random_directions,
    relative_error,
    step_size,
)
from metaimplicit.diagnostics.smoothness import has_kink
from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import FirstOrder, Implicit, Method, Unrolled, make_method
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem
from metaimplicit.solvers import Dense, Status
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import AutoVectorize


@dataclass(frozen=True)
class Check:
    """What `check_hypergradient` returns. All errors are relative.

    Attributes:
        slopes: The derivative of the outer loss along each direction, by the method,
            `[directions]`.
        differences: The same by finite differences of the whole procedure, inner loop included.
        error: ‖slopes − differences‖ / ‖differences‖.
        noise: The relative difference of `differences` from those of one step size. An error below
            it says nothing.
        dense_error: The error of the gradient against that of a dense solve of the same system.
            None if the method has no system, or one that is too large.
        cosine: That of the angle between these two gradients. None in the same cases.
        residual: The largest residual of the solve over the tasks. None without a solve.
        inner_gradient_norm: The largest over the tasks.
        negative_curvature: The share of tasks whose solve met negative curvature.
        verdict: Whether the hypergradient is right; if not, why, and what to do.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros((), dtype=torch.float64)},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"].square(),
        ... )
        >>> meta = {"target": torch.tensor(3.0, dtype=torch.float64)}
        >>> inner = GradientDescent(steps=2, lr=0.1)
        >>> print(check_hypergradient(problem, meta, None, inner=inner, method="cg").verdict)
        Wrong: the solve is fine, but θ_T is no stationary point (‖∂f/∂θ‖ = 3.8e+00); use more ...
    """

    slopes: Tensor
    differences: Tensor
    error: float
    noise: float
    dense_error: float | None
    cosine: float | None
    residual: float | None
    inner_gradient_norm: float
    negative_curvature: float
    verdict: str = ""

    def __str__(self) -> str:
        lines = [f"against finite differences  {self.error:.1e} (known to {self.noise:.1e})"]
        if self.dense_error is not None:
            lines.append(
                f"against the dense solve     {self.dense_error:.1e}, cosine {self.cosine:.6f}"
            )
        if self.residual is not None:
            lines.append(f"residual of the solve       {self.residual:.1e}")
            lines.append(f"negative curvature          {self.negative_curvature:.0%} of the tasks")
        lines.append(f"inner gradient norm         {self.inner_gradient_norm:.1e}")
        return "\n".join([*lines, self.verdict])


@explain_unsupported()
@torch.inference_mode(False)
def check_hypergradient(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop,
    method: str | Method,
    batched: bool = False,
    vectorize: AutoVectorize = "auto",
    directions: int = 3,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Check:
    """Compare a hypergradient with finite differences, and with a dense solve if n allows it.

    The function φ ↦ mean_tasks g(θ_T(φ), φ) is differentiated along random unit directions by
    central differences at two step sizes, h = ε^⅓ (1 + ‖φ‖) and h/2 with ε the unit round-off,
    which are then extrapolated. Use float64: in float32 the differences themselves are known to a
    few digits. An implicit method differentiates the argmin and not θ_T, so the two disagree far
    from a stationary point. The verdict says which of the reasons for a disagreement applies.

    Args:
        problem: As for `hypergradient`. Its losses must be deterministic.
        meta: As for `hypergradient`.
        data: As for `hypergradient`.
        inner: As for `hypergradient`.
        method: As for `hypergradient`.
        batched: As for `hypergradient`.
        vectorize: As for `hypergradient`.
        directions: The number of random directions, ≥ 1.
        tolerance: The relative error up to which the verdict is "Right".
        seed: Seeds the random directions.

    Raises:
        ValueError: As in `hypergradient`; `meta` has no floating-point entry; `directions` is less
            than 1; the outer loss receives all iterates; a loss has another value in a second call.

    Example:
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros((), dtype=torch.float64)},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"].square(),
        ... )
        >>> meta = {"target": torch.tensor(3.0, dtype=torch.float64)}
        >>> check_hypergradient(problem, meta, None, inner="newton-cg", method="dense").verdict
        'Right: it agrees with finite differences.'
    """
    if directions < 1:
        raise ValueError(f"directions: got {directions}, expected at least 1")
    if isinstance(method, Unrolled) and method.iterates:
        raise ValueError(
            "method: got Unrolled(iterates=True), expected a method whose outer loss "
            "receives θ_T, so that it can be compared"
        )
    method = make_method(method)
    inner = make_inner(inner)
    result = hypergradient(
        problem, meta, data, inner=inner, method=method, batched=batched, vectorize=vectorize
    )

    way: Vectorize = "loop" if result.report.tasks_by.startswith("loop") else "vmap"
    lifted = LiftedProblem(
        problem,
        data,
        batched=batched,
        vectorize=way,
        second_derivatives=inner.second_derivatives,
    )
    values = {name: recordable(m).detach() for name, m in meta.items()}
    procedure = _Procedure(lifted, inner)
    procedure.check_deterministic(values, params=_with_task_axis(result, batched))

    entries = {name: m for name, m in values.items() if m.is_floating_point()}
    if not entries:
        raise ValueError(f"meta: got {list(meta)}, expected a floating-point entry")
    padding = find_padding(lifted, values, last_step=inner.steps)
    units = random_directions(entries, count=directions, seed=seed, fixed=padding)
    slopes = torch.stack([dot(result.grads, unit) for unit in units])

    differences = extrapolated_differences(
        procedure.outer_loss, values, units, step=step_size(entries)
    )
    dense = _compare_with_dense(result, lifted, values, inner=inner, method=method)
    params = _with_task_axis(result, batched)
    kinked = isinstance(method, Implicit) and has_kink(
        lambda p: lifted.inner(p, values, lifted.at(inner.steps - 1)), params
    )
    report = result.report
    check = Check(
        slopes=slopes,
        differences=differences.extrapolated,
        error=relative_error(slopes, differences.extrapolated),
        noise=relative_error(differences.half_step, differences.extrapolated),
        dense_error=None if dense is None else dense.error,
        cosine=None if dense is None else dense.cosine,
        residual=None if report.residual is None else float(report.residual.max()),
        inner_gradient_norm=float(report.inner_gradient_norm.max()),
        negative_curvature=report.share(Status.NEGATIVE_CURVATURE),
    )
    unsettled = _why_unsettled(inner, kinked)
    verdict = _verdict(check, method, tolerance, unsettled)
    if kinked and check.inner_gradient_norm > tolerance and unsettled not in verdict:
        # The steps may have the derivative that was given, but the argmin has another.
        verdict = f"{verdict} But θ_T is no stationary point; {unsettled}."
    return replace(check, verdict=verdict)


@dataclass(frozen=True)
class _Procedure:
    """φ ↦ mean_tasks g(θ_T(φ), φ), the function that the hypergradient is the gradient of."""

    problem: LiftedProblem
    inner: InnerLoop

    def outer_loss(self, meta: Params) -> Tensor:
        params = FirstOrder().adapt(self.problem, self.inner, meta).params
        data = self.problem.at(self.inner.steps)
        losses, _ = self.problem.outer(params, meta, data)
        return losses.mean().detach()

    def check_deterministic(self, meta: Params, params: Params) -> None:
        """Raise ValueError if a loss has another value in a second call."""

        def inner_losses() -> Tensor:
            return self.problem.inner(params, meta, self.problem.at(0)).detach()

        both = {
            "inner loss": (inner_losses(), inner_losses()),
            "outer loss": (self.outer_loss(meta), self.outer_loss(meta)),
        }
        for name, (first, second) in both.items():
            if not torch.equal(first, second):
                raise ValueError(
                    f"{name}: got two values in two calls, expected one; "
                    "fix the seed, or switch dropout off"
                )


@dataclass(frozen=True)
class _DenseComparison:
    """The relative error of a gradient against that of a dense solve, and the cosine of both."""

    error: float
    cosine: float


def _compare_with_dense(
    result: Hypergradient, lifted: LiftedProblem, meta: Params, *, inner: InnerLoop, method: Method
) -> _DenseComparison | None:
    """A result of an implicit method against that of a dense solve. None if there can be none."""
    n = sum(p[0].numel() for p in _with_task_axis(result, lifted.batched).values())
    if not isinstance(method, Implicit) or n > Dense().max_size:
        return None
    method = replace(method, solver=Dense())
    exact = hypergradient(
        lifted.problem,
        meta,
        lifted.data,
        inner=inner,
        method=method,
        batched=lifted.batched,
        vectorize=lifted.vectorize,
    )
    names = [name for name, m in meta.items() if m.is_floating_point()]
    gradient = torch.cat([result.grads[name].flatten() for name in names])
    expected = torch.cat([exact.grads[name].flatten() for name in names])
    cosine = torch.nn.functional.cosine_similarity(gradient, expected, dim=0)
    return _DenseComparison(relative_error(gradient, expected), float(cosine))


def _why_unsettled(inner: InnerLoop, kinked: bool) -> str:
    """Why the loop may have ended away from a stationary point, and what to do."""
    if kinked:
        return (
            "the inner loss has a kink there, as an ℓ1 term or a hinge has, so that no step makes "
            "∂f/∂θ vanish; use ProximalGradient with 'fixed-point', a smooth loss, or 'unrolled'"
        )
    if inner.drift:
        return (
            f"{inner.drift} keeps the loop from settling; put the decay into the loss, as a "
            "penalty, or use 'unrolled'"
        )
    return (
        "use more inner steps, a larger step size, or 'unrolled', which differentiates θ_T as it is"
    )


def _verdict(check: Check, method: Method, tolerance: float, unsettled: str) -> str:
    """The first reason that applies for an error above the tolerance, and what to do."""
    if check.error <= tolerance:
        return "Right: it agrees with finite differences."
    if check.noise > tolerance:
        return (
            f"Undecided: the finite differences are known to {check.noise:.1e} only; "
            "use float64, or a smoother problem without kinks between their points."
        )
    if not isinstance(method, Implicit):
        complete = {"loop", "loss"} <= method.reach
        reason = "" if complete else ", as this method leaves out part of it"
        return f"Wrong by {check.error:.1e}{reason}; 'unrolled' is exact."
    if check.negative_curvature > 0:
        return (
            "Wrong: the curvature is not positive definite; "
            "use curvature='gauss-newton', more damping, or MINRES."
        )
    solve_error = check.residual if check.dense_error is None else check.dense_error
    if solve_error is not None and solve_error > tolerance:
        return (
            "Wrong: the linear system is not solved; "
            "use more solver steps, more rank, or NystromCG."
        )
    if check.inner_gradient_norm > tolerance:
        return (
            "Wrong: the solve is fine, but θ_T is no stationary point "
            f"(‖∂f/∂θ‖ = {check.inner_gradient_norm:.1e}); {unsettled}."
        )
    if method.curvature_name != "hessian" or method.damping > 0:
        return (
            f"Wrong by {check.error:.1e}: solved and stationary, so it is A "
            f"({method.curvature_name}, damping {method.damping})."
        )
    return (
        f"Wrong by {check.error:.1e}, although the solve, stationarity and A are in order; "
        "look for a dependence on φ that the losses hide, such as a detach()."
    )


def _with_task_axis(result: Hypergradient, batched: bool) -> Params:
    """θ*, `{name: [tasks, *shape]}`, batched or not."""
    if batched:
        return result.params
    return {name: p.unsqueeze(0) for name, p in result.params.items()}
