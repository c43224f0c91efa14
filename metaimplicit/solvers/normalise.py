"""Right-hand sides of norm one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.solvers.arithmetic import divisor, norm


@dataclass(frozen=True)
class NormalisedRHS:
    """Right-hand sides b = unit · norm · peak, in two factors since the square of a tiny norm is 0.

    Attributes:
        unit: b/‖b‖, `[tasks, n]`. It is 0 where b is zero or not finite.
        norm: ‖b/peak‖, `[tasks, 1]`. It is 0 where b is zero or not finite.
        peak: max |bᵢ|, `[tasks, 1]`. It is 1 where b is zero or not finite.
        finite: Whether b is finite, `[tasks, 1]`.

    Example:
        >>> rhs = NormalisedRHS.of(torch.tensor([[3e-30, 4e-30]]))
        >>> rhs.unit
        tensor([[0.6000, 0.8000]])
        >>> rhs.unscale(rhs.unit)
        tensor([[3.0000e-30, 4.0000e-30]])
    """

    unit: Tensor
    norm: Tensor
    peak: Tensor
    finite: Tensor

    @classmethod
    def of(cls, b: Tensor) -> NormalisedRHS:
        """The right-hand sides b, `[tasks, n]`."""
        peak = b.abs().amax(-1, keepdim=True)
        finite = peak.isfinite()
        peak = torch.where(finite & (peak > 0), peak, 1.0)
        scaled = torch.where(finite, b / peak, 0.0)
        length = norm(scaled)
        return cls(scaled / divisor(length), length, peak=peak, finite=finite)

    def scale(self, x: Tensor) -> Tensor:
        """The solution for `unit` from that for b, `[tasks, n]`. It is 0 where b is zero."""
        return torch.where(self.norm > 0, x / divisor(self.norm * self.peak), 0.0)

    def unscale(self, x: Tensor) -> Tensor:
        """The solution for b from that for `unit`, `[tasks, n]`. It is 0 where b is zero."""
        return x * self.norm * self.peak
