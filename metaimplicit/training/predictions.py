"""What an adapted learner says of the query sets of some tasks, and which classes it confuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.learner import Episode, EpisodeBatch, MetaLearner, name_parts
from metaimplicit.learner.targets import output_slopes
from metaimplicit.training.metrics import evaluation_mode, tasks_of_one_shape
from metaimplicit.training.queries import query_classes, query_loss


class Batches(Protocol):
    """Batches of tasks by number, the same ones each time, such as a `tasks.EpisodeSampler`."""

    def __getitem__(self, index: int) -> EpisodeBatch:
        """The batch of this number."""


@dataclass(frozen=True)
class Predictions:
    """The classes that an adapted learner gives to the query examples of tasks of one shape.

    Attributes:
        probabilities: The softmax of its outputs, `[tasks, queries, ways]`.
        targets: The right ways, `[tasks, queries]`.
        classes: The number of the class behind each way, `[tasks, ways]`. None if it is unknown.
        names: The names of classes, by number.
        examples: A support input of each class, by number.
        episodes: Some of the tasks, by their position.
        counted: Which query examples count in the loss, `[tasks, queries]`. If None, all of them.

    Example:
        >>> certain = torch.eye(2).expand(3, 2, 2)  # 3 tasks of 2 ways and 2 query examples
        >>> predictions = Predictions(certain, torch.tensor([[0, 1], [0, 1], [1, 1]]))
        >>> predictions.accuracies
        tensor([1.0000, 1.0000, 0.5000])
    """

    probabilities: Tensor
    targets: Tensor
    classes: Tensor | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    examples: Mapping[int, Tensor] = field(default_factory=dict)
    episodes: Mapping[int, Episode] = field(default_factory=dict)
    counted: Tensor | None = None

    @property
    def choices(self) -> Tensor:
        """The ways that the learner chooses, `[tasks, queries]`. Where it is NaN, they are 0."""
        return self.probabilities.argmax(-1)

    @property
    def is_choice(self) -> Tensor:
        """Whether the learner chooses a way at all, likewise."""
        return ~self.probabilities.isnan().any(-1)

    @property
    def is_counted(self) -> Tensor:
        """Whether an example counts, likewise. What the loss ignores is neither right nor wrong."""
        if self.counted is None:
            return torch.ones_like(self.targets, dtype=torch.bool)
        return self.counted

    @property
    def right(self) -> Tensor:
        """Whether an example counts and the choice is right, likewise."""
        return (self.choices == self.targets) & self.is_choice & self.is_counted

    @property
    def wrong(self) -> Tensor:
        """Whether an example counts and the choice is wrong, or there is none, likewise."""
        return self.is_counted & ~self.right

    @property
    def accuracies(self) -> Tensor:
        """The share of right ones among those that count, `[tasks]`."""
        return self.right.sum(1) / self.is_counted.sum(1)

    def name_of(self, task: int, way: int) -> str:
        """What a way of a task is called."""
        if self.classes is None:
            return f"way {way}"
        number = int(self.classes[task, way])
        return self.names.get(number, f"class {number}")


@dataclass(frozen=True)
class Confusion:
    """How often examples of one class were taken for another.

    Attributes:
        numbers: The numbers of the classes, `[n]`.
        counts: The query examples of class i that were taken for class j, `[n, n]`.
        chances: Those of class i in tasks that have the class j as well, `[n, n]`.

    Example:
        >>> always_second = torch.tensor([[[0.1, 0.9], [0.2, 0.8]]])
        >>> classes = torch.tensor([[7, 9]])
        >>> predictions = Predictions(always_second, torch.tensor([[0, 1]]), classes)
        >>> Confusion.of(predictions).counts  # one example of class 7 was taken for one of class 9
        tensor([[0, 1],
                [0, 1]])
    """

    numbers: Tensor
    counts: Tensor
    chances: Tensor

    @classmethod
    def of(cls, predictions: Predictions) -> Confusion:
        """Count the predictions.

        Raises:
            ValueError: It is unknown which classes are behind the ways.
        """
        if predictions.classes is None:
            raise ValueError("predictions: got none with classes, expected the class of each way")
        numbers, positions = predictions.classes.unique(return_inverse=True)
        n = len(numbers)
        counts = torch.zeros(n, n, dtype=torch.long)
        chances = torch.zeros_like(counts)
        chose = predictions.is_counted & predictions.is_choice
        task, query = chose.nonzero(as_tuple=True)
        true = positions[task, predictions.targets[task, query]]
        chosen = positions[task, predictions.choices[task, query]]
        one = torch.tensor(1)
        counts.index_put_((true, chosen), one, accumulate=True)
        offered = positions[task]  # the classes that an example could be taken for
        chances.index_put_((true[..., None].expand_as(offered), offered), one, accumulate=True)
        return cls(numbers, counts, chances)


def predict_classes(
    learner: MetaLearner,
    batches: Batches,
    *,
    steps: int,
    tasks: int,
    names: Mapping[int, str] | None = None,
) -> Predictions:
    """Adapt to tasks of one shape, and predict their query sets, as `evaluate` does.

    The worst task, a middling one and the best one are kept, with their inputs.

    Args:
        learner: The learner, under a loss of classes, one for each example.
        batches: Batches of tasks, all of one number. Those of `tasks` have `labels["classes"]`, the
            class behind each way.
        steps: The number of inner steps.
        tasks: The number of tasks, ≥ 1.
        names: The names of classes, by number.

    Raises:
        ValueError: There are fewer tasks. The tasks of a batch have several shapes. Or the outputs
            and targets have others than `[tasks, queries, ways]` and `[tasks, queries]`.

    Example:
        >>> learner = MetaLearner(torch.nn.Linear(2, 3), torch.nn.functional.cross_entropy)
        >>> pair = (torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))
        >>> predictions = predict_classes(learner, [Episode.of(pair, pair)], steps=2, tasks=4)
        >>> predictions.probabilities.shape
        torch.Size([4, 3, 3])
    """
    probabilities: list[Tensor] = []
    targets: list[Tensor] = []
    counted: list[Tensor] = []
    classes: list[Tensor] = []
    examples: dict[int, Tensor] = {}
    device = next(learner.parameters()).device
    while sum(map(len, targets)) < tasks:
        batch = _batch(batches, len(targets), tasks=tasks, drawn=sum(map(len, targets)))
        episode = tasks_of_one_shape(batch, device)
        outputs = _predict(learner, episode, steps)
        probabilities.append(outputs.float().softmax(-1).cpu())
        counted.append(_counted(learner, outputs, episode.query.targets).cpu())
        targets.append(episode.query.targets.cpu())
        numbers = getattr(batch, "labels", {}).get("classes")
        if numbers is not None:
            classes.append(numbers)
            _note_examples(examples, episode, numbers)

    predictions = Predictions(
        torch.cat(probabilities)[:tasks],
        torch.cat(targets)[:tasks],
        classes=torch.cat(classes)[:tasks] if classes else None,
        names=names or {},
        examples=examples,
        counted=torch.cat(counted)[:tasks],
    )
    size = len(targets[0])
    kept = {task: _one_task(batches[task // size], task % size) for task in _telling(predictions)}
    return Predictions(**vars(predictions) | {"episodes": kept})


def _batch(batches: Any, number: int, *, tasks: int, drawn: int) -> Any:
    try:
        return batches[number]
    except IndexError as error:
        raise ValueError(
            f"tasks: got {tasks}, but the {number} batches have {drawn} tasks; ask for fewer, or "
            "give more batches"
        ) from error


def _predict(learner: MetaLearner, episode: Episode, steps: int) -> Tensor:
    """The outputs for the query sets, `[tasks, queries, ways]`."""
    with evaluation_mode(learner):
        adapted = learner.adapt(episode.support, steps=steps, batched=True)
        with torch.no_grad():
            outputs: Tensor = adapted(episode.query.inputs)
    return outputs


def _counted(learner: MetaLearner, outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the loss counts a query example, `[tasks, queries]`, as `evaluate` finds out."""
    if outputs.dim() != 3 or outputs.shape[:2] != targets.shape:
        raise ValueError(
            f"learner: got outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}, "
            "expected [tasks, queries, ways] and [tasks, queries]; use evaluate for other tasks"
        )
    classes = query_classes(learner, outputs, targets)
    if classes is None or classes.all_count:
        return torch.ones_like(targets, dtype=torch.bool)

    loss = query_loss(learner)
    counted = []
    for of_task, labels in zip(outputs, targets, strict=True):
        slopes = output_slopes(loss, of_task, labels)
        # An example that the loss ignores has no derivative.
        counted.append(torch.zeros_like(of_task) if slopes is None else slopes)
    return (torch.stack(counted) != 0).any(-1)


def _note_examples(examples: dict[int, Tensor], episode: Episode, classes: Tensor) -> None:
    for task, numbers in enumerate(classes.tolist()):
        for way, number in enumerate(numbers):
            if number not in examples:
                first = int((episode.support.targets[task] == way).int().argmax())
                examples[number] = episode.support.inputs[task, first].cpu().clone()


def _telling(predictions: Predictions) -> list[int]:
    """The positions of the worst task, of a middling one and of the best one."""
    order = predictions.accuracies.argsort(stable=True).tolist()
    return list(dict.fromkeys((order[0], order[len(order) // 2], order[-1])))


def _one_task(batch: EpisodeBatch, position: int) -> Episode:
    def entry(leaf: Any) -> Any:
        return leaf[position].cpu() if isinstance(leaf, Tensor) else leaf

    task: Episode = tree_map(entry, name_parts(batch))
    return task
