"""Finite differences of a function of φ along random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.lifted import LiftedProblem
from metaimplicit.mended import without_padding
from metaimplicit.params import Params
from metaimplicit.solvers.arithmetic import divisor


def find_padding(problem: LiftedProblem, meta: Params, *, last_step: int) -> Params:
    """Which numbers of φ are padding rows of embeddings, by name. Empty if there are none.

    Their gradient is zero by definition, so differences must leave them where they are.
    """

    def gradients() -> Params:
        phi = {n: m.detach().requires_grad_(m.is_floating_point()) for n, m in meta.items()}
        theta = problem.init(phi)
        f = problem.inner(theta, phi, problem.at(0))
        g, _ = problem.outer(theta, phi, problem.at(last_step))
        targets = {name: m for name, m in phi.items() if m.requires_grad}
        total = f.sum() + g.sum()
        if not total.requires_grad:  # the losses read φ without a graph, or not at all
            return {}
        values = torch.autograd.grad(total, list(targets.values()), allow_unused=True)
        return {n: g for n, g in zip(targets, values, strict=True) if g is not None}

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
    directions = []
    for _ in range(count):
        direction = {}
        for name, m in entries.items():
            direction[name] = torch.randn(m.shape, generator=generator, device="cpu").to(m)
            if fixed is not None and name in fixed:
                direction[name].masked_fill_(fixed[name], 0.0)
        norm = _norm(direction)
        directions.append({name: d / norm for name, d in direction.items()})
    return directions


def step_size(entries: Params) -> float:
    """The step h = ε^⅓ (1 + ‖φ‖), which balances truncation against cancellation."""
    dtype = next(iter(entries.values())).dtype
    return float(torch.finfo(dtype).eps ** (1 / 3) * (1 + float(_norm(entries))))


@dataclass(frozen=True)
class Differences:
    """Derivatives along directions by finite differences, `[directions]`.

    Attributes:
        extrapolated: (4 D_{h/2} − D_h) / 3, with an error of O(h⁴).
        half_step: D_{h/2}, the central differences of half the step, with an error of O(h²).
        roundoff: What the round-off of F may add to an entry of `extrapolated`.
    """

    extrapolated: Tensor
    half_step: Tensor
    roundoff: float

    @property
    def noise(self) -> float:
        """The relative error that `extrapolated` may have: that of `half_step`, or by round-off."""
        off = self.extrapolated + self.roundoff
        return max(relative_error(x, self.extrapolated) for x in (self.half_step, off))


def extrapolated_differences(
    function: Callable[[Params], Tensor],
    meta: Params,
    directions: list[Params],
    *,
    step: float,
) -> Differences:
    """Central differences at two steps, h = `step` and h/2, and Richardson's extrapolation."""
    sizes = []

    def measured(meta: Params) -> Tensor:
        value = function(meta)
        sizes.append(value.abs())
        return value

    whole_step = _central_differences(measured, meta, directions, step=step)
    half_step = _central_differences(measured, meta, directions, step=step / 2)
    # Two values that are each off by ε|F|/2 make D_{h/2} off by ε|F|/h, and D_h by half of that.
    size = torch.stack(sizes).max()
    roundoff = 1.5 * torch.finfo(size.dtype).eps * float(size) / step
    return Differences((4 * half_step - whole_step) / 3, half_step, roundoff)


def _central_differences(
    function: Callable[[Params], Tensor],
    meta: Params,
    directions: list[Params],
    *,
    step: float,
) -> Tensor:
    """D_h = (F(φ + h d) − F(φ − h d)) / 2h for each direction d, `[directions]`."""

    def at(direction: Params, distance: float) -> Tensor:
        moved = {name: meta[name] + distance * d for name, d in direction.items()}
        return function(meta | moved)

    slopes = [(at(d, step) - at(d, -step)) / (2 * step) for d in directions]
    return torch.stack(slopes)


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
