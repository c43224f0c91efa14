"""Finite differences of a function of φ along random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.params import Params


def random_directions(entries: Params, *, count: int, seed: int) -> list[Params]:
    """Random directions of norm one in φ, shaped as its entries."""
    generator = torch.Generator().manual_seed(seed)
    directions = []
    for _ in range(count):
        direction = {}
        for name, m in entries.items():
            direction[name] = torch.randn(m.shape, generator=generator).to(m)
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
    """

    extrapolated: Tensor
    half_step: Tensor


def extrapolated_differences(
    function: Callable[[Params], Tensor],
    meta: Params,
    directions: list[Params],
    *,
    step: float,
) -> Differences:
    """Central differences at two steps, h = `step` and h/2, and Richardson's extrapolation."""
    whole_step = _central_differences(function, meta, directions, step=step)
    half_step = _central_differences(function, meta, directions, step=step / 2)
    return Differences((4 * half_step - whole_step) / 3, half_step)


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


def _norm(entries: Params) -> Tensor:
    norm: Tensor = torch.stack([m.norm() for m in entries.values()]).norm()
    return norm
