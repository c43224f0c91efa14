"""A dataset whose samples identify themselves, and a stand-in for a learn2learn taskset."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from episode_checks import assert_class_major, assert_no_input_twice
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tasks.episodes import Episodes
from tasks.learn2learn import LearnToLearn

CLASSES = 12
SAMPLES = 9  # of each class


def import_learn2learn() -> Any:
    """The package without the warnings of its import. Tests skip if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "needs the extra metaimplicit[learn2learn]"
        return pytest.importorskip("learn2learn", reason=reason)


class Codes(Dataset[tuple[Tensor, Any]]):
    """Sample i of class c is the input [c, i], so that an episode can be read from its inputs."""

    def __init__(
        self,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
        label: Callable[[int], Any] = int,
    ) -> None:
        self.transform = transform
        self.label = label

    def __len__(self) -> int:
        return CLASSES * SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        code = torch.tensor(divmod(int(index), SAMPLES), dtype=torch.float64)
        return self.transform(code), self.label(int(index) // SAMPLES)


class TinyOmniglot(Dataset[tuple[Any, int]]):
    """In place of torchvision's Omniglot: two tiny images of each character, all different."""

    def __init__(
        self, root: str, background: bool, target_transform: Any = int, download: bool = False
    ) -> None:
        self._characters = range(964 if background else 659)
        self.target_transform = target_transform

    def __len__(self) -> int:
        return 2 * len(self._characters)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index >= len(self):
            raise IndexError(index)
        pixels = np.array([divmod(index, 251)], np.uint8).repeat(2, 0)
        return Image.fromarray(pixels), self.target_transform(index // 2)


@dataclass
class Part:
    """A sample of a task's description."""

    index: int


class FakeTaskset:
    """What is read of a learn2learn taskset. Its one transform draws from Python's generator."""

    def __init__(
        self,
        ways: int = 4,
        samples: int = 5,
        num_tasks: int = -1,
        replacement: bool = False,
    ) -> None:
        self.dataset = Codes()
        self.num_tasks = num_tasks
        self.sampled_descriptions: dict[int, list[Part]] = {}
        self.ways = ways
        self.samples = samples
        self.draw = random.choices if replacement else random.sample
        self.task_transforms = [self.transform]

    def transform(self, description: None) -> list[Part]:
        chosen = random.sample(range(CLASSES), k=self.ways)
        return [
            Part(c * SAMPLES + i) for c in chosen for i in self.draw(range(SAMPLES), k=self.samples)
        ]

    def get_task(self, description: list[Part]) -> tuple[Tensor, Tensor]:
        samples = [self.dataset[part.index] for part in description]
        inputs = torch.stack([x for x, _ in samples])
        return inputs, torch.tensor([label for _, label in samples])


@dataclass
class FakeBenchmark:
    """What `get_tasksets` returns."""

    train: FakeTaskset = field(default_factory=FakeTaskset)
    validation: FakeTaskset = field(default_factory=FakeTaskset)
    test: FakeTaskset = field(default_factory=lambda: FakeTaskset(ways=3))


def make_family(
    taskset: Any, ways: int = 4, shots: int = 2, queries: int = 3, split: str = "train"
) -> LearnToLearn:
    return LearnToLearn(taskset, ways=ways, shots=shots, queries=queries, split=split)


def draw(family: LearnToLearn, seed: int = 0, tasks: int = 6) -> Episodes:
    return family.sample(tasks, np.random.default_rng(seed))


def classes_of_ways(episodes: Episodes, shots: int = 2) -> Tensor:
    """The class of each way, `[tasks, ways]`, read from the first support sample of it."""
    return episodes.support[0][:, ::shots, 0].long()


def global_states() -> tuple[Any, ...]:
    """The states of the global generators."""
    name, keys, *others = np.random.get_state()
    return random.getstate(), name, keys.tolist(), *others, torch.get_rng_state().tolist()


def assert_codes(episodes: Episodes, ways: int, shots: int, queries: int) -> None:
    """Each way has one class, the classes of a task are distinct, and no sample is there twice."""
    assert_class_major(episodes.support[1], ways, shots)
    assert_class_major(episodes.query[1], ways, queries)
    support = episodes.support[0].unflatten(1, (ways, shots))
    query = episodes.query[0].unflatten(1, (ways, queries))
    classes = torch.cat([support, query], 2)[..., 0]
    assert (classes == classes[:, :, :1]).all()
    assert all(len(task.unique()) == ways for task in classes[:, :, 0])
    assert_no_input_twice(episodes)
