"""Whether a loss has changed since it was last looked at."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
from torch import Tensor

from metaimplicit.captured import content_of, global_names
from metaimplicit.versions import version_of

MAX_PARTS = 500  # many more than an ordinary loss has
LIBRARIES = sys.stdlib_module_names | {"numpy", "torch"}
ATOMS = frozenset((str, int, float, bool, type(None)))
DICTS = frozenset((dict, OrderedDict))
CONSTANTS = (type, ModuleType, BuiltinFunctionType, str, bytes, int, float, type(None))


class LossState:
    """What a loss reads beside its arguments: attributes, parameters, buffers, captured variables.

    Another tensor, list or object is a change, and so is a tensor that was written to, even if the
    values are equal. Numbers and strings are compared by value. `version_of` says which ways to
    write to a tensor are seen.

    Args:
        loss: A function, a module or another callable object.
        but_trained: Whether a tensor that requires grad may be written to without being a change,
            as each step of training does.

    Attributes:
        loss: The same.

    Example:
        >>> from torch import nn
        >>> loss = nn.CrossEntropyLoss()
        >>> state = LossState(loss)
        >>> state.has_changed()
        False
        >>> loss.label_smoothing = 0.1
        >>> state.has_changed(), state.has_changed()
        (True, False)
    """

    def __init__(self, loss: Callable[..., Any], *, but_trained: bool = False) -> None:
        self.loss = loss
        self._but_trained = but_trained
        self._parts = _read(loss, but_trained)

    def has_changed(self) -> bool:
        """Whether it has changed since the last call, at first since it was made.

        It also is True if the loss has more than `MAX_PARTS` parts, which are not compared.
        """
        parts = _read(self.loss, self._but_trained)
        before, self._parts = self._parts, parts
        if before is None or parts is None or len(before) != len(parts):
            return True
        return not all(map(_are_same, before, parts))


def _are_same(before: Any, after: Any) -> bool:
    # What was read is kept alive, so that no other object can have its identity.
    if before is after:
        return True
    return type(before) is type(after) and isinstance(before, CONSTANTS) and before == after


def _read(loss: Any, but_trained: bool) -> list[Any] | None:
    """The parts of a loss in a fixed order. None if there are more than `MAX_PARTS`."""
    parts: list[Any] = []
    seen: set[int] = set()
    pending = [loss]
    while pending:
        if len(parts) > MAX_PARTS:
            return None
        value = pending.pop()
        parts.append(value)
        kind = type(value)
        if kind in ATOMS or (kind in DICTS and not value):  # most attributes of a module
            continue
        if id(value) in seen or isinstance(value, CONSTANTS):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            parts.extend(() if but_trained and value.requires_grad else version_of(value))
        elif isinstance(value, np.ndarray):
            parts.append(value.tobytes())
        else:
            pending.extend(_parts_of(value))
    return parts


def _parts_of(value: Any) -> Iterator[Any]:
    """What a value holds, as far as Python shows it."""
    if isinstance(value, (dict, Mapping)):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__
        if isinstance(value.__self__, type):
            names = dict.fromkeys(global_names(value.__func__.__code__))
            yield from _named_attributes(value.__self__, names)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, FunctionType):
        if not _is_of_library(value):
            yield from _variables(value)
    elif isinstance(value, property):
        yield value.fget
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, CellType):
        yield content_of(value)
    else:
        yield from getattr(value, "__dict__", {}).values()
        kind: Any = type(value)
        for base in _users_classes(kind):
            yield from vars(base).values()
            members = [x for x in vars(base).values() if isinstance(x, MemberDescriptorType)]
            for member in members:  # its slots
                with suppress(AttributeError):
                    yield member.__get__(value)


def _variables(function: FunctionType) -> Iterator[Any]:
    """The variables that a function sees, its attributes, and the defaults of its arguments."""
    cells = function.__closure__ or ()
    yield from cells
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    names = dict.fromkeys(global_names(function.__code__))
    known = function.__globals__
    visible = [known[name] for name in names if name in known]
    yield from visible
    for value in (*visible, *map(content_of, cells)):
        yield from _named_attributes(value, names)


def _named_attributes(holder: Any, names: Container[str], depth: int = 3) -> Iterator[Any]:
    """The attributes of a module or class that code names, and those of such attributes."""
    if not isinstance(holder, (type, ModuleType)) or _is_of_library(holder) or not depth:
        return
    for part in holder.__mro__ if isinstance(holder, type) else (holder,):
        for name, x in vars(part).items():
            if name in names:
                yield x
                yield from _named_attributes(x, names, depth - 1)


@lru_cache
def _users_classes(kind: Any) -> list[type]:
    """The class and its bases, without those of libraries."""
    return [base for base in kind.__mro__ if not _is_of_library(base)]


def _is_of_library(value: Any) -> bool:
    """Whether a function, class or module is of a library whose variables do not change."""
    own = "__name__" if isinstance(value, ModuleType) else "__module__"
    name = getattr(value, own, None) or ""
    return name.partition(".")[0] in LIBRARIES
