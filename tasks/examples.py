"""Labelled examples in memory, and the seeded batches of them that any step can ask for by number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """A labelled set.

    Args:
        inputs: `[n, *shape]`, n ≥ 1.
        targets: `[n]`, class numbers from 0.

    Raises:
        ValueError: another number of targets than of inputs, or none.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        n = len(self.inputs) if self.inputs.ndim else 0
        if n == 0:
            raise ValueError(
                f"inputs: got shape {tuple(self.inputs.shape)}, expected [n, *shape] with n ≥ 1; "
                "give at least one example, the example axis first"
            )
        if self.targets.shape != (n,):
            raise ValueError(
                f"targets: got shape {tuple(self.targets.shape)}, expected [{n}] as there are {n} inputs; "
                "give one class number an input"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Examples:
        """The examples at `index`: positions, int64 `[m]`, or a mask, bool `[n]`."""
        index = index.to(self.inputs.device)
        return Examples(self.inputs[index], self.targets[index])

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on `device`."""
        return Examples(self.inputs.to(device), self.targets.to(device))

    def counts(self) -> list[int]:
        """How many examples each of the classes 0 … max has; ValueError for targets that are no class numbers."""
        if self.targets.is_floating_point() or self.targets.is_complex() or self.targets.min() < 0:
            raise ValueError(
                f"targets: got {self.targets.dtype} from {self.targets.min()}, expected class numbers, integers ≥ 0; "
                "number the classes from 0"
            )
        counts: list[int] = self.targets.long().bincount().tolist()
        return counts


class Batches:
    """An endless, seeded stream of batches: `batches(i)` is batch i ≥ 0, whatever was asked for before.

    The stream is one permutation of all examples after another, that of epoch e drawn from (seed, e) alone, and batch
    i is its positions i·size … (i + 1)·size − 1: every batch has exactly `size` examples, and every example comes
    once an epoch, so a batch may end one epoch and begin the next.

    Args:
        examples: the set; batches stay on its device.
        size: examples in a batch, 1 … n; None: every batch is the whole set, in order.
        seed: ≥ 0; two seeds give two orders.
        shuffle: False: each epoch runs through the examples in order.

    Raises:
        ValueError: a size, seed or batch number out of range.
    """

    def __init__(
        self, examples: Examples, size: int | None, seed: int, shuffle: bool = True
    ) -> None:
        if size is not None and not 1 <= size <= len(examples):
            raise ValueError(
                f"size: got {size}, expected 1 … {len(examples)}, the number of examples; None is the whole set"
            )
        random_stream(seed)
        self.examples, self.size, self.seed, self.shuffle = examples, size, seed, shuffle
        self._orders: dict[int, Tensor] = {}  # of the last two epochs: a batch can need two

    def __call__(self, i: int) -> dict[str, Tensor]:
        """Batch i: `inputs` `[size, *shape]`, `targets` `[size]`, and `index`, int64 `[size]`: which examples."""
        if i < 0:
            raise ValueError(f"i: got {i}, expected a batch number ≥ 0")
        n, size = len(self.examples), self.size
        if size is None:
            index = torch.arange(n, device=self.examples.inputs.device)
            return {
                "inputs": self.examples.inputs,
                "targets": self.examples.targets,
                "index": index,
            }
        begin, end = i * size, (i + 1) * size
        epochs = range(begin // n, (end - 1) // n + 1)
        index = torch.cat([self._order(e)[max(begin - e * n, 0) : end - e * n] for e in epochs])
        batch = self.examples.take(index)
        return {"inputs": batch.inputs, "targets": batch.targets, "index": index}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            n = len(self.examples)
            order = random_stream(self.seed, epoch).permutation(n) if self.shuffle else np.arange(n)
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = torch.from_numpy(order).to(
                self.examples.inputs.device, torch.int64
            )
        return self._orders[epoch]


def random_stream(seed: int, *names: int | str) -> np.random.Generator:
    """A generator of (seed, names) alone; ValueError for a negative seed."""
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected an integer ≥ 0")
    words = [
        word for name in names for word in (name.encode() if isinstance(name, str) else [name])
    ]
    return np.random.default_rng([seed, *words])
