"""What a function sees beside its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import CellType, CodeType, ModuleType
from typing import Any

from torch import nn


def captured(function: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """The variables that a function sees, and those of the functions and objects among them.

    Example:
        >>> weight = 2.0
        >>> [name for name, _ in captured(partial(print, weight))]
        ['func', '0']
    """
    if depth == 0:
        return
    for name, value in _variables(function).items():
        yield name, value
        if not isinstance(value, (type, ModuleType, nn.Module)):
            yield from captured(value, depth - 1)


def _variables(function: Any) -> dict[str, Any]:
    """The variables that a function, bound method, partial or other object holds."""
    if inspect.isfunction(function):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        nonlocals = {name: content_of(cell) for name, cell in cells}
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


def content_of(cell: CellType) -> Any:
    """The variable of an outer function that a cell holds. None if it has no value yet.

    Example:
        >>> def outer():
        ...     def inner():
        ...         return later
        ...
        ...     print(content_of(inner.__closure__[0]))
        ...     later = 3
        ...     print(content_of(inner.__closure__[0]))
        >>> outer()
        None
        3
    """
    try:
        return cell.cell_contents
    except ValueError:
        return None


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
