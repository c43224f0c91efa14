"""A check that the parts of a learner leave their buffers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from metaimplicit.normalization import tracked_layers


@contextmanager
def reject_changed_buffers(learner: nn.Module, *, but_tracked: bool = False) -> Iterator[None]:
    """Check that no buffer of a model or of its losses changes within the block.

    Args:
        learner: What holds them, under the names that errors call them.
        but_tracked: Whether the running statistics of normalisation layers may change.

    Raises:
        ValueError: At the end of the block, if a buffer was replaced or written to in place. The
            message names it.

    Example:
        >>> import torch
        >>> learner = nn.ModuleDict({"loss": nn.Module()})
        >>> learner["loss"].register_buffer("count", torch.zeros(()))
        >>> with reject_changed_buffers(learner):
        ...     learner["loss"].count.add_(1)
        Traceback (most recent call last):
        ...
        ValueError: loss: a forward pass changed buffer 'count', so each task would see the ones \
before it; switch the module that changes it to evaluation mode
    """
    before = _buffer_versions(learner)
    yield
    tracked = tracked_layers(learner) if but_tracked else {}
    for name, version in _buffer_versions(learner).items():
        if name.rpartition(".")[0] in tracked:
            continue
        # A buffer that did not exist before (of a lazy module) has not changed.
        if before.get(name, version) != version:
            part, _, buffer = name.partition(".")
            raise ValueError(
                f"{part}: a forward pass changed buffer {buffer!r}, so each task would see the "
                "ones before it; switch the module that changes it to evaluation mode"
            )


def _buffer_versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensor each buffer is, and how often it was written to in place."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
