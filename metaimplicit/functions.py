"""Arguments that are functions, such as losses, and optimisers that want one."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim import Optimizer


def check_function(argument: str, value: Any, signature: str) -> None:
    """Raise ValueError unless `value` can be called, and is no class.

    A call of a class makes an instance of it: `torch.nn.MSELoss` is no loss, `torch.nn.MSELoss()`
    is one.

    Args:
        argument: What the error calls the function.
        value: What was given.
        signature: How the function is called and what it returns.

    Example:
        >>> import torch
        >>> check_function("loss", torch.nn.MSELoss, "(outputs, targets) -> scalar")
        Traceback (most recent call last):
        ValueError: loss: got the class MSELoss, expected a function (outputs, targets) -> scalar; \
make an instance of it, MSELoss()
    """
    expected = f"expected a function {signature}"
    if isinstance(value, type):
        kind = value.__name__
        raise ValueError(
            f"{argument}: got the class {kind}, {expected}; make an instance of it, {kind}()"
        )
    if not callable(value):
        raise ValueError(f"{argument}: got {value!r}, {expected}")


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step needs a closure, by which it evaluates the loss several times.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> needs_closure(torch.optim.SGD([p])), needs_closure(torch.optim.LBFGS([p]))
        (False, True)
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty
