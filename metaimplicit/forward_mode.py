"""Derivatives in forward mode."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# The levels of forward mode are those of the process. Of two threads in it, each would end the
# level of the other, and lose its tangents.
_ONE_THREAD = threading.RLock()


def push_forward(
    function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The value f(x) and its tangent (∂f/∂x) ẋ, as `torch.func.jvp` gives them.

    The first call of that function in a process warns, in some versions of torch, that torch itself
    uses a deprecated function. This one does not. It may be called in several threads.

    Args:
        function: f.
        primals: x, one pytree of tensors for each argument of f.
        tangents: ẋ, in the same form.

    Example:
        >>> x = torch.tensor(3.0)
        >>> push_forward(torch.square, (x,), (torch.ones(()),))
        (tensor(9.), tensor(6.))
    """
    _load_rules()
    with _ONE_THREAD:
        result: Any = torch.func.jvp(function, primals, tangents)
    return result[0], result[1]


@cache
def _load_rules() -> None:
    """Let torch load its rules of forward mode, which it does at its first use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))
