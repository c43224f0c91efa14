"""Episodes: batches of few-shot tasks, and the seeded, resumable stream of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Episodes:
    """A batch of tasks, the task axis first.

    Args:
        support: (inputs `[tasks, m, ...]`, targets `[tasks, m, ...]`) a task adapts on.
        query: (inputs `[tasks, q, ...]`, targets `[tasks, q, ...]`) it is judged on.
        labels: what names the tasks, each `[tasks, ...]`: `classes` (the family's class index behind each way),
            or the amplitude and phase of a sinusoid.
    """

    support: Pair
    query: Pair
    labels: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.support[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Episodes:
        """The same episodes on `device`; `labels` stay where they are."""
        support, query = (
            (x.to(device, non_blocking=non_blocking), y.to(device, non_blocking=non_blocking))
            for x, y in (self.support, self.query)
        )
        return Episodes(support, query, self.labels)

    def pin_memory(self) -> Episodes:
        """The same episodes in page-locked memory (`DataLoader` calls this)."""
        support, query = ((x.pin_memory(), y.pin_memory()) for x, y in (self.support, self.query))
        return Episodes(support, query, self.labels)


class TaskFamily(Protocol):
    """Where tasks come from: `sample` draws `tasks` of them using only `rng`, so equal generators give equal tasks."""

    @property
    def name(self) -> str:
        """Which family and split this is; part of every episode's seed, so no two splits share a random stream."""
        ...

    @property
    def kind(self) -> str:
        """ "classification" (int64 targets) or "regression" (float targets)."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        ...

    @property
    def outputs(self) -> int:
        """Numbers a model gives for one input: ways, or the width of a target."""
        ...

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes: ...


@dataclass(frozen=True)
class Splits:
    """The families to train on, to choose by and to report on.

    Raises:
        ValueError: two splits share a class (families without `classes`, such as the sinusoid, have none to share).
    """

    train: TaskFamily
    validation: TaskFamily
    test: TaskFamily

    def __post_init__(self) -> None:
        for one, other in combinations((self.train, self.validation, self.test), 2):
            shared = set(getattr(one, "classes", ())) & set(getattr(other, "classes", ()))
            if shared:
                raise ValueError(
                    f"splits: {one.name} and {other.name} share {len(shared)} classes, such as {min(shared)!r}; "
                    "few-shot splits hold whole classes apart, so give every class to one of them"
                )

    @property
    def digests(self) -> dict[str, str]:
        """Of each split's classes, by their names: whether a model has been trained on them, or only on others."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        found = {}
        for part, family in parts.items():
            names: Iterable[object] = getattr(family, "class_names", getattr(family, "classes", ()))
            found[part] = hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:16]
        return found


class EpisodeSampler(Dataset[Episodes]):
    """An endless, seeded stream of batches of tasks that can be resumed anywhere.

    Batch `i` depends on (family name, `seed`, `i`) alone, so workers, resumption and re-reading change nothing.

    Args:
        family: where tasks come from.
        tasks: tasks in a batch (the meta-batch), ≥ 1.
        seed: two samplers of one family with different seeds draw different episodes.
    """

    def __init__(self, family: TaskFamily, *, tasks: int, seed: int = 0) -> None:
        if tasks < 1:
            raise ValueError(f"tasks: got {tasks}, expected at least 1 task in a batch")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected an integer ≥ 0")
        self.family, self.tasks, self.seed, self.position = family, tasks, seed, 0

    def __getitem__(self, index: int) -> Episodes:
        """The batch at `index` ≥ 0 of the stream, wherever the stream stands."""
        stream = [self.seed, index, *self.family.name.encode()]
        return self.family.sample(self.tasks, np.random.default_rng(stream))

    def __iter__(self) -> Iterator[Episodes]:
        while True:
            self.position += 1
            yield self[self.position - 1]

    def batches(self, count: int, workers: int = 0, pin_memory: bool = False) -> Iterator[Episodes]:
        """The next `count` batches, drawn by a `DataLoader` with `workers` processes; the order is the stream's.

        The position advances as a batch is handed out, so a state taken between two batches resumes exactly.
        """
        ahead = Subset(self, range(self.position, self.position + count))
        own = torch.Generator().manual_seed(self.seed)  # the loader would draw from the global one
        loader = DataLoader(
            ahead, batch_size=None, num_workers=workers, pin_memory=pin_memory, generator=own
        )
        for episodes in loader:
            self.position += 1
            yield episodes

    def state_dict(self) -> dict[str, Any]:
        return {
            "family": self.family.name,
            "tasks": self.tasks,
            "seed": self.seed,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; refuses the state of another stream (ValueError)."""
        for key, mine in (("family", self.family.name), ("tasks", self.tasks), ("seed", self.seed)):
            if state.get(key) != mine:
                raise ValueError(
                    f"sampler state: got {key}={state.get(key)!r}, expected {mine!r}; "
                    "resume with the options the run was started with"
                )
        self.position = int(state["position"])
