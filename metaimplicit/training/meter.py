"""How far a long computation is: a bar on a terminal, and elsewhere a plain line in a while."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from metaimplicit.training.progress import duration

SECONDS_APART = 30.0  # of lines, at least
SHARE_APART = 0.02  # of the whole time, at least

Item = TypeVar("Item")


class Meter:
    """Shows on standard error how far a computation is, and when it will end.

    Args:
        noun: What is counted, such as "step".
        count: How many of them are done already.
        seconds: The time that they took.
        total: How many there will be. If None, that is not known.
        minutes: The time after which the computation ends. If None, there is no such limit.
        is_shown: Whether anything is written.

    Example:
        >>> meter = Meter("step", total=100, is_shown=False)
        >>> meter.seconds_left(count=25, seconds=10.0)
        30.0
    """

    def __init__(
        self,
        noun: str,
        *,
        count: int = 0,
        seconds: float = 0.0,
        total: int | None = None,
        minutes: float | None = None,
        is_shown: bool = True,
    ) -> None:
        self._noun = noun
        self._count = count
        self._start = (count, seconds)
        self._total = total
        self._minutes = minutes
        self._next_line = seconds + SECONDS_APART
        is_terminal = is_shown and sys.stderr.isatty()
        self._writes_lines = is_shown and not is_terminal
        self._bar = tqdm(
            total=total,
            initial=count,
            unit=noun,
            disable=not is_terminal,
        )

    def update(self, count: int, seconds: float, notes: str = "") -> None:
        """Show that `count` are done after `seconds`, both since the very beginning."""
        left = self.seconds_left(count, seconds)
        if self._writes_lines and seconds >= self._next_line:
            whole = seconds - self._start[1] + (left or 0.0)
            self._next_line = seconds + max(SECONDS_APART, SHARE_APART * whole)
            sys.stderr.write(f"{self._line(count, seconds, left, notes)}\n")
            sys.stderr.flush()
        if left is not None and self._total is None:  # else the bar says so itself
            notes = f"{duration(left)} left, {notes}"
        self._bar.set_postfix_str(notes, refresh=False)
        self._bar.update(count - self._count)
        self._count = count

    def seconds_left(self, count: int, seconds: float) -> float | None:
        """The time to the end, at the pace since the meter began. None if no end is known."""
        first, began = self._start
        ends = []
        if self._total is not None and count > first:
            ends.append((self._total - count) * (seconds - began) / (count - first))
        if self._minutes is not None:
            ends.append(60 * self._minutes - seconds)
        return max(min(ends), 0.0) if ends else None

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _line(self, count: int, seconds: float, left: float | None, notes: str) -> str:
        of = "" if self._total is None else f" of {self._total}"
        parts = [f"{self._noun} {count}{of}", duration(seconds)]
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts) + (f": {notes}" if notes else "")


def metered(items: Sequence[Item], noun: str) -> Iterator[Item]:
    """The items, with a meter that counts those that are done.

    Example:
        >>> [2 * x for x in metered([1, 2], "number")]
        [2, 4]
    """
    began = time.perf_counter()
    meter = Meter(noun, total=len(items))
    try:
        for count, item in enumerate(items, start=1):
            yield item
            meter.update(count, time.perf_counter() - began)
    finally:
        meter.close()
