"""Step lengths for gradient descent on a loss and gradient that are known only approximately."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from metaimplicit.params import Params
from metaimplicit.tuning.free_meta import total_norm

MAX_REJECTIONS = 2  # in a row, before the accepted point is evaluated again
TINY = 1e-12  # stands for a gradient norm of zero, so that 1/L stays finite


@dataclass(frozen=True)
class Trial:
    """A point and what was computed there, with inner solves of some tolerance.

    Attributes:
        point: φ_k in free coordinates, `{name: tensor}`.
        gradient: p_k, the approximate gradient there, named and shaped as `point`. It is 0 where a
            bound blocks a step against it.
        loss: g(φ_k), approximate too.
        tolerance: ε_k, to which the problems behind p_k and g(φ_k) were solved.
    """

    point: Params
    gradient: Params
    loss: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers, which `torch.load(weights_only=True)` reads."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Trial:
        """The inverse of `to_dict`."""
        return cls(**stored)


class LineSearch:
    """Steps φ − p/L, where L estimates the Lipschitz constant of the gradient.

    Let (φ, p, g, ε) be the point accepted last, and (φ_k, p_k, g_k, ε_k) a new trial.

    - Estimate: L' = max(‖p_k − p‖, ‖p_k‖/4)/‖φ_k − φ‖. The second term keeps the next step at most
      four times as long as this one. Before there are two points, or a slope, L' = ‖p_k‖: a step of
      length one.
    - Accept: if g_k ≤ g − L/4 ‖φ_k − φ‖² + slack, the trial becomes the accepted point and L ← L'.
      The slack ε_k/4 + ε (1/4 + L) ‖φ_k − φ‖ is what the inexact solves may add (Pedregosa 2016,
      section 4).
    - Reject: otherwise the next trial starts from φ again, with L between twice and eight times as
      large: L ← min(max(L', 2L), 8L).
    - After two rejections in a row, φ itself is the next trial: its old loss may have been too low,
      because it was computed to a larger tolerance. This trial is always accepted, and L' is then
      measured between it and the trial rejected last.
    - If φ_k = φ, because a projection undid the step, the trial is accepted and L stays.

    Pedregosa 2016 has no estimate: there L only doubles after a rejection and shrinks after an
    acceptance. The paper has 1/2 where the condition above has 1/4. On a quadratic, where the
    estimate finds L itself, a step of 1/L lowers g by exactly L/2 ‖φ_k − φ‖², so with 1/2 round-off
    would decide.

    Attributes:
        lipschitz: L; NaN before the first trial.
        accepted: The trial accepted last, or None before the first.
        rejected: The trials rejected since then.

    Example:
        On g(φ) = 2φ², whose gradient is 4φ, the second estimate is exact.

        >>> import torch
        >>> search = LineSearch()
        >>> point = {"phi": torch.tensor(1.0)}
        >>> for _ in range(3):
        ...     phi = point["phi"]
        ...     search.add(Trial(point, {"phi": 4 * phi}, loss=2 * phi.item() ** 2, tolerance=0.0))
        ...     point = search.next_point()
        True
        True
        True
        >>> search.lipschitz
        4.0
    """

    def __init__(self) -> None:
        self.lipschitz = math.nan
        self.accepted: Trial | None = None
        self.rejected: list[Trial] = []

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers, which `torch.load(weights_only=True)` reads."""
        return {
            "lipschitz": self.lipschitz,
            "accepted": None if self.accepted is None else self.accepted.to_dict(),
            "rejected": [trial.to_dict() for trial in self.rejected],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LineSearch:
        """The inverse of `to_dict`."""
        search = cls()
        search.lipschitz = stored["lipschitz"]
        accepted = stored["accepted"]
        search.accepted = None if accepted is None else Trial.from_dict(accepted)
        search.rejected = [Trial.from_dict(trial) for trial in stored["rejected"]]
        return search

    def add(self, trial: Trial) -> bool:
        """Accept or reject a trial at `next_point()`, and update L. Returns whether it accepts."""
        accept = self._accepts(trial)
        self.lipschitz = self._next_lipschitz(trial, accept)
        if accept:
            self.accepted = trial
            self.rejected = []
        else:
            self.rejected.append(trial)
        return accept

    def next_point(self) -> Params:
        """Where to evaluate the next trial, in free coordinates.

        Raises:
            ValueError: No trial has been added.
        """
        if self.accepted is None:
            raise ValueError("next_point: got no trial yet, expected add() first")
        if self._reevaluates:
            return dict(self.accepted.point)
        length = 1 / self.lipschitz
        gradient = self.accepted.gradient
        return {name: x - length * gradient[name] for name, x in self.accepted.point.items()}

    @property
    def _reevaluates(self) -> bool:
        """Whether the next trial is the accepted point itself."""
        return len(self.rejected) == MAX_REJECTIONS

    def _accepts(self, trial: Trial) -> bool:
        last = self.accepted
        if last is None or self._reevaluates:
            return True
        distance = _distance(trial.point, last.point)
        if distance == 0:  # a projection undid the step
            return True
        slack = trial.tolerance / 4 + last.tolerance * (1 / 4 + self.lipschitz) * distance
        return trial.loss <= last.loss + slack - self.lipschitz / 4 * distance**2

    def _next_lipschitz(self, trial: Trial, accept: bool) -> float:
        if self.accepted is None or self.lipschitz == TINY:  # there was no slope so far
            return max(total_norm(trial.gradient), TINY)
        if self._reevaluates:
            return self._estimate(trial, self.rejected[-1])
        estimate = self._estimate(trial, self.accepted)
        if accept:
            return estimate
        return min(max(estimate, 2 * self.lipschitz), 8 * self.lipschitz)

    def _estimate(self, trial: Trial, other: Trial) -> float:
        """L' between two trials; the present L if they are at the same point."""
        distance = _distance(trial.point, other.point)
        if distance == 0:
            return self.lipschitz
        change = _distance(trial.gradient, other.gradient)
        return max(change, total_norm(trial.gradient) / 4, TINY) / distance


def _distance(a: Params, b: Params) -> float:
    return total_norm({name: x - b[name] for name, x in a.items()})
