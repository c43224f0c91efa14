"""The states of the global random generators, those of torch, of NumPy and of Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class RandomState:
    """The states of torch's global generators, of the CPU and of one CUDA device.

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


@dataclass(frozen=True)
class HostState:
    """The states of the global generators of Python and of NumPy.

    To read and to restore them takes 0.1 ms, which is much for an inner step.

    Example:
        >>> state = HostState.read()
        >>> first = random.random()
        >>> state.restore()
        >>> random.random() == first
        True
    """

    of_python: tuple[Any, ...]
    of_numpy: Any

    @classmethod
    def read(cls) -> HostState:
        """The present states."""
        return cls(random.getstate(), np.random.get_state(legacy=False))

    def is_present(self) -> bool:
        """Whether nothing was drawn since, by any thread."""
        now = HostState.read()
        if self.of_python != now.of_python:
            return False
        pairs = zip(tree_leaves(self.of_numpy), tree_leaves(now.of_numpy), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    def restore(self) -> None:
        """Make these states the present ones."""
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)


@contextmanager
def restored_host_state() -> Iterator[None]:
    """Put the states of Python's and NumPy's generators back at the end of a block.

    Example:
        >>> before = random.getstate()
        >>> with restored_host_state():
        ...     _ = random.random()
        >>> random.getstate() == before
        True
    """
    state = HostState.read()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def restored_random_state(device: torch.device) -> Iterator[RandomState]:
    """Put torch's present states back at the end of a block, which receives them.

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


class NoticedDraws(TorchDispatchMode):
    """A block in which operations of this thread that draw random numbers are noticed.

    Attributes:
        found: Whether there was one.

    Example:
        >>> with NoticedDraws() as draws:
        ...     _ = torch.rand(2)
        >>> draws.found
        True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of torch, and look at its tags."""
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.found = True
        return function(*args, **(kwargs or {}))


class UnfusedDropout(TorchDispatchMode):
    """A block in which dropout on CUDA draws the numbers that it draws in `torch.vmap`.

    In `torch.vmap` with `randomness="same"`, torch draws a mask for the tensor of one task. Outside
    of it, a fused kernel draws other numbers from the same state. That is so for dropout within
    attention and recurrent networks, too.

    Example:
        >>> with UnfusedDropout():
        ...     torch.native_dropout(torch.ones(2), p=1.0, train=True)
        (tensor([0., 0.]), tensor([False, False]))
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of torch, and dropout in training by plain ones."""
        if function is not torch.ops.aten.native_dropout.default or args[2] is False:
            return function(*args, **(kwargs or {}))
        x, p, _ = args
        mask = torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1 - p)
        scale = 1 / (1 - p) if p < 1 else 0.0
        return x * mask * scale, mask.bool()
