"""Where a hyperparameter may lie, and the free coordinates in which an optimiser moves it there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class Domain(ABC):
    """A set of values. The optimiser moves free coordinates; `value(free)` is always inside."""

    @abstractmethod
    def value(self, free: Tensor) -> Tensor:
        """The hyperparameter at these coordinates, differentiable."""

    @abstractmethod
    def free(self, value: Tensor) -> Tensor:
        """Coordinates of a value.

        Raises:
            ValueError: the value is outside.
        """

    def project(self, free: Tensor) -> Tensor:
        """The nearest coordinates that are allowed, after a step."""
        return free


@dataclass(frozen=True)
class Real(Domain):
    """All of ℝ, as it is."""

    def value(self, free: Tensor) -> Tensor:
        return free

    def free(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True)
class Positive(Domain):
    """x > 0, x = exp(free): steps multiply."""

    def value(self, free: Tensor) -> Tensor:
        return free.exp()

    def free(self, value: Tensor) -> Tensor:
        _check(value > 0, value, "numbers > 0")
        return value.log()


@dataclass(frozen=True)
class Interval(Domain):
    """low < x < high, x = low + (high − low) sigmoid(free)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_bounds("Interval", self.low, self.high)
        if math.isinf(self.low) or math.isinf(self.high):
            raise ValueError(f"Interval: got ({self.low}, {self.high}), expected finite bounds; use Positive or Box")

    def value(self, free: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * free.sigmoid()

    def free(self, value: Tensor) -> Tensor:
        _check((value > self.low) & (value < self.high), value, f"numbers between {self.low} and {self.high}")
        return ((value - self.low) / (self.high - self.low)).logit()


@dataclass(frozen=True)
class Box(Domain):
    """low ≤ x ≤ high by projection: x itself moves, and is clamped after a step."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        _check_bounds("Box", self.low, self.high)

    def value(self, free: Tensor) -> Tensor:
        return free

    def free(self, value: Tensor) -> Tensor:
        _check((value >= self.low) & (value <= self.high), value, f"numbers from {self.low} to {self.high}")
        return value

    def project(self, free: Tensor) -> Tensor:
        return free.clamp(self.low, self.high)


@dataclass(frozen=True)
class Simplex(Domain):
    """x > 0, Σx = 1 along `dim`, x = softmax(free)."""

    dim: int = -1

    def value(self, free: Tensor) -> Tensor:
        return free.softmax(self.dim)

    def free(self, value: Tensor) -> Tensor:
        close = (value.sum(self.dim, keepdim=True) - 1).abs() < 1e-4
        _check((value > 0) & close, value, f"numbers > 0 that sum to 1 along dim {self.dim}")
        return value.log()


def _check_bounds(name: str, low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{name}: got low {low} and high {high}, expected low < high")


def _check(inside: Tensor, value: Tensor, expected: str) -> None:
    if not bool(inside.all()):
        worst = value.masked_select(~inside.expand_as(value))[0].item()
        raise ValueError(f"hyperparameter: got {worst:g}, expected {expected}; start inside its domain")
