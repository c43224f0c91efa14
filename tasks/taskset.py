"""Tasks drawn from a learn2learn taskset so that they depend on one random generator alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class UncutTask:
    """A task as a taskset gives it, before it is cut into support and query.

    Args:
        inputs: `[samples, ...]`.
        labels: The label of each sample in the task, `[samples]`.
        indices: The positions of the samples in the dataset.
    """

    inputs: Tensor
    labels: np.ndarray
    indices: list[int]


class Taskset:
    """A reader of a learn2learn `Taskset` (formerly `TaskDataset`), which it does not change.

    learn2learn draws from the global generators of Python, NumPy and PyTorch (CPU). Each draw seeds
    them from `rng` and restores them afterwards.

    A first task transform whose `filter_labels` name classes from outside `taskset.dataset` is
    restricted to those inside: learn2learn 0.2.0 builds the transforms of its Omniglot benchmark on
    the undivided dataset, so that its own training tasks hold test classes.

    Args:
        taskset: The taskset.

    Attributes:
        dataset: The `MetaDataset` that classes are drawn from, or None if there is none.

    Raises:
        TypeError: If `taskset` is no taskset.

    Example:
        >>> from types import SimpleNamespace
        >>> stand_in = SimpleNamespace(
        ...     dataset=None,
        ...     num_tasks=-1,
        ...     sampled_descriptions={},
        ...     task_transforms=lambda description: [SimpleNamespace(index=7)],
        ...     get_task=lambda description: (torch.zeros(1, 3), torch.tensor([4])),
        ... )
        >>> task = Taskset(stand_in).draw(np.random.default_rng(0))
        >>> task.inputs.shape, task.labels.tolist(), task.indices
        (torch.Size([1, 3]), [4], [7])
    """

    def __init__(self, taskset: Any) -> None:
        needed = (
            "dataset",
            "task_transforms",
            "num_tasks",
            "sampled_descriptions",
            "get_task",
        )
        missing = [name for name in needed if not hasattr(taskset, name)]
        if missing:
            raise TypeError(
                f"taskset: got {type(taskset).__name__} without {missing[0]}, "
                "expected a learn2learn Taskset (TaskDataset) "
                "or the tasksets of get_tasksets; "
                "wrap a plain dataset in learn2learn.data.Taskset first"
            )
        self._taskset = taskset
        self._transforms = _confined_transforms(taskset)
        datasets = [getattr(step, "dataset", None) for step in self._transforms]
        self.dataset: Any = next(filter(_is_meta_dataset, datasets), None)

    @property
    def labels(self) -> list[Any]:
        """The labels in the dataset of the classes that tasks are drawn from; [] if unknown."""
        if self.dataset is None:
            return []
        labels = list(self.dataset.labels)
        for transform in self._transforms:
            # FilterLabels has labels, and FusedNWaysKShots has filter_labels.
            allowed = getattr(transform, "labels", labels)
            allowed = getattr(transform, "filter_labels", allowed)
            labels = [label for label in labels if label in set(allowed)]
        return labels

    def draw(self, rng: np.random.Generator) -> UncutTask:
        """Draw a task. Equal states of `rng` give equal tasks.

        A taskset with a finite number of tasks keeps its tasks: `rng` chooses one of them. If
        learn2learn has cached its description, that is used. Otherwise the description is drawn
        from the number of the task alone.
        """
        seed = int(rng.integers(2**63))
        count = self._taskset.num_tasks  # -1 if it is endless
        number = int(rng.integers(count)) if count > 0 else None
        description = self._taskset.sampled_descriptions.get(number)
        if description is None:
            with seeded_globals(seed if number is None else number):
                description = self._describe()
        with seeded_globals(seed):
            inputs, labels = self._taskset.get_task(description)
        labels = labels.cpu() if isinstance(labels, Tensor) else labels
        indices = [part.index for part in description]
        return UncutTask(inputs, np.asarray(labels).ravel(), indices)

    def dataset_labels(self, task: UncutTask) -> list[Any]:
        """The label in the dataset of each sample of a task; [] if unknown."""
        if self.dataset is None or len(task.indices) != len(task.labels):
            return []
        return [self.dataset.indices_to_labels[index] for index in task.indices]

    def _describe(self) -> Any:
        """A new description of a task, as `Taskset.sample_task_description` makes it."""
        description = None
        for transform in self._transforms:
            description = transform(description)
        return description


def root_dataset(dataset: Any) -> Any:
    """The dataset under learn2learn's wrappers `MetaDataset` and `FilteredMetaDataset`."""
    while _is_meta_dataset(dataset) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch (CPU), and restore them after it."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would seed the devices too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _is_meta_dataset(dataset: Any) -> bool:
    return isinstance(getattr(dataset, "indices_to_labels", None), Mapping)


def _confined_transforms(taskset: Any) -> list[Callable[[Any], Any]]:
    """The task transforms, the first of them restricted to the classes of `taskset.dataset`."""
    transforms = taskset.task_transforms
    if callable(transforms):
        return [transforms]
    transforms = list(transforms)
    if not transforms or not _is_meta_dataset(taskset.dataset):
        return transforms
    first = transforms[0]
    drawn = list(getattr(first, "filter_labels", ()))
    labels = set(taskset.dataset.labels)
    inside = [label for label in drawn if label in labels]
    if len(inside) < len(drawn):
        transforms[0] = type(first)(
            first.dataset,
            n=first.n,
            k=first.k,
            replacement=first.replacement,
            filter_labels=inside,
        )
    return transforms
