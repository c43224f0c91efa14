"""The function by which a model ends: log-softmax, softmax or sigmoid, known from its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metaimplicit.operators.output_loss import OutputLoss, output_gradient

MAX_CLASSES = 256  # the most outputs among which parts are looked for, as there are d² of them
MIN_ROWS = 4  # the fewest rows that tell a part from a coincidence


@dataclass(frozen=True)
class Link:
    """The end n of a model, z = n(s).

    Args:
        kind: What n is.
        axis: The axis of a softmax, counted from the end.
        parts: Where n is a log-softmax along the last axis, `(start, stop)`. Elsewhere it is the
            identity then. If empty, n has no parts.

    Example:
        >>> Link("log-softmax").apply(torch.zeros(2)).exp()
        tensor([0.5000, 0.5000])
    """

    kind: Literal["log-softmax", "softmax", "sigmoid"]
    axis: int = -1
    parts: tuple[tuple[int, int], ...] = ()

    def apply(self, s: Tensor) -> Tensor:
        """n(s), in the shape of s."""
        if self.kind == "sigmoid":
            return s.sigmoid()
        if self.kind == "softmax":
            return s.softmax(self.axis)
        if not self.parts:
            return s.log_softmax(self.axis)
        pieces = []
        end = 0
        for start, stop in self.parts:
            pieces += [s[..., end:start], s[..., start:stop].log_softmax(-1)]
            end = stop
        return torch.cat([*pieces, s[..., end:]], -1)

    def invert(self, z: Tensor) -> Tensor:
        """An s with n(s) = z, in the shape of z. It is finite where z is 0 or 1."""
        if self.kind == "sigmoid":
            return z.logit(torch.finfo(z.dtype).eps)
        if self.kind == "softmax":
            return z.clamp(min=torch.finfo(z.dtype).tiny).log()
        return z

    def adds_curvature(self, slope: Tensor) -> bool:
        """Whether Σ r ∂²n/∂s² with r = ∂ℓ/∂z is known to be positive semi-definite."""
        if self.kind != "log-softmax":
            return False
        # ∂²n_k/∂s² = −(diag p − p pᵀ) for every k.
        if self.parts:
            sums = [slope[..., start:stop].sum(-1) for start, stop in self.parts]
        else:
            sums = [slope.sum(self.axis)]
        roundoff = 100 * torch.finfo(slope.dtype).eps * slope.abs().max()
        return all(bool((total <= roundoff).all()) for total in sums)


def find_link(loss: OutputLoss, z: Tensor, slope: Tensor) -> Link | None:
    """The link behind which outputs are, as far as their values and the loss tell.

    Log-probabilities have Σ exp z = 1 along an axis, or along a part of the last one, wherever the
    loss reads them. Probabilities of classes have Σ z = 1. Probabilities of single outputs are in
    [0, 1], and the slope of their loss grows without bound towards the ends.

    Args:
        loss: ℓ, `[tasks, …] -> [tasks]`.
        z: The outputs, `[tasks, …]`, without a graph.
        slope: ∂ℓ/∂z.

    Example:
        >>> p = torch.tensor([[[0.25, 0.75]]])
        >>> find_link(lambda z: z.square().sum((1, 2)), p, 2 * p).kind
        'softmax'
    """
    if z.is_complex():  # they are no probabilities
        return None
    return _find_log_softmax(z, slope) or _find_softmax(z, slope) or _find_sigmoid(loss, z)


def _find_log_softmax(z: Tensor, slope: Tensor) -> Link | None:
    axis = _class_axis(z, slope, _log_sum)
    if axis is not None:
        return Link("log-softmax", axis)
    parts = _normalised_parts(z, slope)
    return Link("log-softmax", parts=tuple(parts)) if parts else None


def _find_softmax(z: Tensor, slope: Tensor) -> Link | None:
    if not bool((z >= 0).all()):
        return None
    axis = _class_axis(z, slope, lambda x, axis: x.sum(axis) - 1)
    if axis is None or z.shape[axis] == 1:
        return None
    return Link("softmax", axis)


def _find_sigmoid(loss: OutputLoss, z: Tensor) -> Link | None:
    if not bool(((z >= 0) & (z <= 1)).all()):
        return None

    def largest_slope(*values: float) -> Tensor:
        slopes = [output_gradient(loss, torch.full_like(z, value))[1] for value in values]
        return torch.stack(slopes).detach().abs().max()

    # The slope of −log z is 1/z: it is 2500 times as large at 1e-4 as at 1/4.
    if not bool(largest_slope(1e-4, 1 - 1e-4) > 100 * largest_slope(0.25, 0.75)):
        return None
    return Link("sigmoid")


def _class_axis(z: Tensor, slope: Tensor, excess: Callable[[Tensor, int], Tensor]) -> int | None:
    """The one axis along which z is normalised wherever the loss depends on it.

    It counts from the end. The axis of the examples, 1, comes last: five examples of five equal
    classes are normalised along it as well.
    """
    axes = []
    for axis in range(2, z.dim()):
        if _is_normalised(z, slope, axis, excess):
            axes.append(axis - z.dim())
    if not axes and z.dim() > 1 and _is_normalised(z, slope, 1, excess):
        axes.append(1 - z.dim())
    return axes[0] if len(axes) == 1 else None


def _is_normalised(
    z: Tensor, slope: Tensor, axis: int, excess: Callable[[Tensor, int], Tensor]
) -> bool:
    # Rounding z by ε|z| changes log Σ exp z by ε Σ p|log p| at most, which is ε log d.
    roundoff = 10 * torch.finfo(z.dtype).eps * (1 + math.log(max(1, z.shape[axis])))
    is_one = excess(z, axis).abs() <= roundoff
    is_unread = (slope == 0).all(axis)
    return bool((is_one | is_unread).all())


def _normalised_parts(z: Tensor, slope: Tensor) -> list[tuple[int, int]]:
    """Where Σ exp z = 1 along a part of the last axis, in order, the longest parts first chosen."""
    d = z.shape[-1]
    rows = (slope != 0).any(-1).nonzero()[:MIN_ROWS]
    if z.dim() < 3 or not 3 <= d <= MAX_CLASSES or len(rows) < MIN_ROWS:
        return []
    sums = z[tuple(rows.T)].exp().cumsum(-1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], -1)
    error = (sums.unsqueeze(1) - sums.unsqueeze(2) - 1).abs()
    roundoff = 100 * torch.finfo(z.dtype).eps * (1 + sums.unsqueeze(1))
    candidates = (error <= roundoff).all(0).nonzero().tolist()

    parts: list[tuple[int, int]] = []
    for start, stop in sorted(candidates, key=lambda part: part[0] - part[1]):
        is_free = all(stop <= first or start >= last for first, last in parts)
        part = slice(start, stop)
        if stop - start > 1 and is_free and _is_part(z[..., part], slope[..., part]):
            parts.append((start, stop))
    return sorted(parts)


def _is_part(z: Tensor, slope: Tensor) -> bool:
    is_read = bool((slope != 0).any())
    return is_read and _is_normalised(z, slope, -1, _log_sum)


def _log_sum(z: Tensor, axis: int) -> Tensor:
    return z.logsumexp(axis)
