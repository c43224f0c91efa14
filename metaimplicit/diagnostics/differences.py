"""Finite differences of a function of φ along random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from metaimplicit.lifted import LiftedProblem
from metaimplicit.mended import without_padding
from metaimplicit.params import Params
from metaimplicit.problem import Stream
from metaimplicit.solvers.arithmetic import divisor


def find_padding(problem: LiftedProblem, meta: Params, *, last_step: int) -> Params:
    """Which numbers of φ are padding rows of embeddings, by name. Empty if there are none.

    Their gradient is zero by definition, so differences must leave them where they are.
    """
    times = range(last_step) if isinstance(problem.data, Stream) else range(1)

    def gradients() -> Params:
        phi = {n: m.detach().requires_grad_(m.is_floating_point()) for n, m in meta.items()}
        targets = {name: m for name, m in phi.items() if m.requires_grad}

        def inner_losses(t: int) -> Tensor:
            return problem.inner(problem.init(phi), phi, problem.at(t))

        def outer_losses() -> Tensor:
            return problem.outer(problem.init(phi), phi, problem.at(last_step))[0]

        sums: Params = {}
        terms: list[Callable[[], Tensor]] = [partial(inner_losses, t) for t in times]
        for losses in (*terms, outer_losses):
            total = losses().sum()
            if not total.requires_grad:  # the loss reads φ without a graph, or not at all
                continue
            values = torch.autograd.grad(total, list(targets.values()), allow_unused=True)
            for name, g in zip(targets, values, strict=True):
                if g is not None:
                    sums[name] = sums[name] + g if name in sums else g
        return sums

    with torch.enable_grad():
        with without_padding() as rows:
            everywhere = gradients()
        if not rows:
            return {}
        return {name: g != everywhere[name] for name, g in gradients().items()}


def random_directions(
    entries: Params, *, count: int, seed: int, fixed: Params | None = None
) -> list[Params]:
    """Random directions of norm one in φ, shaped as its entries. They are zero where `fixed`."""
    generator = torch.Generator().manual_seed(seed)
    return [_random_direction(entries, generator, fixed or {}) for _ in range(count)]


def directions_of_entries(
    entries: Params, names: list[str], *, seed: int, fixed: Params | None = None
) -> list[Params]:
    """For each of these names, a random direction of norm one in that entry of φ alone."""
    generator = torch.Generator().manual_seed(seed)
    fixed = fixed or {}
    return [_random_direction({name: entries[name]}, generator, fixed) for name in names]


def _random_direction(entries: Params, generator: torch.Generator, fixed: Params) -> Params:
    direction = {}
    for name, m in entries.items():
        direction[name] = torch.randn(m.shape, generator=generator, device="cpu").to(m)
        if name in fixed:
            direction[name].masked_fill_(fixed[name], 0.0)
    norm = divisor(_norm(direction))
    return {name: d / norm for name, d in direction.items()}


def step_size(entries: Params) -> float:
    """The step h = ε^⅓ (1 + ‖φ‖), which balances truncation against cancellation."""
    dtype = next(iter(entries.values())).dtype
    return float(torch.finfo(dtype).eps ** (1 / 3) * (1 + float(_norm(entries))))


class Agreement(NamedTuple):
    """How far slopes are from finite differences, all relative to the size of the latter.

    Attributes:
        size: The norm of the differences, or the least size that was asked for if that is larger.
            If both are 0, the norm of the slopes.
        error: The distance of the slopes from the differences.
        noise: What the differences may be off by: their distance from those of half the step, or
            round-off.
        kink: By how much the slopes to both sides differ at φ itself.
    """

    size: float
    error: float
    noise: float
    kink: float


@dataclass(frozen=True)
class Differences:
    """Derivatives along directions by finite differences, `[directions]`.

    Attributes:
        extrapolated: (4 D_{h/2} − D_h) / 3, with an error of O(h⁴).
        half_step: D_{h/2}, the central differences of half the step, with an error of O(h²).
        kink: The slope ahead less the slope behind, extrapolated to h = 0 as 2 K_{h/2} − K_h, with
            an error of O(h³). It is 0 where F is smooth.
        resolution: ε max|F|, the round-off of a value of F.
        steps: h of each direction.
    """

    extrapolated: Tensor
    half_step: Tensor
    kink: Tensor
    resolution: float
    steps: Tensor

    @property
    def roundoff(self) -> Tensor:
        """What round-off may add to `extrapolated`, `[directions]`.

        Two values that are each off by ε|F|/2 make D_{h/2} off by ε|F|/h, and D_h by half of that.
        """
        return 1.5 * self.resolution / self.steps.to(self.extrapolated)

    def rows(self, chosen: slice | list[int]) -> Differences:
        """Those along some of the directions."""
        return replace(
            self,
            extrapolated=self.extrapolated[chosen],
            half_step=self.half_step[chosen],
            kink=self.kink[chosen],
            steps=self.steps[chosen],
        )

    def compare(self, slopes: Tensor, *, least_size: float = 0.0) -> Agreement:
        """How far slopes along these directions are from the differences.

        Args:
            slopes: `[directions]`.
            least_size: What errors are relative to if the differences are smaller.
        """
        size = max(float(self.extrapolated.norm()), least_size)
        distance = float((slopes - self.extrapolated).norm())
        if size == 0:
            # F does not move. Slopes agree with that if a step of 1 would not change a digit of F.
            size = float(slopes.norm()) or 1.0
            distance = distance if distance > self.resolution else 0.0
        # Of its three values of F, the kink has up to seven times the round-off of the slope.
        kink = float((self.kink.abs() - 7 * self.roundoff).clamp(min=0).norm())
        return Agreement(size, distance / size, noise=self._noise / size, kink=kink / size)

    @property
    def _noise(self) -> float:
        apart = float((self.half_step - self.extrapolated).norm())
        return max(apart, float(self.roundoff.norm()))

    @property
    def spread(self) -> Tensor:
        """By how much two steps, or the two sides, differ in each direction, `[directions]`."""
        return torch.maximum((self.half_step - self.extrapolated).abs(), self.kink.abs())

    def unsettled(self, tolerance: float) -> Tensor:
        """Where a shorter step may be known better, since more than round-off differs."""
        is_rough = 4 * self.spread > tolerance * self.extrapolated.abs()
        settled = (self.spread <= 10 * self.roundoff) | ~is_rough
        return ~settled | ~self.extrapolated.isfinite()

    def improved(self, rows: list[int], others: Differences) -> Differences:
        """With others in the place of those of some rows, where these are known worse."""
        before = self.rows(rows)
        known = torch.maximum(others.spread, others.roundoff)
        was_known = torch.maximum(before.spread, before.roundoff)
        is_better = (known < was_known) | ~before.extrapolated.isfinite()

        def merged(old: Tensor, new: Tensor) -> Tensor:
            result = old.clone()
            result[rows] = torch.where(is_better, new.to(old), old[rows])
            return result

        return Differences(
            extrapolated=merged(self.extrapolated, others.extrapolated),
            half_step=merged(self.half_step, others.half_step),
            kink=merged(self.kink, others.kink),
            resolution=max(self.resolution, others.resolution),
            steps=merged(self.steps, others.steps),
        )


def settled_differences(
    function: Callable[[Params], Tensor],
    meta: Params,
    directions: list[Params],
    *,
    steps: Tensor,
    tolerance: float,
) -> Differences:
    """The differences by the step h. Directions that it leaves uncertain take h/100, then h/10⁴.

    A direction is certain once it is known to the tolerance. One that never is keeps the best.
    Where F has many kinks, as with a network of ReLUs, there may be one within h, but none nearby.
    """
    best = extrapolated_differences(function, meta, directions, steps=steps)
    for shorter in (1e-2, 1e-4):
        rows = best.unsettled(tolerance).nonzero().flatten().tolist()
        if not rows:
            break
        others = extrapolated_differences(
            function,
            meta,
            [directions[row] for row in rows],
            steps=shorter * steps[rows],
        )
        best = best.improved(rows, others)
    return best


def extrapolated_differences(
    function: Callable[[Params], Tensor],
    meta: Params,
    directions: list[Params],
    *,
    steps: Tensor,
) -> Differences:
    """Central differences at two steps, h and h/2, and Richardson's extrapolation.

    Args:
        function: F, which returns a scalar.
        meta: φ.
        directions: The directions d, shaped as entries of φ.
        steps: h of each direction, `[directions]`.
    """
    here = function(meta)
    whole = _ValuesBeside.at(function, meta, directions, steps=steps)
    half = _ValuesBeside.at(function, meta, directions, steps=steps / 2)
    values = torch.cat([here.reshape(1), whole.ahead, whole.behind, half.ahead, half.behind])
    return Differences(
        extrapolated=(4 * half.slope - whole.slope) / 3,
        half_step=half.slope,
        kink=2 * half.kink(here) - whole.kink(here),
        resolution=torch.finfo(values.dtype).eps * float(values.abs().max()),
        steps=steps,
    )


class _ValuesBeside(NamedTuple):
    """F(φ + h d) and F(φ − h d) for each direction d, `[directions]` each."""

    steps: Tensor
    ahead: Tensor
    behind: Tensor

    @classmethod
    def at(
        cls,
        function: Callable[[Params], Tensor],
        meta: Params,
        directions: list[Params],
        *,
        steps: Tensor,
    ) -> _ValuesBeside:
        def value(direction: Params, distance: float) -> Tensor:
            moved = {name: meta[name] + distance * d for name, d in direction.items()}
            return function(meta | moved)

        lengths = steps.tolist()
        ahead = [value(d, h) for d, h in zip(directions, lengths, strict=True)]
        behind = [value(d, -h) for d, h in zip(directions, lengths, strict=True)]
        return cls(steps.to(ahead[0]), torch.stack(ahead), torch.stack(behind))

    @property
    def slope(self) -> Tensor:
        """D_h = (F(φ + h d) − F(φ − h d)) / 2h."""
        return (self.ahead - self.behind) / (2 * self.steps)

    def kink(self, here: Tensor) -> Tensor:
        """K_h = (F(φ + h d) + F(φ − h d) − 2 F(φ)) / h, the slope ahead less that behind."""
        return (self.ahead + self.behind - 2 * here) / self.steps


def dot(gradients: Params, direction: Params) -> Tensor:
    """The derivative along a direction, by a gradient."""
    products = [(gradients[name] * d).sum() for name, d in direction.items()]
    return torch.stack(products).sum()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, or the absolute error if `expected` is zero."""
    size = float(expected.norm())
    return float((actual - expected).norm()) / (size if size > 0 else 1.0)


def cosine(first: Tensor, second: Tensor) -> float:
    """That of the angle between two vectors of any size. It is 0 if one of them is zero."""
    a, b = (v.double() / divisor(v.double().norm()) for v in (first, second))
    return float((a * b).sum())


def _norm(entries: Params) -> Tensor:
    norm: Tensor = torch.stack([m.norm() for m in entries.values()]).norm()
    return norm
