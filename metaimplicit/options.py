"""The numbers and words of a method that a command line can set, read from its dataclass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Value = TypeVar("Value")
_PLAIN = (int, float, bool, str, NoneType)


def option(default: Any, *, flag: str | None) -> Any:
    """A dataclass field with a default, whose option command lines call `flag`.

    If `flag` is None, the field has no option.

    Example:
        >>> @dataclass
        ... class Truncated:
        ...     steps: int = option(1, flag="solver_steps")
        >>> list(options_of(Truncated()))
        ['solver_steps']
    """
    return field(default=default, metadata={"flag": flag})


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        name: What the option is called: the field's name, unless the field says otherwise.
        path: The fields that lead to it, such as `("solver", "rank")`.
        type: The types it takes, of numbers, strings, bools, literals and None.
        default: Its value now.
        help: What its class's docstring says of it.

    Example:
        >>> from metaimplicit.methods import METHODS
        >>> rank = options_of(METHODS["nystrom"])["rank"]
        >>> rank.path, rank.type, rank.default
        (('solver', 'rank'), <class 'int'>, 10)
    """

    name: str
    path: tuple[str, ...]
    type: Any
    default: Any
    help: str


def options_of(value: Any) -> dict[str, Option]:
    """The options of a method and its parts, by name.

    Example:
        >>> from metaimplicit.methods import METHODS
        >>> options_of(METHODS["nystrom"])["rank"].default
        10
    """
    return {option.name: option for option in _walk(value, ())}


def with_options(value: Value, values: dict[str, Any]) -> Value:
    """The method with some options set.

    Raises:
        KeyError: The method has no such option.
        ValueError: A value that the method refuses.

    Example:
        >>> from metaimplicit.methods import METHODS
        >>> method = with_options(METHODS["nystrom"], {"rank": 20, "damping": 0.1})
        >>> method.solver.rank, method.damping
        (20, 0.1)
    """
    if not values:
        return value
    known = options_of(value)
    changes = {known[name].path: new for name, new in values.items()}
    changed: Value = _replace_at(value, changes)
    return changed


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[Option]:
    if not is_dataclass(value) or isinstance(value, type):
        return
    hints = _hints(type(value))
    for f in fields(value):
        if not f.init:
            continue
        current = getattr(value, f.name)
        name = _flag(f)
        kind = _plain_type(hints[f.name])
        if is_dataclass(current):
            yield from _walk(current, (*path, f.name))
        elif name is not None and kind is not None:
            yield Option(
                name,
                (*path, f.name),
                kind,
                current,
                _help(type(value), f.name),
            )


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _flag(f: Field[Any]) -> str | None:
    flag: str | None = f.metadata.get("flag", f.name)
    return flag


def _plain_type(hint: Any) -> Any:
    """The part of a type that a command line can give, or None."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = [part for part in parts if part in _PLAIN or get_origin(part) is Literal]
    if not plain or plain == [NoneType]:
        return None
    return Union[tuple(plain)]  # noqa: UP007  # a union of parts that are known at run time


@cache
def _help(kind: type, name: str) -> str:
    """The text of an argument in the docstring of a class, or of one that it inherits from."""
    for ancestor in kind.__mro__:
        # Python 3.13 strips the common indentation of docstrings; cleandoc does so everywhere.
        docstring = inspect.cleandoc(ancestor.__doc__ or "")
        pattern = rf"^ {{4}}{name}: (.*(?:\n {{8}}.*)*)"
        match = re.search(pattern, docstring, flags=re.M)
        if match:
            return re.sub(r"\s+", " ", match.group(1))
    return ""


def _replace_at(value: Any, changes: dict[tuple[str, ...], Any]) -> Any:
    """A copy with other values at some paths, all set at once so that they are checked together."""
    fields_here = {path[0]: new for path, new in changes.items() if len(path) == 1}
    for first in {path[0] for path in changes if len(path) > 1}:
        deeper = {path[1:]: new for path, new in changes.items() if path[0] == first}
        fields_here[first] = _replace_at(getattr(value, first), deeper)
    return replace(value, **fields_here)
