"""Numbers that count something, such as steps."""

from __future__ import annotations

import operator
from typing import Any


def check_count(name: str, count: Any, *, least: int = 1, unit: str = "") -> None:
    """Raise ValueError unless `count` is a whole number, `least` or more.

    Args:
        name: What the error calls it.
        count: An integer of any type.
        least: The smallest number allowed.
        unit: What the error adds to that number.

    Example:
        >>> check_count("steps", 2.5, unit=" step")
        Traceback (most recent call last):
        ValueError: steps: got 2.5, expected a whole number, at least 1 step
    """
    try:
        number = operator.index(count)
    except TypeError:
        message = f"{name}: got {count!r}, expected a whole number, at least {least}{unit}"
        raise ValueError(message) from None
    if number < least:
        raise ValueError(f"{name}: got {count}, expected at least {least}{unit}")
