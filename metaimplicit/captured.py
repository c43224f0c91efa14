"""What a function sees beside its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Any

from torch import nn


def captured(function: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """The variables that a function sees, and those of the functions among them.

    Example:
        >>> weight = 2.0
        >>> [name for name, _ in captured(partial(print, weight))]
        ['func', '0']
    """
    if depth == 0:
        return
    for name, value in _variables(function).items():
        yield name, value
        if callable(value) and not isinstance(value, (type, nn.Module)):
            yield from captured(value, depth - 1)


def _variables(function: Any) -> dict[str, Any]:
    """The variables that a function, bound method, partial or callable object holds."""
    if inspect.isfunction(function):
        nonlocals = inspect.getclosurevars(function).nonlocals
        module = function.__globals__
        names = global_names(function.__code__)
        return {**nonlocals, **{name: module[name] for name in names if name in module}}
    if inspect.ismethod(function):
        attributes = getattr(function.__self__, "__dict__", {})
        return {"__func__": function.__func__, **attributes}
    if isinstance(function, partial):
        positional = {str(i): argument for i, argument in enumerate(function.args)}
        return {"func": function.func, **function.keywords, **positional}
    return dict(getattr(function, "__dict__", {}))


def global_names(code: CodeType) -> Iterator[str]:
    """The global names in the code of a function, its comprehensions and its inner functions.

    Example:
        >>> list(global_names((lambda x: nn.Linear(x, x)).__code__))
        ['nn', 'Linear']
    """
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from global_names(constant)
