"""A case run and judged.

The verdicts:

- `right`: every oracle that decides agrees, whatever was flagged.
- `flagged`: the value is off, and the call said so (`subject.call` has the rule).
- `refused`: the project's own exception, whose message says what to do.
- `torch`: any other exception.
- `undecided`: no oracle decides, or two of them contradict each other.
- `wrong`: the value is off, and nothing said so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuzz import oracles
from fuzz.case import ADAPTIVE, SLOPED, SOLVED, Case
from fuzz.dense import argmin, formula
from fuzz.models import default_dtype
from fuzz.problems import Plain, Values
from fuzz.subject import Outcome, call
from fuzz.tolerances import ARGMIN_DISTANCE, CONFLICT, DRIFT, SMALLEST, TABLE, UNDECIDABLE

RIGHT, FLAGGED, REFUSED = "right", "flagged", "refused"
TORCH, UNDECIDED, WRONG = "torch", "undecided", "wrong"
VERDICTS = (RIGHT, FLAGGED, REFUSED, TORCH, UNDECIDED, WRONG)
BAD = (TORCH, WRONG)


class Check(NamedTuple):
    """A relative error and its tolerance, by one oracle. An error of None decides nothing."""

    oracle: str
    error: float | None
    tolerance: float

    @property
    def off(self) -> bool:
        return self.error is not None and not self.error <= self.tolerance

    def __str__(self) -> str:
        error = "undecided" if self.error is None else f"{self.error:.1e}"
        return f"{self.oracle} {error} (tolerance {self.tolerance:.0e})"


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    Attributes:
        case: the case.
        kind: one of `VERDICTS`.
        reason: the checks, or the exception, in a line.
        differences: whether finite differences decided.
    """

    case: Case
    kind: str
    reason: str
    differences: bool = False

    @property
    def bad(self) -> bool:
        return self.kind in BAD

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}\n    {self.case}"


def judge(case: Case) -> Verdict:
    """Run a case and hold the result against the oracles that apply."""
    outcome = call(case)
    if outcome.error is not None:
        kind = REFUSED if outcome.refusal else TORCH
        return Verdict(case, kind, f"{type(outcome.error).__name__}: {_line(outcome.error)}")

    # attention that has a second derivative, and optimisers that keep their numbers in float64
    with sdpa_kernel(SDPBackend.MATH), default_dtype(torch.float64):
        checks = list(_checks(Plain(case), outcome))
    decided = [check for check in checks if check.error is not None]
    reason = "; ".join(map(str, checks))
    seen = any(check.oracle == "differences" for check in decided)
    if not any(check.oracle != "value" for check in decided):
        return Verdict(case, UNDECIDED, reason or "no oracle applies")
    off = [check for check in decided if check.off]
    if not off:
        return Verdict(case, RIGHT, reason, seen)
    if case.dropout:  # another order of random draws is no error
        return Verdict(case, UNDECIDED, f"random draws, {reason}")
    # differences leave a padding row alone, so they cannot contradict what is said of it
    if _contradict(decided) and not case.padding:
        return Verdict(case, UNDECIDED, f"the oracles contradict each other: {reason}")
    if outcome.flags:
        return Verdict(case, FLAGGED, f"{reason}; {outcome.flags[0][:60]}", seen)
    return Verdict(case, WRONG, reason, seen)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _contradict(checks: list[Check]) -> bool:
    """Whether an oracle fine enough to see the error of another does not see it."""
    gradients = [check for check in checks if check.oracle != "value"]
    return any(
        one.off and not other.off and other.tolerance < CONFLICT * one.error
        for one in gradients
        for other in gradients
    )


def _checks(plain: Plain, outcome: Outcome) -> Iterator[Check]:
    case = plain.case
    if not case.implicit:
        yield from _path_checks(plain, outcome)
    elif case.decoupled_decay > 0:
        yield _settled_check(plain, outcome)
    else:
        yield from _implicit_checks(plain, outcome)


def _path_checks(plain: Plain, outcome: Outcome) -> Iterator[Check]:
    """Methods that differentiate the T steps."""
    case = plain.case
    if case.inner in ADAPTIVE and case.method != "first-order" and oracles.divides_by_zero(plain):
        yield Check("rounding", None, math.nan)
        return
    if case.inner in SLOPED or case.method == "first-order":
        torch.manual_seed(case.index)
        grads, loss = oracles.unrolled_loop(plain)
        kind = "adaptive" if case.inner in ADAPTIVE else "plain"
        tolerance = TABLE[case.dtype, "loop", kind].at(0.0)
        yield Check("loop", _error(outcome.grads, grads), tolerance)
        yield Check("value", _number_error(outcome.loss, loss), tolerance)
    if case.method in ("unrolled", "forward") and not case.dropout:
        tolerance = TABLE[case.dtype, "differences", "path"].at(0.0)
        for seed in (0, 1):
            along = oracles.direction(plain, seed)
            scale = oracles.norm(outcome.grads)
            slope = oracles.difference_slope(
                lambda phi: oracles.outer_of_loop(plain, phi), plain.meta, along, scale
            )
            yield _slope_check(outcome.grads, along, slope, tolerance)


def _implicit_checks(plain: Plain, outcome: Outcome) -> Iterator[Check]:
    """The dense formula at the θ that the loop reaches, and differences of the argmin."""
    case = plain.case
    if case.inner in SOLVED:
        thetas = outcome.params
    else:
        thetas = [oracles.descend(plain, plain.meta, task) for task in plain.tasks]
        if case.steps > 10 and oracles.is_unstable(plain, thetas):
            yield Check("rounding", None, math.nan)
            return
    if not all(bool(p.isfinite().all()) for theta in thetas for p in theta.values()):
        yield Check("formula", None, math.nan)
        return
    readings, loss, condition = formula(plain, thetas)
    row = TABLE[case.dtype, "formula", _solve_kind(case)]
    error = min(_error(outcome.grads, grads) for grads in readings.values())
    yield _or_undecided(Check("formula", error, row.at(condition)))
    value = TABLE[case.dtype, "loop", "adaptive" if case.inner in ADAPTIVE else "plain"].at(0.0)
    yield Check("value", _number_error(outcome.loss, loss), value)

    ends = _argmins(plain, thetas) if _is_exact(case) else None
    if ends is not None:

        def outer(phi: Values) -> float:
            losses = []
            for task, end in zip(plain.tasks, ends, strict=True):
                theta = argmin(plain, phi, task, end)
                losses.append(
                    math.nan if theta is None else float(plain.outer(theta, phi, task).detach())
                )
            return sum(losses) / len(losses)

        along = oracles.direction(plain, 0)
        scale = oracles.norm(outcome.grads)
        slope = oracles.difference_slope(outer, plain.meta, along, scale)
        tolerance = TABLE[case.dtype, "differences", "argmin"].at(condition)
        yield _or_undecided(_slope_check(outcome.grads, along, slope, tolerance))


def _settled_check(plain: Plain, outcome: Outcome) -> Check:
    """Differences of AdamW's loop, whose decoupled decay is in no loss."""
    along = oracles.direction(plain, 0)
    scale = oracles.norm(outcome.grads)
    half, whole = (
        oracles.difference_slope(
            lambda phi, t=steps: oracles.outer_of_loop(plain, phi, t), plain.meta, along, scale
        )
        for steps in (plain.case.steps // 2, plain.case.steps)
    )
    if half is None or whole is None:
        return Check("differences", None, math.nan)
    drift = _ratio(abs(whole.value - half.value), max(abs(whole.value), scale))
    tolerance = TABLE["float64", "differences", "settled"].at(drift)
    check = _slope_check(outcome.grads, along, whole, tolerance)
    return check if drift <= DRIFT else check._replace(error=None)


def _argmins(plain: Plain, thetas: list[Values]) -> list[Values] | None:
    """The minimum near each θ, or None where a loop did not end at one."""
    ends = []
    for task, theta in zip(plain.tasks, thetas, strict=True):
        end = argmin(plain, plain.meta, task, theta)
        if end is None:
            return None
        distance = oracles.norm({name: end[name] - p for name, p in theta.items()})
        if distance > ARGMIN_DISTANCE * max(1.0, oracles.norm(end)):
            return None
        ends.append(end)
    return ends


def _is_exact(case: Case) -> bool:
    """Whether the method claims the derivative of the argmin: A the Hessian, undamped, solved."""
    linear = case.model in ("linear", "spare") or case.adapt == "head"
    hessian = case.matrix == "hessian" or (case.matrix == "gauss-newton" and linear)
    solved = case.solver in ("dense", "auto") or (
        case.solver in ("cg", "minres", "lanczos", "nystrom-cg") and case.solver_steps > 100
    )
    settled = case.steps > 10 and case.inner not in ADAPTIVE
    return hessian and solved and settled and case.damping == 0


def _solve_kind(case: Case) -> str:
    """The row of the tolerance table."""
    if case.products == "finite-differences":
        # Running statistics are given, between 0.5 and 2.
        is_normalised = case.norm not in ("none", "eval-batch")
        return "normalised difference products" if is_normalised else "difference products"
    if case.solver in ("cg", "minres", "lanczos", "nystrom-cg"):
        return "loose krylov" if case.bare else "krylov"
    if case.solver == "nystrom":
        return "sketch"
    return "polynomial" if case.solver in ("neumann", "t1-t2") else "direct"


def _or_undecided(check: Check) -> Check:
    return check._replace(error=None) if not check.tolerance <= UNDECIDABLE else check


def _error(got: Values, want: Values) -> float:
    """‖got − want‖/‖want‖ over all entries; infinite where a name is missing or not finite."""
    if got.keys() != want.keys():
        return math.inf
    error = oracles.norm({name: got[name] - want[name] for name in want})
    return _ratio(error, oracles.norm(want))


def _slope_check(
    grads: Values, along: Values, slope: oracles.Slope | None, tolerance: float
) -> Check:
    """A hypergradient against a slope, whose doubt adds to the tolerance."""
    if slope is None:
        return Check("differences", None, tolerance)
    size = max(abs(slope.value), oracles.norm(grads))
    error = _ratio(abs(oracles.dot(grads, along) - slope.value), size)
    return Check("differences", error, tolerance + _ratio(slope.doubt, size))


def _number_error(got: float | None, want: float) -> float | None:
    return None if got is None else _ratio(abs(got - want), abs(want))


def _ratio(error: float, size: float) -> float:
    """The relative error, with `SMALLEST` for the size of what is smaller."""
    return error / max(size, SMALLEST) if math.isfinite(error) else math.inf
