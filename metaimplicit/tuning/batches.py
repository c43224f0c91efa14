"""Batches without end, from a function of their number or from a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Source = Callable[[int], Any] | Iterable[Any]


def read_batches(source: Source, *, first: int) -> Iterator[Any]:
    """Yield the batches of a source without end.

    Args:
        source: A function of the batch's number, or an iterable such as a loader, which is iterated
            again whenever it ends.
        first: The number at which a function starts. An iterable starts at its beginning.

    Raises:
        ValueError: An iteration over the iterable yields no batch.

    Example:
        >>> batches = read_batches(["a", "b"], first=0)
        >>> [next(batches) for _ in range(3)]
        ['a', 'b', 'a']
    """
    if callable(source):
        number = first
        while True:
            yield source(number)
            number += 1
    while True:
        empty = True
        for batch in source:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "batches: got an iterable without any, or one that is used up, expected a loader"
            )
