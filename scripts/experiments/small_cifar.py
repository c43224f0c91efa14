"""CIFAR-10 at a size that fits a small machine: fewer images, with fewer pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from command_line.ranges import Count, within

import tasks
from experiments.base import Experiment


@dataclass(frozen=True)
class SmallCifar(Experiment):
    """The options of experiments on small CIFAR-10. It stands first among their base classes."""

    images: Annotated[int, within(1, 5000)] = 500
    """Number of training images of each class."""
    test: Annotated[int, within(1, 1000)] = 1000
    """Number of test images of each class."""
    side: Annotated[int, within(8, 32)] = 16
    """Pixels of a side: 32, or a divisor of it, for which squares of pixels are averaged."""
    batch: Count = 128
    """Number of images in a batch."""

    image_set = "cifar10"
    sides: ClassVar[tuple[int, ...]] = (8, 16, 32)  # what `side` may be

    def check_options(self) -> None:
        """Raise ValueError for sizes out of range."""
        super().check_options()
        if self.side not in self.sides:
            known = ", ".join(map(str, self.sides))
            raise ValueError(f"--side: got {self.side}, expected one of {known}")
        self.check_range("batch", high=10 * self.images)

    def data(self, seed: int) -> tuple[tasks.Examples, tasks.Examples]:
        """Training and test images `[n, 3, side, side]`, standardised."""
        train, test = self.whole
        if self.images < 5000:
            train, _ = tasks.per_class(train, self.images, seed)
        if self.test < 1000:
            test, _ = tasks.per_class(test, self.test, 0)
        train = shrink(train, 32 // self.side)
        test = tasks.standardise(shrink(test, 32 // self.side), like=train)
        train = tasks.standardise(train)
        return train.to(self.torch_device), test.to(self.torch_device)

    @cached_property
    def whole(self) -> tuple[tasks.Examples, tasks.Examples]:
        """The training and the test set, read once for all runs."""
        return tasks.cifar10(self.data_root)


def shrink(examples: tasks.Examples, factor: int) -> tasks.Examples:
    """Replace each square of `factor` × `factor` pixels by its rounded mean.

    Example:
        >>> image = torch.tensor([[0, 10], [20, 31]], dtype=torch.uint8)
        >>> shrink(tasks.Examples(image.view(1, 1, 2, 2), torch.zeros(1)), 2).inputs.tolist()
        [[[[15]]]]
    """
    means = F.avg_pool2d(examples.inputs.float(), factor)
    return tasks.Examples(means.round().to(torch.uint8), examples.targets)
