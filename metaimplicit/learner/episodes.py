"""Batches of few-shot tasks: their form, the checks on them, and the accuracy of predictions."""

# This module does not import `annotations` from `__future__`. That would turn the types of the
# fields of a NamedTuple into strings that documentation tools cannot resolve.

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pair(NamedTuple):
    """The inputs and targets of one set of examples.

    Attributes:
        inputs: `[m, ...]`, or `[tasks, m, ...]` for a batch of tasks.
        targets: Integer class indices, or floats for regression. Their leading sizes are those of
            the inputs.

    Example:
        >>> pair = Pair(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
        >>> inputs, targets = pair
        >>> targets is pair.targets
        True
    """

    inputs: Tensor
    targets: Tensor


class Episode(NamedTuple):
    """The support set that a task adapts on, and the query set that its adaptation is measured on.

    Attributes:
        support: Examples of one task, or of a batch of tasks.
        query: Likewise.

    Example:
        >>> support = (torch.zeros(3, 2), torch.tensor([0, 1, 2]))
        >>> query = (torch.ones(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> Episode.of(support, query).query.inputs.shape
        torch.Size([6, 2])
    """

    support: Pair
    query: Pair

    @classmethod
    def of(cls, support: Sequence[Tensor], query: Sequence[Tensor]) -> "Episode":
        """The episode of two plain `(inputs, targets)` pairs.

        Raises:
            TypeError: One of them does not have two parts.
        """
        return cls(Pair(*support), Pair(*query))


class EpisodeBatch(Protocol):
    """What the learner takes: anything with `support` and `query`, such as an `Episode`.

    Each is an `(inputs, targets)` pair of tensors `[tasks, m, ...]`. The number m of examples may
    differ between support and query.

    Example:
        >>> from types import SimpleNamespace
        >>> from metaimplicit import MetaLearner
        >>> learner = MetaLearner(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss)
        >>> support = (torch.randn(4, 5, 2), torch.randn(4, 5, 1))  # 4 tasks of 5 examples
        >>> query = (torch.randn(4, 9, 2), torch.randn(4, 9, 1))
        >>> episodes = SimpleNamespace(support=support, query=query)
        >>> learner.backward(episodes).report.inner_gradient_norm.shape  # one norm for each task
        torch.Size([4])
    """

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        """The examples that the tasks adapt on."""

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        """The examples that the adapted models are measured on."""


def check_pair(name: str, pair: Pair) -> None:
    """Check that inputs and targets begin with the same `[tasks, examples]`, neither of them 0.

    Args:
        name: What the error calls the pair.
        pair: The inputs and targets of a batch of tasks.

    Raises:
        ValueError: The inputs have fewer than two axes, the leading sizes differ, or one is 0.

    Example:
        >>> check_pair("support", Pair(torch.zeros(2, 3, 1), torch.zeros(2, 3)))
    """
    leading = pair.inputs.shape[:2]
    if pair.inputs.dim() < 2 or leading != pair.targets.shape[:2] or 0 in leading:
        raise ValueError(
            f"{name}: got inputs {tuple(pair.inputs.shape)} and targets "
            f"{tuple(pair.targets.shape)}, expected both to begin with [tasks, examples], "
            "neither empty"
        )


def check_classes(support: Tensor, query: Tensor, classes: int) -> None:
    """Check the labels of a batch of tasks.

    Args:
        support: Class indices, `[tasks, m, ...]`.
        query: Class indices, `[tasks, q, ...]`.
        classes: The number of outputs of the model, one for each class.

    Raises:
        ValueError: A label is outside 0 … classes − 1, or a task has a query label that does not
            occur in its support set.

    Example:
        >>> check_classes(torch.tensor([[0, 1]]), torch.tensor([[1, 1, 0]]), classes=2)
    """
    for name, labels in {"support": support, "query": query}.items():
        low = int(labels.min())
        high = int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"episodes.{name} labels: got {low if low < 0 else high}, expected class indices "
                f"from 0 to {classes - 1}, one for each output of the model; convert targets that "
                "are not class indices to float"
            )

    present = torch.zeros(len(support), classes, dtype=torch.bool, device=support.device)
    present.scatter_(1, support.flatten(1), True)
    missing = ~present.gather(1, query.flatten(1))
    if bool(missing.any()):
        task, position = missing.nonzero()[0].tolist()
        label = int(query.flatten(1)[task, position])
        raise ValueError(
            f"episodes: task {task} has class {label} in its query set, but no example of it in "
            "its support set, expected every class of the query in the support"
        )


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """The share of correct predictions of each task.

    Args:
        outputs: One score for each class, `[tasks, m, classes, ...]`, as cross-entropy takes them.
        targets: Class indices, `[tasks, m, ...]`.

    Returns:
        `[tasks]`, in float64. None if the targets are floats, or have another number of axes.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])
        >>> accuracy(scores, torch.tensor([[0, 1]]))
        tensor([0.5000], dtype=torch.float64)
        >>> accuracy(scores, torch.zeros(1, 2, 2)) is None
        True
    """
    if targets.is_floating_point() or outputs.dim() != targets.dim() + 1:
        return None
    correct = outputs.argmax(2) == targets
    return correct.double().flatten(1).mean(1)
