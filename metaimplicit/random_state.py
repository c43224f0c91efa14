"""The states of torch's global random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators, of the CPU and of one CUDA device.

    Example:
        >>> state = RandomState.read(torch.device("cpu"))
        >>> first = torch.rand(2)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(2))
        True
    """

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def read(cls, device: torch.device) -> RandomState:
        """The present states."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        """Make these states the present ones."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def restored_random_state(device: torch.device) -> Iterator[RandomState]:
    """Put the present states back at the end of a block, which receives them.

    Example:
        >>> with restored_random_state(torch.device("cpu")) as state:
        ...     first = torch.rand(2)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    state = RandomState.read(device)
    try:
        yield state
    finally:
        state.restore()
