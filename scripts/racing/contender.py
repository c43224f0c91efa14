"""What a contender of the race does, and the tasks of a batch one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tasks import Episodes, FewShot, TaskFamily


class Contender(Protocol):
    """A learner with its optimiser.

    Attributes:
        normalization: Which images enter the normalisation when it is validated and tested.
    """

    normalization: str

    @property
    def module(self) -> nn.Module:
        """All that training changes is in the state of this module."""
        ...

    def step(self, episodes: Episodes, *, spent: float) -> None:
        """One meta-step. `spent` is the share of the race's time that is over."""
        ...

    def accuracies(self, episodes: Episodes) -> Tensor:
        """The query accuracy of each task after adaptation to its support set, `[tasks]`."""
        ...


@dataclass(frozen=True)
class Sizes:
    """The training tasks of a contender: how many in a meta-step, and how large they are."""

    tasks: int
    ways: int
    queries: int
    shots: int = 1

    def resize(self, family: TaskFamily) -> FewShot:
        """Tasks of these sizes with the classes of `family`.

        Raises:
            ValueError: The family does not draw tasks of any sizes from a pool of images.
        """
        if not isinstance(family, FewShot):
            raise ValueError(f"task: got {family.name}, expected a family of tasks.FewShot")
        return FewShot(
            family.pool,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            name=family.name,
        )


def each_task(episodes: Episodes) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support inputs and targets, query inputs and targets of one task after the other."""
    return zip(*episodes.support, *episodes.query, strict=True)


def accuracy(scores: Tensor, targets: Tensor) -> Tensor:
    """The share of examples whose largest score is that of their class.

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        tensor(0.5000)
    """
    return (scores.argmax(-1) == targets).to(torch.get_default_dtype()).mean()
