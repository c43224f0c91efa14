"""The ranges of numeric options: shown by --help, and checked before any work.

An option is declared with one of the types below, or with `within`:

    shots: Annotated[int, within(1, 10_000)] = 1

Where a number counts something that takes memory or time, the range ends where no machine could
work. Other numbers only have to fit into float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from metaimplicit.methods import Option


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __call__(self, default: str) -> str:
        """What --help says behind the text of an option that has this range."""
        return f"(default: {default}), {self}"

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"

    def check(self, option: str, value: Any) -> None:
        """Check the number, or all numbers, of an option. None is allowed.

        Raises:
            ValueError: A number is out of range, or is NaN.
        """
        for number in _numbers_in(value):
            if not self.low <= number <= self.high:
                flag = option.replace("_", "-")
                raise ValueError(f"--{flag}: got {number}, expected {self}")


def within(low: float, high: float) -> Any:
    """The range of an option, to be named in the `Annotated` type of a dataclass's field."""
    return tyro.conf.arg(help_behavior_hint=Range(low, high))


MOST = 1e30  # of numbers that only have to fit into float32
# Each thread has a stack of its own, and where one cannot be started OpenMP ends the process.
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))

Seed = Annotated[int, within(0, 2**32 - 1)]
Seeds = Annotated[int, within(1, 1000)]  # their number
Threads = Annotated[int | None, within(1, MOST_THREADS)]
Steps = Annotated[int, within(1, 10**9)]  # of training
InnerSteps = Annotated[int, within(1, 100_000)]
Products = Annotated[int, within(1, 100_000)]
Count = Annotated[int, within(1, 1_000_000)]  # of examples, tasks or repetitions
Width = Annotated[int, within(1, 65_536)]  # of a layer
Share = Annotated[float, within(0, 1)]
Number = Annotated[float, within(0, MOST)]
Numbers = Annotated[tuple[float, ...], within(0, MOST)]


def ranges_of(kind: type) -> dict[str, Range]:
    """The range of each option of a dataclass that has one."""
    ranges = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for entry in getattr(hint, "__metadata__", ()):
            allowed = getattr(entry, "help_behavior_hint", None)
            if isinstance(allowed, Range):
                ranges[name] = allowed
    return ranges


def check_ranges(options: Any) -> None:
    """Check every number in a dataclass of options.

    Raises:
        ValueError: A number is out of its range.
    """
    for name, allowed in ranges_of(type(options)).items():
        allowed.check(name, getattr(options, name))


def range_of(option: Option) -> Range | None:
    """The range of an option of a method or an inner loop, or None if it is no number.

    The classes of methods refuse further numbers themselves, such as a rank of 0.
    """
    kinds = get_args(option.type) or (option.type,)
    if float in kinds:
        return Range(0, MOST)
    if int in kinds:
        return Range(0, 2**50 if option.name == "memory" else 100_000)
    return None


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for entry in value:
            yield from _numbers_in(entry)
    elif isinstance(value, (int, float)):
        yield value
