"""Several tensors as the parts of one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaimplicit.tuning.levels import Granularity


class FlatLayout:
    """The parts of a flat vector `[n]` that belong to some tensors, in their order.

    Args:
        tensors: The tensors, of any shapes. Only their numbers of elements are kept.

    Attributes:
        numels: The number of elements of each tensor.
        n: The number of elements of all.

    Example:
        >>> layout = FlatLayout([torch.zeros(2), torch.zeros(1, 1)])
        >>> layout.flatten([torch.ones(2), torch.full((1, 1), 5.0)])
        tensor([1., 1., 5.])
        >>> layout.expand(torch.tensor([3.0, 4.0]))
        tensor([3., 3., 4.])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.numels = [x.numel() for x in tensors]
        self.n = sum(self.numels)

    def shape(self, granularity: Granularity) -> tuple[int, ...]:
        """The shape of numbers of a granularity: `[]`, `[tensors]` or `[n]`."""
        if granularity == "scalar":
            return ()
        return (len(self.numels),) if granularity == "per-tensor" else (self.n,)

    def flatten(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The elements of the tensors, `[n]`; written into `out` if it is given."""
        if len(tensors) == 1 and out is not None:
            return out.copy_(tensors[0].reshape(-1))
        return torch.cat([x.reshape(-1) for x in tensors], out=out)

    def split(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of `flat`, `[n]`, one for each tensor and shaped as it."""
        pairs = zip(flat.split(self.numels), like, strict=True)
        return [part.view_as(x) for part, x in pairs]

    def mask(self, flat: Tensor, keep: Sequence[bool]) -> Tensor:
        """`flat`, `[n]`, with zeros for the tensors that are not to be kept."""
        pairs = zip(flat.split(self.numels), keep, strict=True)
        return torch.cat([part * kept for part, kept in pairs])

    def expand(self, per_tensor: Tensor) -> Tensor:
        """A number of each tensor, `[tensors]`, repeated for each of its elements, `[n]`."""
        pairs = zip(per_tensor, self.numels, strict=True)
        return torch.cat([number.expand(numel) for number, numel in pairs])

    def dot(self, a: Tensor, b: Tensor, granularity: Granularity) -> Tensor:
        """aᵀb over the elements that share a number: `[]`, `[tensors]` or `[n]`."""
        if granularity == "scalar":
            return a.dot(b)
        if granularity == "per-element":
            return a * b
        pairs = zip(a.split(self.numels), b.split(self.numels), strict=True)
        return torch.stack([x.dot(y) for x, y in pairs])
