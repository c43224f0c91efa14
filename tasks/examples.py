"""Labelled examples in memory, and seeded batches of them that any step asks for by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """A labelled set. `len` is the number n of examples.

    Args:
        inputs: `[n, *shape]`, n ≥ 1, of any type.
        targets: `[n]`, the numbers of the classes, from 0.

    Raises:
        ValueError: If there is no example, `targets` has not one number for each input, or one of
            them is no tensor.

    Example:
        >>> examples = Examples(torch.rand(4, 3), torch.tensor([2, 0, 2, 1]))
        >>> examples.counts()
        [1, 1, 2]
        >>> examples.take(examples.targets == 2).inputs.shape
        torch.Size([2, 3])
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        for name, value in (("inputs", self.inputs), ("targets", self.targets)):
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name}: got {type(value).__name__}, expected a tensor; convert it by "
                    "torch.as_tensor"
                )
        n = len(self.inputs) if self.inputs.ndim else 0
        if n == 0:
            raise ValueError(
                f"inputs: got shape {tuple(self.inputs.shape)}, "
                "expected [n, *shape] with n ≥ 1; "
                "give at least one example, the example axis first"
            )
        if self.targets.shape != (n,):
            raise ValueError(
                f"targets: got shape {tuple(self.targets.shape)}, "
                f"expected [{n}] as there are {n} inputs; "
                "give one class number for each input"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the inputs and the targets."""
        content = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            content.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            content.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
        return content.hexdigest()[:16]

    def take(self, index: Tensor) -> Examples:
        """Copy the examples at `index`: positions, int64 `[m]`, or a mask, bool `[n]`.

        Raises:
            ValueError: If `index` selects nothing.
        """
        index = index.to(self.inputs.device)
        return Examples(self.inputs[index], self.targets[index])

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on `device`."""
        return Examples(self.inputs.to(device), self.targets.to(device))

    def counts(self) -> list[int]:
        """The number of examples of each of the classes 0 … max(targets).

        Raises:
            ValueError: If the targets are not integers ≥ 0.
        """
        targets = self.targets
        is_integer = not (targets.is_floating_point() or targets.is_complex())
        if not is_integer or targets.min() < 0:
            raise ValueError(
                f"targets: got {targets.dtype} from {targets.min()}, "
                "expected class numbers, integers ≥ 0; "
                "number the classes from 0"
            )
        counts: list[int] = targets.long().bincount().tolist()
        return counts


class Batches:
    """An endless, seeded stream of batches of examples: `batches(i)` is batch i ≥ 0.

    The stream is one permutation of all n examples after another. The permutation of epoch e
    depends on (seed, e) alone. Batch i holds the positions i·size … (i + 1)·size − 1 of the stream,
    so every batch has exactly `size` examples and may end one epoch and begin the next. A batch
    does not depend on which batches were asked for before.

    Args:
        examples: The set. Batches stay on its device.
        size: The number of examples in a batch, 1 … n. If None, every batch is the whole set in
            order, without a copy.
        seed: ≥ 0. Different seeds give different orders.
        shuffle: If False, every epoch runs through the examples in order.

    Raises:
        ValueError: If `size` or `seed` is out of range.

    Example:
        >>> examples = Examples(torch.arange(6.0), torch.zeros(6, dtype=torch.int64))
        >>> batches = Batches(examples, size=4, seed=0, shuffle=False)
        >>> batches(1)["inputs"]
        tensor([4., 5., 0., 1.])
    """

    def __init__(
        self,
        examples: Examples,
        size: int | None,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        is_whole = size is None or isinstance(size, Integral)
        if not is_whole or (size is not None and not 1 <= size <= len(examples)):
            raise ValueError(
                f"size: got {size!r}, expected 1 … {len(examples)}, "
                "the number of examples; None is the whole set"
            )
        random_stream(seed)  # raises for a negative seed
        self.examples = examples
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        # The permutations of the last two epochs, because a batch can need two.
        self._orders: dict[int, Tensor] = {}

    def __call__(self, i: int) -> dict[str, Tensor]:
        """Batch i.

        Returns:
            `inputs` `[size, *shape]`, `targets` `[size]`, and `index`, int64 `[size]`: the
            positions of these examples in the set.

        Raises:
            ValueError: If i is negative.
        """
        if i < 0:
            raise ValueError(f"i: got {i}, expected a batch number ≥ 0")
        if self.size is None:
            device = self.examples.inputs.device
            index = torch.arange(len(self.examples), device=device)
            batch = self.examples
        else:
            start = i * self.size
            index = torch.cat(list(self._parts(start, start + self.size)))
            batch = self.examples.take(index)
        return {
            "inputs": batch.inputs,
            "targets": batch.targets,
            "index": index,
        }

    def _parts(self, start: int, stop: int) -> Iterator[Tensor]:
        """The positions `start` … `stop` − 1 of the stream, cut where epochs end."""
        n = len(self.examples)
        for epoch in range(start // n, (stop - 1) // n + 1):
            first = epoch * n
            yield self._order(epoch)[max(start - first, 0) : stop - first]

    def _order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, `[n]`, drawn once if epochs are asked for in order."""
        if epoch not in self._orders:
            n = len(self.examples)
            stream = random_stream(self.seed, epoch)
            order = stream.permutation(n) if self.shuffle else np.arange(n)
            while len(self._orders) > 1:
                oldest = next(iter(self._orders))
                del self._orders[oldest]
            device = self.examples.inputs.device
            self._orders[epoch] = torch.from_numpy(order).to(device, torch.int64)
        return self._orders[epoch]


def random_stream(seed: int, *names: int | str) -> np.random.Generator:
    """A random generator that depends on `seed` and `names` alone.

    Args:
        seed: ≥ 0.
        names: What the numbers are for. They are joined, letter by letter, and integers follow as
            they are; different results give independent streams of one seed.

    Raises:
        ValueError: If the seed is no integer, or negative.

    Example:
        >>> same = random_stream(0, "split"), random_stream(0, "split")
        >>> same[0].random() == same[1].random()
        True
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed: got {seed}, expected an integer ≥ 0")
    entropy = [int(seed)]
    for name in names:
        entropy.extend(name.encode() if isinstance(name, str) else [name])
    return np.random.default_rng(entropy)
