"""Threads that use one model."""

from __future__ import annotations

import os
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LOCK = Lock()


def one_thread_in(model: nn.Module) -> Any:
    """A lock for a `with` block that one thread of all that use a model enters at a time.

    While `torch.func.functional_call` calls a model at other parameters, the model holds these in
    the place of its own. Another thread would compute with them.

    Args:
        model: The model. All learners of it, and what they adapted, wait for one another.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> with one_thread_in(layer), one_thread_in(layer):  # the same thread enters again
        ...     pass
    """
    with _LOCK:
        return _LOCKS.setdefault(model, RLock())


def _renew() -> None:
    """Make new locks, as no thread of the parent process will release those in its child."""
    global _LOCK
    _LOCK = Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
