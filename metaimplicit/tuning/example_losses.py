"""The losses of the examples of a batch, and how they count in the loss of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaimplicit.tensors import tensors_in


class Count(NamedTuple):
    """What counts in the loss of a batch. It depends on the targets, not on the outputs.

    Attributes:
        scale: s in V = s · mean ℓᵢ, where V is the loss of the batch and ℓᵢ, zero where an example
            does not count, are its losses. It is 1 for a plain mean, m for a sum and
            m/(m − k) for a mean that leaves out k of the m examples.
        counted: Which losses count, bool, shaped as they are. None if all do.
    """

    scale: float | Tensor
    counted: Tensor | None


@dataclass(frozen=True)
class ExampleLosses:
    """The losses of a batch, with V = s · mean ℓ.

    Args:
        losses: ℓ, `[m]`, or `[m, *positions]` if an example has several labels.
        count: s, and which losses count.

    Example:
        >>> import torch
        >>> losses = ExampleLosses(torch.tensor([[1.0, 3.0], [4.0, 0.0]]), Count(1.0, None))
        >>> losses.of_examples()
        tensor([2., 2.])
        >>> losses.weighted_mean(torch.tensor([1.0, 10.0]))
        tensor(11.)
    """

    losses: Tensor
    count: Count

    def detach(self) -> ExampleLosses:
        """The same without a graph."""
        return ExampleLosses(self.losses.detach(), self.count)

    def of_examples(self) -> Tensor:
        """The mean loss of the labels of an example that count, `[m]`; 0 if none does."""
        if self.losses.dim() == 1:
            return self.losses
        if self.count.counted is None:
            return self.losses.flatten(1).mean(1)
        labels = self.count.counted.flatten(1).sum(1).clamp(min=1)
        return self.losses.flatten(1).sum(1) / labels

    def weighted_mean(self, weights: Tensor) -> Tensor:
        """The scalar s · mean(w ℓ), which is V if w = 1.

        Args:
            weights: w, `[m]` or shaped as the losses.

        Raises:
            ValueError: The weights have another shape.
        """
        if weights.shape not in (self.losses.shape, self.losses.shape[:1]):
            raise ValueError(
                f"weights: got shape {tuple(weights.shape)} for losses "
                f"{tuple(self.losses.shape)}, expected one weight for each example, [m], or one "
                "for each loss"
            )
        mean = (align(weights, self.losses.dim()) * self.losses).mean()
        scale = self.count.scale
        return mean if isinstance(scale, float) and scale == 1 else scale * mean


def align(weights: Tensor, dims: int) -> Tensor:
    """`weights` with axes of length 1 behind, so that the first axis is that of the examples.

    Example:
        >>> import torch
        >>> align(torch.ones(4), 3).shape
        torch.Size([4, 1, 1])
    """
    missing = dims - weights.dim()
    return weights.reshape(*weights.shape, *[1] * missing) if missing > 0 else weights


def may_leave_out_labels(losses: Tensor, targets: Any) -> bool:
    """Whether there are fewer losses than labels, which a mask of the labels may choose.

    Args:
        losses: ℓ, `[m]` or `[m, *positions]`.
        targets: The targets of the m examples.

    Example:
        >>> labels = torch.zeros(2, 3, dtype=torch.int64)
        >>> may_leave_out_labels(torch.zeros(2, 2), labels)
        True
        >>> may_leave_out_labels(torch.zeros(2, 3), labels)
        False
    """
    labels = [y for y in tensors_in(targets) if y.dim() > 1]
    if not labels or any(y.numel() == losses.numel() for y in labels):
        return False
    # One loss for each example may be its mean over several numbers.
    return losses.dim() > 1 or any(not y.is_floating_point() for y in labels)


def are_ignored(targets: Any, zero: Tensor) -> bool:
    """Whether all losses that are zero belong to the label −100, which losses of torch ignore.

    Args:
        targets: The targets of the batch.
        zero: Which losses are zero, bool, shaped as they are.

    Example:
        >>> are_ignored(torch.tensor([1, -100]), torch.tensor([False, True]))
        True
    """
    if not isinstance(targets, Tensor) or targets.numel() != zero.numel():
        return False
    return bool((targets.reshape(zero.shape)[zero] == -100).all())


def is_plain_mean(value: Tensor, losses: Tensor) -> bool:
    """Whether V = mean ℓ ≠ 0 to round-off.

    Example:
        >>> is_plain_mean(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
        True
    """
    mean = losses.mean().item()
    error = abs(value.item() - mean)
    tolerance = 16 * torch.finfo(losses.dtype).eps
    if not 0 < abs(mean) < math.inf:
        return False
    if error <= tolerance * abs(mean):
        return True
    return error <= tolerance * losses.abs().mean().item()  # of losses of both signs


def cancellation(losses: Tensor, counted: Tensor) -> float:
    """How many times the mean of |ℓ| is as large as |mean ℓ|, plus one.

    Example:
        >>> cancellation(torch.tensor([3.0, -1.0]), torch.tensor([True, True]))
        3.0
    """
    seen = torch.where(counted, losses, 0.0)
    return 1 + (seen.abs().mean() / seen.mean().abs()).item()
