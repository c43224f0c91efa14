"""A learner's numbers in float64 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from metaimplicit.learner.episodes import Episode
from metaimplicit.task_axis import map_tensors


@contextmanager
def in_float64(module: nn.Module) -> Iterator[None]:
    """Let the parameters and buffers of a module be of type float64 in the block.

    They stay the same objects, so that losses and hooks that hold them see the same numbers. At the
    end, they have their own numbers, types and `.grad` again, whatever was written to them.

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
    parameters = [(p, p.data, p.grad) for p in module.parameters()]
    tables = [(vars(m)["_buffers"], dict(vars(m)["_buffers"])) for m in module.modules()]
    buffers = [(b, b.data) for b in module.buffers()]
    try:
        for p, _, _ in parameters:
            p.grad = None
        for x in [*module.parameters(), *module.buffers()]:
            if x.is_floating_point():
                x.data = x.data.double()
        yield
    finally:
        for table, entries in tables:
            table.update(entries)
        for b, data in buffers:
            b.data = data
        for p, data, grad in parameters:
            p.data = data
            p.grad = grad


def episode_in_float64(data: Episode) -> Episode:
    """The same tasks, whose floating-point tensors are of type float64."""
    episode: Episode = map_tensors(lambda x: x.double() if x.is_floating_point() else x, data)
    return episode
