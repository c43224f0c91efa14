"""A check that a model leaves its buffers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from metaimplicit.normalization import tracked_layers


@contextmanager
def reject_changed_buffers(model: nn.Module, *, but_tracked: bool = False) -> Iterator[None]:
    """Check that no buffer of the model changes within the block.

    Args:
        model: The model.
        but_tracked: Whether the running statistics of normalisation layers may change.

    Raises:
        ValueError: At the end of the block, if a buffer was replaced or written to in place. The
            message names it.

    Example:
        >>> import torch
        >>> model = nn.Module()
        >>> model.register_buffer("count", torch.zeros(()))
        >>> with reject_changed_buffers(model):
        ...     model.count.add_(1)
        Traceback (most recent call last):
        ...
        ValueError: model: a forward pass changed buffer 'count', so each task would see the ones \
before it; switch the module that changes it to evaluation mode
    """
    before = _buffer_versions(model)
    yield
    tracked = tracked_layers(model) if but_tracked else {}
    for name, version in _buffer_versions(model).items():
        if name.rpartition(".")[0] in tracked:
            continue
        # A buffer that did not exist before (of a lazy module) has not changed.
        if before.get(name, version) != version:
            raise ValueError(
                f"model: a forward pass changed buffer {name!r}, so each task would see the ones "
                "before it; switch the module that changes it to evaluation mode"
            )


def _buffer_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer is, and how often it was written to in place."""
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}
