"""The best measurement of a run, and the state to which early stopping returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """Follows a metric of which lower is better.

    Args:
        best: The lowest measurement so far; infinite before the first.
        since_best: The number of measurements since then.
        snapshot: The state of the run at that measurement; empty before the first.

    Example:
        >>> stopping = EarlyStopping()
        >>> for value in (3.0, 1.0, 2.0):
        ...     stopping.update(value, lambda: {"value": value})
        >>> stopping.snapshot, stopping.is_over(patience=1)
        ({'value': 1.0}, True)
    """

    best: float = math.inf
    since_best: int = 0
    snapshot: dict[str, Any] = field(default_factory=dict)

    def update(self, value: float, take_snapshot: Callable[[], dict[str, Any]]) -> None:
        """Count a measurement. If it is lower than the best, call `take_snapshot` and keep it."""
        if value < self.best:
            self.best = value
            self.since_best = 0
            self.snapshot = take_snapshot()
        else:
            self.since_best += 1

    def is_over(self, patience: int | None) -> bool:
        """Whether `patience` measurements in a row were no better. If None, a run is never over."""
        return patience is not None and self.since_best >= patience

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, which `torch.load(weights_only=True)` reads if the snapshot's are."""
        return {
            "best": self.best,
            "since_best": self.since_best,
            "snapshot": self.snapshot,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> EarlyStopping:
        """The inverse of `to_dict`."""
        return cls(**stored)
