"""Is a hypergradient right? Finite differences, a dense solve, and a verdict in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.diagnostics.differences import (
    Differences,
    cosine,
    directions_of_entries,
    dot,
    find_padding,
    random_directions,
    relative_error,
    settled_differences,
    step_size,
)
from metaimplicit.diagnostics.smoothness import has_kink
from metaimplicit.diagnostics.verdict import Check, judge
from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import FirstOrder, Implicit, Method, Unrolled, make_method
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem
from metaimplicit.solvers import Dense, Status
from metaimplicit.tensors import recordable
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import AutoVectorize


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
    which are then extrapolated; where these disagree, as across a kink, h/100 and h/10⁴ are tried.
    Use float64: in float32 the differences themselves are known to a few digits. An implicit method
    differentiates the argmin and not θ_T, so the two disagree far from a stationary point. The
    verdict says which of the reasons for a disagreement applies.

    Args:
        problem: As for `hypergradient`. Its losses must be deterministic.
        meta: As for `hypergradient`.
        data: As for `hypergradient`.
        inner: As for `hypergradient`.
        method: As for `hypergradient`.
        batched: As for `hypergradient`.
        vectorize: As for `hypergradient`.
        directions: The number of random directions in all of φ, ≥ 1. If φ has several entries, up
            to 16 with the smallest derivatives have a direction of their own, since the others
            would hide an error of theirs.
        tolerance: The relative error up to which the verdict is "Right".
        seed: Seeds the random directions.

    Raises:
        ValueError: As in `hypergradient`; `meta` has no floating-point entry; `directions` or
            `tolerance` is out of range; the outer loss receives all iterates; a loss has another
            value in a second call.

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
    check_count("directions", directions)
    if not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}, expected a number ≥ 0")
    if isinstance(method, Unrolled) and method.iterates:
        raise ValueError(
            "method: got Unrolled(iterates=True), expected a method whose outer loss "
            "receives θ_T, so that it can be compared"
        )
    method = make_method(method)
    inner = make_inner(inner)
    result = hypergradient(
        problem,
        meta,
        data,
        inner=inner,
        method=method,
        batched=batched,
        vectorize=vectorize,
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
    params = _with_task_axis(result, batched)
    procedure = _Procedure(lifted, inner)
    procedure.check_deterministic(values, params)
    entries = _entries(values)
    if not entries:
        raise ValueError(f"meta: got {list(meta)}, expected a floating-point entry")
    padding = find_padding(lifted, values, last_step=inner.steps)
    grads = {name: result.grads[name] for name in entries}
    names = _smallest_entries(grads) if len(entries) > 1 else []
    units = [
        *random_directions(entries, count=directions, seed=seed, fixed=padding),
        *directions_of_entries(entries, names, seed=seed, fixed=padding),
    ]
    steps = [step_size(entries)] * directions
    steps += [step_size({name: entries[name]}) for name in names]
    slopes = torch.stack([dot(grads, unit) for unit in units])
    differences = settled_differences(
        procedure.outer_loss,
        values,
        units,
        steps=slopes.new_tensor(steps),
        tolerance=tolerance,
    )
    whole = differences.rows(slice(directions)).compare(slopes[:directions])

    dense = _compare_with_dense(result, lifted, values, inner=inner, method=method)
    report = result.report
    check = Check(
        slopes=slopes[:directions],
        differences=differences.extrapolated[:directions],
        error=whole.error,
        noise=whole.noise,
        kink=whole.kink,
        dense_error=None if dense is None else dense.error,
        cosine=None if dense is None else dense.cosine,
        residual=_largest(report.residual),
        inner_gradient_norm=float(report.inner_gradient_norm.max()),
        leftover=_largest(report.relative_leftover),
        negative_curvature=report.share(Status.NEGATIVE_CURVATURE),
    )
    of_entries = differences.rows(slice(directions, None))
    errors = _errors_of_entries(names, grads, of_entries, slopes[directions:], check)
    check = replace(check, entries=errors)
    kinked = isinstance(method, Implicit) and has_kink(
        lambda p: lifted.inner(p, values, lifted.at(inner.steps - 1)), params
    )
    return judge(check, method, inner, kinked=kinked, tolerance=tolerance)


def _largest(values: Tensor | None) -> float | None:
    """The largest value of a task, if there are any."""
    return None if values is None else float(values.max())


def _entries(meta: Params) -> Params:
    """The entries of φ that have a derivative."""
    return {name: m for name, m in meta.items() if m.is_floating_point()}


def _smallest_entries(gradients: Params, at_most: int = 16) -> list[str]:
    """The names of the entries with the smallest derivatives in a random direction."""
    sizes = {name: _typical_slope(gradient) for name, gradient in gradients.items()}
    return sorted(sizes, key=lambda name: sizes[name])[:at_most]


def _typical_slope(gradient: Tensor) -> float:
    """The root mean square of the derivative along random directions of norm one."""
    return float(gradient.norm()) / math.sqrt(max(gradient.numel(), 1))


def _errors_of_entries(
    names: list[str], gradients: Params, differences: Differences, slopes: Tensor, check: Check
) -> dict[str, float]:
    """The relative errors along directions of single entries, 0 where something explains them.

    Noise does, and kinks, and what the solve and the inner loop leave of the whole gradient, which
    may be more than all of a small entry.
    """
    whole = max(float(gradient.norm()) for gradient in gradients.values())
    leftover = 100 * whole * ((check.residual or 0.0) + (check.leftover or 0.0))
    errors = {}
    for row, name in enumerate(names):
        of_entry = slice(row, row + 1)
        typical = _typical_slope(gradients[name])
        found = differences.rows(of_entry)
        agreement = found.compare(slopes[of_entry], least_size=typical)
        # The noise of one direction is a sample. The round-off of a deep network is a multiple of
        # that of its value.
        unsure = 4 * max(agreement.noise, agreement.kink)
        unsolved = (leftover + 100 * float(found.roundoff.max())) / agreement.size
        is_explained = agreement.error <= max(unsure, unsolved)
        errors[name] = 0.0 if is_explained else agreement.error
    return errors


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
            if not torch.allclose(first, second, rtol=0, atol=0, equal_nan=True):
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
    names = list(_entries(meta))
    gradient = torch.cat([result.grads[name].flatten() for name in names])
    expected = torch.cat([exact.grads[name].flatten() for name in names])
    return _DenseComparison(relative_error(gradient, expected), cosine(gradient, expected))


def _with_task_axis(result: Hypergradient, batched: bool) -> Params:
    """θ*, `{name: [tasks, *shape]}`, batched or not."""
    if batched:
        return result.params
    return {name: p.unsqueeze(0) for name, p in result.params.items()}
