"""The losses of the examples of a batch, and how they count in the loss of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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
