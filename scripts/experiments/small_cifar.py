"""CIFAR-10 at the size that fits: fewer images, of fewer pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F

import tasks
from experiments.base import Case, Experiment


@dataclass(frozen=True)
class SmallCifar(Experiment):
    """Options of every experiment on it, to be inherited before the experiment's kind."""

    images: int = 500
    """Training images of each class."""
    test: int = 1000
    """Test images of each class."""
    side: int = 16
    """Pixels, 32 or a divisor of it: means of squares."""
    batch: int = 128
    """Images in a batch."""

    sides: ClassVar[tuple[int, ...]] = (8, 16, 32)

    def cases(self) -> list[Case]:
        if self.side not in self.sides:
            raise ValueError(
                f"--side: got {self.side}, expected one of {', '.join(map(str, self.sides))}"
            )
        for option, most in (("images", 5000), ("test", 1000), ("batch", 10 * self.images)):
            if not 1 <= (got := getattr(self, option)) <= most:
                raise ValueError(f"--{option}: got {got}, expected from 1 to {most}")
        return super().cases()

    def data(self, seed: int) -> tuple[tasks.Examples, tasks.Examples]:
        """Training and test images `[n, 3, side, side]`, standardised."""
        train, test = self._whole
        if self.images < 5000:
            train, _ = tasks.per_class(train, self.images, seed)
        if self.test < 1000:
            test, _ = tasks.per_class(test, self.test, 0)
        a, b = (shrunk(part, 32 // self.side) for part in (train, test))
        return tasks.standardise(a).to(self.torch_device), tasks.standardise(b, like=a).to(
            self.torch_device
        )

    @cached_property  # of all runs
    def _whole(self) -> tuple[tasks.Examples, tasks.Examples]:
        return tasks.cifar10(self.data_root)


def shrunk(examples: tasks.Examples, factor: int) -> tasks.Examples:
    """Images uint8 `[n, c, h, w]`, each `factor` × `factor` square the mean of its pixels, rounded."""
    means = F.avg_pool2d(examples.inputs.float(), factor)
    return tasks.Examples(means.round().to(torch.uint8), examples.targets)
