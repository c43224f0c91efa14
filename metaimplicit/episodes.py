"""Batches of few-shot tasks as the learner takes them, what makes one good, and how predictions on it are judged."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class EpisodeBatch(Protocol):
    """What the learner takes: (inputs, targets) pairs with the task axis first, `[tasks, m, ...]`."""

    @property
    def support(self) -> Pair: ...

    @property
    def query(self) -> Pair: ...


def check_pair(name: str, pair: Pair) -> None:
    """ValueError unless both begin with [tasks, examples], neither empty."""
    inputs, targets = pair
    if inputs.dim() < 2 or inputs.shape[:2] != targets.shape[:2] or 0 in inputs.shape[:2]:
        raise ValueError(
            f"{name}: got inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}, expected both to begin "
            "with [tasks, examples], neither empty"
        )


def accuracy(outputs: Tensor, targets: Tensor, mean: bool = True) -> Tensor | None:
    """The share of right classes (axis 2, as cross-entropy has it), `[tasks]` or its mean; None without classes."""
    if targets.is_floating_point() or outputs.dim() != targets.dim() + 1:
        return None
    right = (outputs.argmax(2) == targets).double().flatten(1).mean(1)
    return right.mean() if mean else right


def check_classes(support: Tensor, query: Tensor, classes: int) -> None:
    """ValueError for a label out of range, or a class of the query without support."""
    for name, labels in {"support": support, "query": query}.items():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"episodes.{name} labels: got {low if low < 0 else high}, expected class indices from 0 to "
                f"{classes - 1}, one for each output of the model; make targets that are no classes float"
            )
    present = torch.zeros(len(support), classes, dtype=torch.bool, device=support.device)
    missing = ~present.scatter(1, support.flatten(1), True).gather(1, query.flatten(1))
    if bool(missing.any()):
        task, position = missing.nonzero()[0].tolist()
        raise ValueError(
            f"episodes: task {task} asks for class {int(query.flatten(1)[task, position])} in its query, but its "
            "support set has no example of it"
        )
