"""What a hypergradient should be, in plain torch: a loop for each task, and finite differences.

Nothing here or in `dense` imports metaimplicit. All of it runs in float64, one task at a time, and
with torch's attention kernel that has a second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from fuzz.case import Case
from fuzz.models import PADDED
from fuzz.problems import Plain, Task, Values
from fuzz.tolerances import AMPLIFICATION, DIFFERENCE_AGREEMENT, DIFFERENCE_STEP, ZERO_GRADIENT

Slots = dict[str, Any]


def descend(plain: Plain, phi: Values, task: Task, steps: int | None = None) -> Values:
    """θ_T by torch.optim on a copy of the model."""
    case = plain.case
    model, loss = plain.copy_with(phi)
    params = {name: p for name, p in model.named_parameters() if name in plain.adapted}
    name = "SGD" if case.inner == "GradientDescent" else case.inner
    optimizer = getattr(torch.optim, name)(
        list(params.values()), lr=float(plain.lr(phi)), **dict(case.options)
    )
    for _ in range(steps or case.steps):
        optimizer.zero_grad()
        loss(task).backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def unrolled_loop(plain: Plain) -> tuple[Values, float]:
    """dg/dφ by reverse mode through the last K steps, and g, both the mean over tasks.

    K is all of them, none for first order. The steps before pull back as the identity.
    """
    case = plain.case
    kept = {"truncated": case.solver_steps, "first-order": 0}.get(case.method, case.steps)
    phi = {name: m.clone().requires_grad_() for name, m in plain.meta.items()}
    losses = []
    for task in plain.tasks:
        start = plain.start(phi)
        if kept == 0:
            end = descend(plain, plain.meta, task)
            theta = {n: p + (start[n] - start[n].detach()) for n, p in end.items()}
        else:
            theta = _steps(plain, phi, task, start, kept)
        losses.append(plain.outer(theta, phi, task))
    total = torch.stack(losses).mean()
    slopes = grad(total, list(phi.values()), allow_unused=True)
    return _filled(phi, slopes), float(total.detach())


def _steps(plain: Plain, phi: Values, task: Task, start: Values, kept: int) -> Values:
    case = plain.case
    theta = {
        name: p if p.requires_grad else p.clone().requires_grad_() for name, p in start.items()
    }
    state: dict[str, Slots] = {name: {} for name in theta}
    for t in range(case.steps):
        tracked = t >= case.steps - kept
        if not tracked or t == case.steps - kept > 0:
            theta = {n: p.detach() + (start[n] - start[n].detach()) for n, p in theta.items()}
            theta = {n: p if p.requires_grad else p.requires_grad_() for n, p in theta.items()}
            state = {n: {k: _detached(x) for k, x in slots.items()} for n, slots in state.items()}
        loss = plain.inner(theta, phi, task)
        slopes = grad(loss, list(theta.values()), create_graph=tracked, allow_unused=True)
        lr = plain.lr(phi)
        theta = {
            name: p if g is None else _step(case, lr, state[name], p, g)
            for (name, p), g in zip(theta.items(), slopes, strict=True)
        }
    return theta


def _step(case: Case, lr: float | Tensor, slots: Slots, p: Tensor, g: Tensor) -> Tensor:
    """One step of SGD, Adam or AdamW on one tensor, as torch's documentation states them."""
    options = dict(case.options)
    decay = options.get("weight_decay", 0.01 if case.inner == "AdamW" else 0.0)
    if case.inner == "AdamW":
        p = p - lr * decay * p
    else:
        g = g + decay * p
    if case.inner in ("Adam", "AdamW"):
        t = slots["t"] = slots.get("t", 0) + 1
        slots["m"] = 0.9 * slots.get("m", 0.0) + 0.1 * g
        slots["v"] = 0.999 * slots.get("v", 0.0) + 0.001 * g * g
        root = (slots["v"] / (1 - 0.999**t)).clamp(min=1e-300).sqrt()
        return p - lr * slots["m"] / (1 - 0.9**t) / (root + 1e-8)

    momentum = options.get("momentum", 0.0)
    if momentum:
        kept = 1 - options.get("dampening", 0.0) if "b" in slots else 1.0
        slots["b"] = momentum * slots.get("b", 0.0) + kept * g
        g = g + momentum * slots["b"] if options.get("nesterov") else slots["b"]
    return p - lr * g


def outer_of_loop(plain: Plain, phi: Values, steps: int | None = None) -> float:
    """mean g(θ_T(φ), φ), the whole procedure."""
    with torch.no_grad():
        losses = []
        for task in plain.tasks:
            with torch.enable_grad():
                theta = descend(plain, phi, task, steps)
            losses.append(plain.outer(theta, phi, task))
        return float(torch.stack(losses).mean())


def is_unstable(plain: Plain, ends: list[Values]) -> bool:
    """Whether the loop that ended at `ends` amplifies rounding errors beyond the tolerance.

    Such is gradient descent with too large a step, or past a saddle point. The nudge of θ₀ is of
    the size of rounding errors: a larger one may shrink before the loop begins to amplify.
    """
    nudge = 1e-14
    along = direction(plain, 2)
    starts = [name for name in plain.meta if name in plain.adapted]
    nudged = plain.meta | {n: plain.meta[n] + nudge * along[n] for n in starts}
    shifted = plain.with_start_moved(nudge) if not starts else plain
    for task, end in zip(plain.tasks, ends, strict=True):
        other = descend(shifted, nudged, task)
        if norm({name: other[name] - p for name, p in end.items()}) > AMPLIFICATION * nudge:
            return True
    return False


def divides_by_zero(plain: Plain) -> bool:
    """Whether an adaptive optimiser meets a gradient near zero that the penalty acts upon.

    Its step has the slope 1/ε = 1e8 there. The derivative stays finite as terms of that size
    cancel, which leaves rounding errors of 1e-16 · 1e8 for each step, multiplied over steps.
    """
    if plain.case.coupled_decay == 0 and not float(torch.as_tensor(plain.strength(plain.meta))) > 0:
        return False
    for task in plain.tasks:
        for steps in range(plain.case.steps):
            theta = descend(plain, plain.meta, task, steps) if steps else plain.start(plain.meta)
            theta = {name: p.clone().requires_grad_() for name, p in theta.items()}
            loss = plain.inner(theta, plain.meta, task)
            slopes = grad(loss, list(theta.values()), allow_unused=True)
            if any(bool((g.abs() < ZERO_GRADIENT).any()) for g in slopes if g is not None):
                return True
    return False


def direction(plain: Plain, seed: int) -> Values:
    """A random unit direction in φ. It leaves a padding row alone, which torch holds constant."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.randn(m.shape, generator=generator, dtype=torch.float64)
        for name, m in plain.meta.items()
    }
    if plain.case.padding and PADDED in parts:
        parts[PADDED][0] = 0.0
    length = torch.stack([part.norm() for part in parts.values()]).norm()
    return {name: part / length for name, part in parts.items()}


class Slope(NamedTuple):
    """A slope by finite differences, and by how much two step sizes differ on it."""

    value: float
    doubt: float


def difference_slope(
    function: Callable[[Values], float], phi: Values, along: Values, scale: float
) -> Slope | None:
    """The slope of `function` along a direction, extrapolated from two step sizes.

    A kink between the points makes both of them wrong alike, but leaves a doubt far above the h²
    of a smooth function. Then two shorter steps are tried, and the pair with the smaller doubt
    counts. None if its two disagree by more than `DIFFERENCE_AGREEMENT` of the larger of slope and
    `scale`.
    """

    def central(h: float) -> float:
        ahead, behind = (
            function({name: m + sign * h * along[name] for name, m in phi.items()})
            for sign in (1, -1)
        )
        return (ahead - behind) / (2 * h)

    def extrapolated(h: float) -> Slope:
        whole, half = central(h), central(h / 2)
        return Slope((4 * half - whole) / 3, abs(whole - half))

    slope = extrapolated(DIFFERENCE_STEP)
    if not slope.doubt <= DIFFERENCE_STEP**2 * max(abs(slope.value), scale):
        finer = extrapolated(DIFFERENCE_STEP / 64)
        slope = finer if finer.doubt < slope.doubt or math.isnan(slope.doubt) else slope
    if not slope.doubt <= DIFFERENCE_AGREEMENT * max(abs(slope.value), scale):
        return None
    return slope


def dot(a: Values, b: Values) -> float:
    return float(torch.stack([(a[name] * b[name]).sum() for name in a]).sum().detach())


def norm(values: Values) -> float:
    return float(torch.stack([value.detach().norm() for value in values.values()]).norm())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _filled(like: Values, slopes: tuple[Tensor | None, ...]) -> Values:
    pairs = zip(like.items(), slopes, strict=True)
    return {name: torch.zeros_like(m) if g is None else g.detach() for (name, m), g in pairs}
