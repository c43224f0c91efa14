"""Cases of three choices, in fewer than their product."""

from collections.abc import Sequence
from typing import Any


def every_pair(
    first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]
) -> list[tuple[Any, Any, Any]]:
    """Cases in which any two values of different lists meet.

    Where a fault needs all three values to show, as few do, these cases may miss it.

    Args:
        first: At least as many values as `third`.
        second: Likewise. Each of its values meets each of `first`.
        third: The values that take turns.

    Raises:
        ValueError: If `third` is too long to meet every value of the others.
    """
    first, second, third = list(first), list(second), list(third)
    if len(third) > min(len(first), len(second)):
        raise ValueError(f"third: got {len(third)} values, expected at most as many as the others")
    return [
        (a, b, third[(i + j) % len(third)])
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
