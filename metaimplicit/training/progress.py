"""How far a run is, how long it lasts, and how the outer learning rate decays meanwhile."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from numbers import Real

from metaimplicit.counts import check_count


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: The number of outer steps taken.
        seconds: The wall-clock time spent in training, over all sittings of the run.
        lines: The number of lines of its metrics.jsonl.
        best_score: The best validation so far: the highest accuracy or metric, or the lowest loss
            or metric, negated. None before the first one.
        best_rule: How it was selected, as the `best` of `fit`. None stands for the highest
            accuracy, or else the lowest loss.
        validated: The step of the last validation.

    Example:
        >>> progress = Progress(step=50, seconds=10.0)
        >>> progress.seconds / progress.step  # seconds for each step
        0.2
    """

    step: int = 0
    seconds: float = 0.0
    lines: int = field(default=0, repr=False)
    best_score: float | None = field(default=None, repr=False)
    validated: int = field(default=0, repr=False)
    best_rule: str | None = field(default=None, repr=False)

    def note_score(self, score: float, rule: str | None = None) -> bool:
        """Compare the score of a validation with the best one, and return whether it is better.

        The best one by another rule does not count.
        """
        if rule != self.best_rule:
            self.best_score = None
            self.best_rule = rule
        is_best = score > (-math.inf if self.best_score is None else self.best_score)
        if is_best:
            self.best_score = score
        return is_best


class Stopwatch:
    """Adds the wall-clock time of this sitting to a run's `progress.seconds`.

    Args:
        progress: The progress to update. The time runs from now on.

    Example:
        >>> progress = Progress(step=3, seconds=60.0)
        >>> Stopwatch(progress).update()
        >>> progress.seconds > 60.0
        True
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._start = time.perf_counter() - progress.seconds

    def update(self) -> None:
        """Set `progress.seconds` to the time until now."""
        self.progress.seconds = time.perf_counter() - self._start


@dataclass(frozen=True)
class Budget:
    """How long to train: until one of the limits is reached.

    Args:
        steps: The number of meta-steps, ≥ 1. If None, there is no such limit.
        minutes: The wall-clock time in training, > 0, validation included, over all sittings of a
            run. If None, there is no such limit.

    Raises:
        ValueError: Neither limit is given, or one is out of range.

    Example:
        >>> Budget(steps=100).spent(Progress(step=25))
        0.25
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("budget: got neither steps nor minutes, expected at least one of them")
        if self.steps is not None:
            check_count("steps", self.steps, unit=" meta-step")
        if self.minutes is not None and not (isinstance(self.minutes, Real) and self.minutes > 0):
            raise ValueError(f"minutes: got {self.minutes!r}, expected a time > 0")

    def spent(self, progress: Progress) -> float:
        """The share of the budget that is used, from 0 to 1; training ends at 1.

        It is the larger one of step/steps and seconds/(60·minutes).
        """
        shares = [0.0]
        if self.steps is not None:
            shares.append(progress.step / self.steps)
        if self.minutes is not None:
            shares.append(progress.seconds / (60 * self.minutes))
        return min(max(shares), 1.0)


def duration(seconds: float) -> str:
    """A time in words, to two units.

    Example:
        >>> duration(0.0123), duration(0.25), duration(75), duration(3725)
        ('12 ms', '0.2 s', '1 min 15 s', '1 h 2 min')
    """
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def cosine(spent: float) -> float:
    """The factor (1 + cos π·spent)/2 on the outer learning rate (Loshchilov & Hutter 2017).

    It falls from 1 to 0 while `spent`, the share of the budget used, grows from 0 to 1.

    Example:
        >>> cosine(0.0), cosine(1.0)
        (1.0, 0.0)
    """
    return 0.5 * (1 + math.cos(math.pi * spent))


def constant(spent: float) -> float:
    """The factor 1 on the outer learning rate, for every share of the budget used.

    Example:
        >>> constant(0.7)
        1.0
    """
    return 1.0
