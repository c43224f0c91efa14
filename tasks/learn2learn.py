"""Few-shot tasks of learn2learn: any `Taskset`, or one of its benchmarks by name."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.cache import cache_dir
from tasks.episodes import SPLIT_NAMES, Episodes, Pair, Splits
from tasks.few_shot import require_at_least_one, way_targets
from tasks.taskset import Taskset, UncutTask, root_dataset, seeded_globals

RECIPE = (
    "pip install torch torchvision cython setuptools wheel && "
    "pip install --no-build-isolation --use-pep517 --config-settings=--global-option=build_ext "
    "learn2learn==0.2.0"
)


class LearnToLearn:
    """The tasks of a learn2learn taskset, each cut into support and query.

    Inputs are as the taskset loads them, `[tasks, ways·shots, ...]` (query: `ways·queries`): first
    all samples of way 0, then those of way 1, and so on. Targets are int64 in 0 … ways−1. They are
    the taskset's own labels if these are 0 … ways−1 (`RemapLabels`), else the ways are in an order
    drawn for each task.

    `labels["classes"]`, int64 `[tasks, ways]`, holds the label in the dataset behind each way, or
    its position in `dataset.labels` if the labels are not integers. It is missing if the taskset
    does not tell.

    `sample` depends on `rng` alone, for one thread at a time, and across processes if the labels
    are integers (a set of strings has no fixed order). Random transforms may use the CPU generators
    of Python, NumPy and PyTorch. See `tasks.taskset.Taskset` for how tasks are drawn.

    Args:
        taskset: A `Taskset` (formerly `TaskDataset`), or what
            `learn2learn.vision.benchmarks.get_tasksets` returns, of which `split` is taken.
        ways: The number of classes in a task, ≥ 1: that of the taskset.
        shots: The number of support samples of each class, ≥ 1.
        queries: The number of query samples of each class, ≥ 1. The taskset's tasks have at least
            shots + queries samples of each class; further ones are left out.
        split: "train", "validation" or "test".
        name: The family is called name/split, which seeds its episodes.

    Raises:
        TypeError: If `taskset` is no taskset.
        ValueError: If `split` is unknown, a number is below 1, or the tasks have another number of
            classes, too few samples or one sample twice. One task is drawn to see.

    Example:
        >>> from types import SimpleNamespace
        >>> samples = [SimpleNamespace(index=i) for i in range(8)]
        >>> taskset = SimpleNamespace(  # stands in for learn2learn.data.Taskset
        ...     dataset=None,
        ...     num_tasks=-1,
        ...     sampled_descriptions={},
        ...     task_transforms=lambda description: samples,
        ...     get_task=lambda description: (torch.rand(8, 3), torch.arange(8) // 4),
        ... )
        >>> family = LearnToLearn(taskset, ways=2, shots=1, queries=3, split="train")
        >>> family.sample(5, np.random.default_rng(0)).query[0].shape
        torch.Size([5, 6, 3])
    """

    kind = "classification"

    def __init__(
        self,
        taskset: Any,
        *,
        ways: int,
        shots: int,
        queries: int,
        split: str,
        name: str = "learn2learn",
    ) -> None:
        require_at_least_one(ways=ways, shots=shots, queries=queries)
        if split not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise ValueError(f"split: got {split!r}, expected one of {known}")
        if all(hasattr(taskset, part) for part in SPLIT_NAMES):
            taskset = getattr(taskset, split)
        self.name = f"{name}/{split}"
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.outputs = ways
        self._taskset = Taskset(taskset)
        inputs, _ = self.sample(1, np.random.default_rng(0)).support
        self.input_shape = tuple(inputs.shape[2:])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that tasks are drawn from; empty if they are unknown.

        They contain the identity of the underlying dataset object, so that equal labels of two
        datasets are different classes.
        """
        root = root_dataset(self._taskset.dataset)
        dataset = f"{type(root).__name__}-{id(root):x}"
        return tuple(f"{dataset}/{label}" for label in self._taskset.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the same classes without the dataset, equal in every process."""
        return tuple(str(label) for label in self._taskset.labels)

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` tasks. Equal states of `rng` give equal tasks.

        Raises:
            ValueError: If a task has another number of classes, too few samples or one twice.
        """
        inputs = []
        classes = []
        for _ in range(tasks):
            task = self._taskset.draw(rng)
            rows = self._draw_rows(task, rng)
            index = torch.from_numpy(rows).to(task.inputs.device)
            inputs.append(task.inputs[index])
            classes.append(self._class_numbers(task, rows))
        known = [numbers for numbers in classes if numbers is not None]
        labels = {"classes": torch.stack(known)} if len(known) == tasks else {}

        by_way = torch.stack(inputs)  # [tasks, ways, shots + queries, ...]
        support = self._inputs_and_targets(by_way[:, :, : self.shots])
        query = self._inputs_and_targets(by_way[:, :, self.shots :])
        return Episodes(support, query, labels)

    def _inputs_and_targets(self, by_way: Tensor) -> Pair:
        """`[tasks, ways, count, ...]` as inputs `[tasks, ways·count, ...]`, with their targets."""
        targets = way_targets(*by_way.shape[:3]).to(by_way.device)
        return by_way.flatten(1, 2), targets

    def _draw_rows(self, task: UncutTask, rng: np.random.Generator) -> np.ndarray:
        """The samples of each way, `[ways, shots + queries]`: first those of the support."""
        labels, ways = np.unique(task.labels, return_inverse=True)
        self._check(task, np.bincount(ways))
        order = np.arange(self.ways)
        if not np.array_equal(labels, order):
            # In the order of their labels, the classes would tell a model which way they are.
            order = rng.permutation(self.ways)
        count = self.shots + self.queries
        members = [np.flatnonzero(ways == way) for way in order]
        return np.stack([rng.permutation(samples)[:count] for samples in members])

    def _check(self, task: UncutTask, counts: np.ndarray) -> None:
        """Raise if a task, with `counts` samples of each class, cannot be cut as asked."""
        if len(counts) != self.ways:
            raise ValueError(
                f"ways: got {self.ways}, "
                f"but the tasks of {self.name} have {len(counts)} classes; "
                f"ask for ways={len(counts)}, "
                f"or build the taskset with n={self.ways} ways"
            )
        needed = self.shots + self.queries
        if needed > counts.min():
            raise ValueError(
                f"shots + queries: got {self.shots} + {self.queries} = {needed}, "
                f"but a class in a task of {self.name} has {counts.min()} samples; "
                "ask for fewer shots or queries, "
                f"or build the taskset with k={needed} shots"
            )
        if len(set(task.indices)) < len(task.indices):
            raise ValueError(
                f"taskset: a task of {self.name} holds a sample twice, "
                "expected distinct ones, since support and query may not share any; "
                "build the taskset with replacement=False"
            )

    def _class_numbers(self, task: UncutTask, rows: np.ndarray) -> Tensor | None:
        """The class in the dataset of each way, `[ways]`, or None if that is unknown.

        It is unknown if several classes of the dataset share one label of the task.
        """
        labels = self._taskset.dataset_labels(task)
        if not labels:
            return None
        pairs = set(zip(labels, task.labels.tolist(), strict=True))
        if len(pairs) != self.ways:
            return None
        of_ways = [labels[row] for row in rows[:, 0]]
        known = list(self._taskset.dataset.labels)
        if all(isinstance(label, (int, np.integer)) for label in known):
            return torch.tensor([int(label) for label in of_ways])
        return torch.tensor([known.index(label) for label in of_ways])


def load(
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    data_root: Path | str | None = None,
    taskset: str = "omniglot",
) -> Splits:
    """The three tasksets of one of learn2learn's benchmarks. See `LearnToLearn` for shapes.

    learn2learn downloads what `data_root` does not hold.

    Args:
        ways: The number of classes in a task.
        shots: The number of support samples of each class.
        queries: The number of query samples of each class.
        data_root: The folder that learn2learn keeps its data in. If None, `learn2learn` in the
            cache folder.
        taskset: The name of a benchmark: one of `learn2learn.vision.benchmarks.list_tasksets()`.

    Raises:
        ImportError: If learn2learn is not installed.
        ValueError: If the name is unknown, or the data cannot give such tasks.
    """
    require_at_least_one(ways=ways, shots=shots, queries=queries)
    benchmarks = _import_learn2learn().vision.benchmarks
    known = sorted(benchmarks.list_tasksets())
    if taskset not in known:
        raise ValueError(f"taskset: got {taskset!r}, expected one of {', '.join(known)}")
    default = cache_dir() / "learn2learn"
    root = default if data_root is None else Path(data_root).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    # A global shuffle divides Omniglot's classes. A resumed run must see the same division.
    with seeded_globals(0):
        tasksets = benchmarks.get_tasksets(
            taskset,
            train_ways=ways,
            train_samples=shots + queries,
            test_ways=ways,
            test_samples=shots + queries,
            root=str(root),
        )
    families = [
        LearnToLearn(
            tasksets,
            ways=ways,
            shots=shots,
            queries=queries,
            split=split,
            name=f"learn2learn-{taskset}",
        )
        for split in SPLIT_NAMES
    ]
    return Splits(*families)


def _import_learn2learn() -> Any:
    """The package. The warnings that its import raises are suppressed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("learn2learn")
    except ImportError as error:
        raise ImportError(
            f"learn2learn could not be imported ({error}); it is the extra "
            "metaimplicit[learn2learn]. Its release builds only if its Cython sources are "
            f"translated again: {RECIPE}"
        ) from error
