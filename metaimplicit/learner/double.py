"""A learner's numbers in float64 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from metaimplicit.learner.episodes import Episode
from metaimplicit.task_axis import map_tensors


@contextmanager
def in_float64(module: nn.Module) -> Iterator[None]:
    """Let the parameters and buffers of a module be of type float64 in the block.

    They stay the same objects, so that losses and hooks that hold them see the same numbers. At the
    end, they have their own numbers, types and `.grad` again, whatever was written to them, and the
    modules have the attributes that they had.

    Args:
        module: The module.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with in_float64(layer):
        ...     layer.weight.dtype
        torch.float64
        >>> layer.weight.dtype
        torch.float32
    """
    parameters = [(p, p.grad) for p in module.parameters()]
    numbers = [(x, x.data) for x in (*module.parameters(), *module.buffers())]
    attributes = [x for m in module.modules() for x in (vars(m), vars(m)["_buffers"])]
    before = [(holder, dict(holder)) for holder in attributes]
    try:
        for p, _ in parameters:
            p.grad = None
        for x, data in numbers:
            dtype = torch.float64 if data.is_floating_point() else data.dtype
            x.data = data.to(dtype, copy=True)
        yield
    finally:
        for holder, entries in before:
            for name in set(holder) - set(entries):
                del holder[name]
            holder.update(entries)
        for x, data in numbers:
            x.data = data
        for p, grad in parameters:
            p.grad = grad


def episode_in_float64(data: Episode) -> Episode:
    """The same tasks, whose floating-point tensors are of type float64."""
    episode: Episode = map_tensors(lambda x: x.double() if x.is_floating_point() else x, data)
    return episode
