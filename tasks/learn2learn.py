"""learn2learn's tasksets as our episodes: any `Taskset` (once `TaskDataset`), or one of its benchmarks by name."""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.cache import cache_dir
from tasks.episodes import Episodes, Splits
from tasks.pool import require_at_least_one

SPLITS = ("train", "validation", "test")

RECIPE = (
    "pip install torch torchvision cython setuptools wheel && "
    "pip install --no-build-isolation --use-pep517 -C--global-option=build_ext learn2learn==0.2.0"
)


class LearnToLearn:
    """The tasks of a learn2learn taskset, each cut into support and query.

    Inputs are as the taskset loads them, `[tasks, ways·shots, ...]` (query: `ways·queries`), class-major: all samples
    of way 0, then of way 1 … Targets are int64 in 0 … ways−1: the taskset's own where it numbers its classes so
    (`RemapLabels`), else an order drawn for each task. `labels["classes"]`, `[tasks, ways]`, holds the label in the
    dataset behind each way, or its position in `dataset.labels` where labels are not integers; it is left out where the
    taskset does not tell.

    learn2learn draws from global generators. Here they are seeded from `rng` around each draw and put back after it, so
    the same `rng` gives the same episodes: for one thread at a time, for random transforms that use Python's, NumPy's
    or PyTorch's CPU generator, and across processes where labels are integers (a set of strings has no fixed order).
    A taskset with finite `num_tasks` keeps its tasks: `rng` chooses one of them, a description that learn2learn has
    cached is used, any other is drawn from its index alone. The taskset itself is never changed.

    Only classes of `taskset.dataset` are drawn: learn2learn 0.2.0 builds the transforms of its Omniglot benchmark on
    the undivided dataset, so that its own training tasks hold test classes.

    Args:
        taskset: the taskset, or what `learn2learn.vision.benchmarks.get_tasksets` returns, of which `split` is taken.
        ways, shots, queries: each ≥ 1; its tasks have `ways` classes of at least shots + queries samples.
        split: "train", "validation" or "test".
        name: `name`/`split` names the family, and so seeds its episodes.

    Raises:
        TypeError: `taskset` is no taskset.
        ValueError: an unknown split, or tasks of other ways or too few samples (one is drawn to see).
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
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if all(hasattr(taskset, part) for part in SPLITS):
            taskset = getattr(taskset, split)
        needed = ("dataset", "task_transforms", "num_tasks", "sampled_descriptions", "get_task")
        if missing := [part for part in needed if not hasattr(taskset, part)]:
            raise TypeError(
                f"taskset: got {type(taskset).__name__} without {missing[0]}, expected a learn2learn Taskset "
                "(TaskDataset) or the tasksets of get_tasksets; wrap a plain dataset in learn2learn.data.Taskset first"
            )
        self.name, self.ways, self.shots, self.queries, self.outputs = (
            f"{name}/{split}",
            ways,
            shots,
            queries,
            ways,
        )
        self._taskset, self._transforms = taskset, _confined(taskset)
        self._source = next(
            filter(_is_labelled, (getattr(t, "dataset", None) for t in self._transforms)), None
        )
        probe, _ = self.sample(1, np.random.default_rng(0)).support
        self.input_shape = tuple(probe.shape[2:])

    @property
    def classes(self) -> tuple[str, ...]:
        """What names the classes tasks are made of, unique to the underlying dataset object; empty if unknown."""
        if self._source is None:
            return ()
        known = list(self._source.labels)
        for transform in self._transforms:  # FusedNWaysKShots, FilterLabels
            kept = getattr(transform, "filter_labels", getattr(transform, "labels", known))
            known = [label for label in known if label in set(kept)]
        root = self._source
        while _is_labelled(root) and hasattr(
            root, "dataset"
        ):  # under MetaDataset and FilteredMetaDataset
            root = root.dataset
        return tuple(f"{type(root).__name__}-{id(root):x}/{label}" for label in known)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The same, alike in every process."""
        return tuple(name.partition("/")[2] for name in self.classes)

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` tasks, with `rng` alone."""
        drawn = [self._task(rng) for _ in range(tasks)]
        inputs = torch.stack([x for x, _ in drawn])  # [tasks, ways, shots + queries, ...]
        classes = [c for _, c in drawn if c is not None]
        labels = {"classes": torch.stack(classes)} if len(classes) == tasks else {}
        return Episodes(
            self._pair(inputs[:, :, : self.shots]), self._pair(inputs[:, :, self.shots :]), labels
        )

    def _pair(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `[tasks, ways, each, ...]` flattened to `[tasks, ways·each, ...]`, and their targets."""
        tasks, ways, each = inputs.shape[:3]
        targets = torch.arange(ways, device=inputs.device).repeat_interleave(each).repeat(tasks, 1)
        return inputs.flatten(1, 2), targets

    def _task(self, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """One task: inputs `[ways, shots + queries, ...]`, class of each way `[ways]` if known."""
        seed, count = int(rng.integers(2**63)), self._taskset.num_tasks
        index = int(rng.integers(count)) if count > 0 else None  # −1: an endless taskset
        with _seeded(seed if index is None else index):
            description = self._taskset.sampled_descriptions.get(index)
            if description is None:
                description = self._describe()
        with _seeded(seed):
            inputs, labels = self._taskset.get_task(description)
        labels = labels.cpu() if isinstance(labels, Tensor) else labels
        values, ways = np.unique(np.asarray(labels), return_inverse=True)
        self._check(ways, description)

        order = np.arange(self.ways)
        if not np.array_equal(values, order):
            order = rng.permutation(self.ways)  # sorted classes would let a model learn their order
        each = self.shots + self.queries
        rows = np.stack([rng.permutation(np.flatnonzero(ways == way))[:each] for way in order])
        return inputs[torch.from_numpy(rows).to(inputs.device)], self._classes_of(
            ways, description, rows[:, 0]
        )

    def _describe(self) -> Any:
        """A new task description, as `Taskset.sample_task_description` makes it."""
        description = None
        for transform in self._transforms:
            description = transform(description)
        return description

    def _check(self, ways: np.ndarray, description: Any) -> None:
        counts = np.bincount(ways)
        if len(counts) != self.ways:
            raise ValueError(
                f"ways: got {self.ways}, but the tasks of {self.name} have {len(counts)} classes; "
                f"ask for ways={len(counts)}, or build the taskset with n={self.ways} ways"
            )
        each = self.shots + self.queries
        if each > counts.min():
            raise ValueError(
                f"shots + queries: got {self.shots} + {self.queries} = {each}, but a class in a task of {self.name} "
                f"has {counts.min()} samples; ask for fewer shots or queries, or build the taskset with k={each} shots"
            )
        samples = [part.index for part in description]
        if len(set(samples)) < len(samples):
            raise ValueError(
                f"taskset: a task of {self.name} holds a sample twice, expected distinct ones, since support and query "
                "may not share any; build the taskset with replacement=False"
            )

    def _classes_of(self, ways: np.ndarray, description: Any, firsts: np.ndarray) -> Tensor | None:
        """The class of each row of `firsts`, unless several classes of the dataset share a label of the task."""
        if self._source is None or len(description) != len(ways):
            return None
        labels: list[Any] = [self._source.indices_to_labels[part.index] for part in description]
        if len(set(zip(labels, ways.tolist(), strict=True))) != self.ways:
            return None
        known = list(self._source.labels)
        numbered = all(isinstance(label, (int, np.integer)) for label in known)
        return torch.tensor(
            [int(labels[row]) if numbered else known.index(labels[row]) for row in firsts]
        )


def load(
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    data_root: Path | str | None = None,
    taskset: str = "omniglot",
) -> Splits:
    """The three tasksets of one of learn2learn's benchmarks, which downloads what `data_root` does not hold.

    Args:
        ways, shots, queries: as for `LearnToLearn`, the same for all three.
        data_root: the folder learn2learn keeps its data in; by default `learn2learn` in our cache folder.
        taskset: a name that `learn2learn.vision.benchmarks.list_tasksets()` gives, such as "omniglot".

    Raises:
        ImportError: learn2learn is not installed.
        ValueError: an unknown name, or a number the data does not support.
    """
    require_at_least_one(ways=ways, shots=shots, queries=queries)
    benchmarks = _learn2learn().vision.benchmarks
    known = sorted(benchmarks.list_tasksets())
    if taskset not in known:
        raise ValueError(f"taskset: got {taskset!r}, expected one of {', '.join(known)}")
    root = Path(data_root).expanduser() if data_root is not None else cache_dir() / "learn2learn"
    root.mkdir(parents=True, exist_ok=True)
    with _seeded(
        0
    ):  # Omniglot's classes are divided by a global shuffle: a resumed run must meet the same division
        tasksets = benchmarks.get_tasksets(
            taskset,
            train_ways=ways,
            train_samples=shots + queries,
            test_ways=ways,
            test_samples=shots + queries,
            root=str(root),
        )
    train, validation, test = (
        LearnToLearn(
            tasksets,
            ways=ways,
            shots=shots,
            queries=queries,
            split=split,
            name=f"learn2learn-{taskset}",
        )
        for split in SPLITS
    )
    return Splits(train, validation, test)


def _learn2learn() -> Any:
    """The package, its warnings on import unheard."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("learn2learn")
    except ImportError as error:
        raise ImportError(
            f"learn2learn could not be imported ({error}): it is the extra metaimplicit[learn2learn], and its release "
            f"builds only after being told to translate its own sources anew: {RECIPE}"
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, NumPy and PyTorch (CPU), seeded inside and as they were before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _is_labelled(dataset: Any) -> bool:
    """Whether it is a `MetaDataset`."""
    return isinstance(getattr(dataset, "indices_to_labels", None), Mapping)


def _confined(taskset: Any) -> list[Callable[[Any], Any]]:
    """The task transforms, a first one that draws classes from outside `taskset.dataset` kept to those inside."""
    transforms = taskset.task_transforms
    if callable(transforms):
        return [transforms]
    transforms = list(transforms)
    if transforms and hasattr(transforms[0], "filter_labels") and _is_labelled(taskset.dataset):
        first, own = transforms[0], set(taskset.dataset.labels)
        kept = [label for label in first.filter_labels if label in own]
        if len(kept) < len(first.filter_labels):
            transforms[0] = type(first)(
                first.dataset,
                n=first.n,
                k=first.k,
                replacement=first.replacement,
                filter_labels=kept,
            )
    return transforms
