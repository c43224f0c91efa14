"""What a function sees beside its arguments, and whether that has changed."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, ModuleType
from typing import Any

from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))
MOST_VALUES = 1000  # that are looked at. A loss may hold a whole data set.
STATE = "state of the loss"


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


def forget_if_changed(known: dict[Any, Any], function: Any) -> dict[Any, Any]:
    """Empty `known` if what a function sees has changed since the last call.

    That is the state of the function: numbers and strings count by value, and tensors count as
    changed if they were replaced or written to in place. It is looked for in the attributes,
    closures and globals of the function and of whatever it holds, as long as that is not torch's.

    Args:
        known: What is known of the function. It holds the state as well.
        function: A function, or any callable object.

    Returns:
        `known` itself.

    Example:
        >>> loss = nn.CrossEntropyLoss()
        >>> known = forget_if_changed({}, loss)
        >>> known["family"] = "softmax"
        >>> "family" in forget_if_changed(known, loss)
        True
        >>> loss.label_smoothing = 0.1
        >>> "family" in forget_if_changed(known, loss)
        False
    """
    values = list(_held_values(function))
    tensors = [value for value in values if isinstance(value, Tensor)]
    state = [(id(x), _version(x)) if isinstance(x, Tensor) else x for x in values]
    before, _ = known.get(STATE, (None, None))
    if before != state:
        known.clear()
    # The tensors are kept, so that no other one takes the identity of one of them.
    known[STATE] = (state, tensors)
    return known


def _held_values(function: Any) -> Iterator[Any]:
    """The tensors and plain values that a function sees, the nearest first."""
    pending = deque([function])
    seen: set[int] = set()
    while pending and len(seen) < MOST_VALUES:
        value = pending.popleft()
        if isinstance(value, PLAIN):
            yield value
            continue
        if id(value) in seen or isinstance(value, (type, ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending.extend(value)
        elif not _is_function_of_torch(value):
            pending.extend(_variables(value).values())
            methods = (getattr(type(value), name, None) for name in ("forward", "__call__"))
            pending.extend(method for method in methods if inspect.isfunction(method))


def _is_function_of_torch(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return inspect.isroutine(value) and module.partition(".")[0] == "torch"


def _version(x: Tensor) -> int:
    """How often a tensor was written to in place, as far as torch counts that."""
    return -1 if x.is_inference() else x._version


def _variables(function: Any) -> dict[str, Any]:
    """The variables that a function, bound method, partial or callable object holds."""
    if inspect.isfunction(function):
        nonlocals = inspect.getclosurevars(function).nonlocals
        module = function.__globals__
        names = _global_names(function.__code__)
        return {**nonlocals, **{name: module[name] for name in names if name in module}}
    if inspect.ismethod(function):
        attributes = getattr(function.__self__, "__dict__", {})
        return {"__func__": function.__func__, **attributes}
    if isinstance(function, partial):
        positional = {str(i): argument for i, argument in enumerate(function.args)}
        return {"func": function.func, **function.keywords, **positional}
    return dict(getattr(function, "__dict__", {}))


def _global_names(code: CodeType) -> Iterator[str]:
    """The global names in the code of a function, its comprehensions and its inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
