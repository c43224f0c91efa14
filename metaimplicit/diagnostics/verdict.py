"""What a check of a hypergradient measured, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metaimplicit.inner import InnerLoop
from metaimplicit.methods import Forward, Implicit, Method, Unrolled
from metaimplicit.methods.report import DRIFT_TOLERANCE, THETA_TOLERANCE

RIGHT = "Right: it agrees with finite differences."
HIDDEN = (
    "look for what autograd does not see in `init` and the losses, such as a detach(), or a wrong "
    "`backward` of an autograd.Function"
)


@dataclass(frozen=True)
class Check:
    """What `check_hypergradient` returns. All errors are relative.

    Attributes:
        slopes: The derivative of the outer loss along each direction, by the method,
            `[directions]`.
        differences: The same by finite differences of the whole procedure, inner loop included.
        error: ‖slopes − differences‖ / ‖differences‖.
        noise: The relative error that `differences` may have: their difference from those of one
            step size, or the round-off of the outer loss. An error below it says nothing.
        kink: By how much the outer loss has other slopes ahead of φ than behind it, relative to
            them. It is round-off unless the loss has a kink at φ or near it.
        entries: The error of entries of φ, each along a direction of its own and relative to its
            own derivative; 0 if noise, a kink, the solve or the inner loop explains it. Up to 16 of
            the smallest derivatives; empty if φ has one entry.
        dense_error: The error of the gradient against that of a dense solve of the same system.
            None if the method has no system, or one that is too large.
        cosine: That of the angle between these two gradients. None in the same cases.
        residual: The largest residual of the solve over the tasks. None without a solve.
        inner_gradient_norm: The largest over the tasks.
        leftover: The largest `Report.relative_leftover` of an implicit method: about the relative
            error of θ_T as a stationary point. None for other methods.
        negative_curvature: The share of tasks whose solve met negative curvature.
        verdict: Whether the hypergradient is right; if not, why, and what to do.

    Example:
        >>> import torch
        >>> from metaimplicit import BilevelProblem, GradientDescent, check_hypergradient
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
    leftover: float | None = None
    kink: float = 0.0
    entries: Mapping[str, float] = field(default_factory=dict)
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


def judge(
    check: Check, method: Method, inner: InnerLoop, *, kinked: bool, tolerance: float
) -> Check:
    """The check with its verdict: whether the hypergradient is right; if not, why, and what to do.

    Args:
        check: What was measured.
        method: The method.
        inner: The inner loop.
        kinked: Whether the inner loss has a kink at θ_T.
        tolerance: The relative error up to which the verdict is "Right".
    """
    unsettled = _why_unsettled(inner, kinked)
    verdict = _verdict(
        check,
        method,
        inner,
        tolerance=tolerance,
        unsettled=unsettled,
    )
    far = not _is_near(check, THETA_TOLERANCE)
    if far and (kinked or verdict == RIGHT) and unsettled not in verdict:
        # The steps may have the derivative that was given, but the argmin has another. A loop that
        # took no step has none at all.
        verdict = f"{verdict} But θ_T is no stationary point; {unsettled}."
    return replace(check, verdict=verdict)


def _why_unsettled(inner: InnerLoop, kinked: bool) -> str:
    """Why the loop may have ended away from a stationary point, and what to do."""
    if kinked:
        return (
            "the inner loss has a kink there, as a ReLU, a hinge or an ℓ1 term has, so that no "
            "step makes ∂f/∂θ vanish; use a smooth loss with smooth activations (tanh, GELU), "
            "or 'unrolled'; for an ℓ1 term, ProximalGradient with 'fixed-point'"
        )
    if inner.drift:
        return (
            f"{inner.drift} keeps the loop from settling; put the decay into the loss, as a "
            "penalty, or use 'unrolled'"
        )
    return (
        "use more inner steps, a larger step size, or 'unrolled', which differentiates θ_T as it is"
    )


def _is_near(check: Check, leftover: float) -> bool:
    """Whether θ_T is this near to a stationary point. The scale of the losses does not matter."""
    # A comparison with NaN is false, so that what is not finite is far.
    return check.leftover is None or check.leftover <= leftover


def _verdict(
    check: Check, method: Method, inner: InnerLoop, *, tolerance: float, unsettled: str
) -> str:
    """The first reason that applies for an error above the tolerance, and what to do."""
    if check.error <= tolerance:
        wrong = [name for name, error in check.entries.items() if not error <= tolerance]
        return _why_entries(check, method, wrong) if wrong else RIGHT
    if not bool(check.slopes.isfinite().all()):
        return "Wrong: it is not finite; lower the inner step size, or look at the losses."
    if not bool(check.differences.isfinite().all()):
        return (
            "Undecided: the finite differences are not finite, as the losses are not near φ; "
            "lower the inner step size, or look at the losses."
        )
    if check.noise > tolerance or 4 * check.noise >= check.error:
        is_coarse = check.differences.dtype != torch.float64
        smoother = "a smoother problem without kinks near these values, or a smaller outer loss"
        remedy = "float64 throughout" if is_coarse else smoother
        return (
            f"Undecided: the finite differences are known to {check.noise:.1e} only; use {remedy}."
        )
    if 4 * check.kink >= check.error:
        return (
            "Undecided: the outer loss has a kink at or near these meta-parameters: its slope to "
            f"one side differs from that to the other by {check.kink:.1e}; move them a little."
        )
    if isinstance(method, (Unrolled, Forward)):
        return f"Wrong by {check.error:.1e}, although {method.flag!r} is exact; {HIDDEN}."
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
    # An error of θ_T may be a hundred times as large in its derivative.
    explains = DRIFT_TOLERANCE if inner.drift else min(THETA_TOLERANCE, check.error / 100)
    if not _is_near(check, explains):
        return (
            "Wrong: the solve is fine, but θ_T is no stationary point "
            f"(‖∂f/∂θ‖ = {check.inner_gradient_norm:.1e}); {unsettled}."
        )
    if not method.is_hessian or method.damping > 0:
        return (
            f"Wrong by {check.error:.1e}: solved and stationary, so it is A "
            f"({method.curvature_name}, damping {method.damping})."
        )
    return (
        f"Wrong by {check.error:.1e}, although the solve, stationarity and A are in order; "
        f"{HIDDEN}."
    )


def _why_entries(check: Check, method: Method, names: list[str]) -> str:
    """Why entries of φ are wrong whose derivatives are small beside those of the others."""
    error = max(check.entries[name] for name in names)
    if isinstance(method, Implicit):
        is_exact = method.is_hessian and method.damping == 0 and check.negative_curvature == 0
        of_a = f"it may be A ({method.curvature_name}, damping {method.damping})"
        reason = HIDDEN if is_exact else of_a
    elif {"loop", "loss"} <= method.reach:
        reason = HIDDEN
    else:
        reason = "this method leaves out part of it, and 'unrolled' is exact"
    return (
        f"Wrong by {error:.1e} in {', '.join(map(repr, names))}, whose derivative is small beside "
        f"those of the others; {reason}."
    )
