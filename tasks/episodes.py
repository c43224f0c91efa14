"""Episodes: batches of few-shot tasks, and the seeded, resumable stream of them."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from tasks.pool import ImagePool

Pair = tuple[Tensor, Tensor]
SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Episodes:
    """A batch of tasks. The task axis comes first, and `len` is the number of tasks.

    Args:
        support: The inputs `[tasks, m, ...]` and targets `[tasks, m, ...]` that a task adapts on.
        query: The inputs `[tasks, q, ...]` and targets `[tasks, q, ...]` that it is judged on.
        labels: What identifies the tasks, each `[tasks, ...]`: `classes` (the number of the class
            behind each way), or the `amplitude` and `phase` of a sinusoid. Empty by default.

    Example:
        >>> pair = (torch.zeros(3, 5, 2), torch.zeros(3, 5))
        >>> len(Episodes(support=pair, query=pair))
        3
    """

    support: Pair
    query: Pair
    labels: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.support[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Episodes:
        """The same episodes with support and query on `device`. `labels` stay where they are."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Episodes:
        """The same episodes in page-locked memory. A `DataLoader` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Episodes:
        inputs, targets = self.support
        query_inputs, query_targets = self.query
        return Episodes(
            support=(function(inputs), function(targets)),
            query=(function(query_inputs), function(query_targets)),
            labels=self.labels,
        )


class TaskFamily(Protocol):
    """A distribution of tasks: one split of one source.

    A family of classification tasks may also have `classes`, a tuple of the names of its classes.
    `Splits` compares these. Where the names differ between processes, `class_names` holds names
    that do not, and `Splits.digests` uses those. `Splits.content_digests` reads the images of
    its `pool`. A family that changes the episodes of another one has the same three attributes.

    Example:
        >>> class Lines:
        ...     name = "lines/train"
        ...     kind = "regression"
        ...     input_shape = (1,)
        ...     outputs = 1
        ...
        ...     def sample(self, tasks, rng):
        ...         slope = torch.from_numpy(rng.standard_normal((tasks, 1, 1)))
        ...         x = torch.from_numpy(rng.standard_normal((tasks, 10, 1)))
        ...         y = slope * x
        ...         return Episodes(support=(x[:, :5], y[:, :5]), query=(x[:, 5:], y[:, 5:]))
        >>> EpisodeSampler(Lines(), tasks=4)[0].support[0].shape
        torch.Size([4, 5, 1])
    """

    @property
    def name(self) -> str:
        """The source and the split, such as "glyphs/train".

        The seed of every episode contains it, so that no two splits share a random stream.
        """
        ...

    @property
    def kind(self) -> str:
        """`"classification"` (int64 targets) or `"regression"` (float targets)."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        ...

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for one input: the ways, or the width of a target."""
        ...

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` tasks. Equal states of `rng` give equal tasks."""
        ...


@dataclass(frozen=True)
class Splits:
    """Three families: to train on, to choose by, and to report on.

    Args:
        train: The family of the training classes.
        validation: The family of the validation classes.
        test: The family of the test classes.
        source: Where the data comes from and what divides its classes, for people to read.

    Raises:
        ValueError: If two of them share a class. Families without `classes`, such as the sinusoid,
            share none.

    Example:
        >>> import tasks
        >>> tasks.load("sinusoid", shots=5).validation.name
        'sinusoid/validation'
    """

    train: TaskFamily
    validation: TaskFamily
    test: TaskFamily
    source: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        families = (self.train, self.validation, self.test)
        for first, second in combinations(families, 2):
            classes = set(getattr(first, "classes", ()))
            shared = classes.intersection(getattr(second, "classes", ()))
            if shared:
                raise ValueError(
                    f"splits: {first.name} and {second.name} share "
                    f"{len(shared)} classes, such as {min(shared)!r}; "
                    "few-shot splits hold whole classes apart, "
                    "so give every class to one of them"
                )

    @property
    def digests(self) -> dict[str, str]:
        """For each split, 16 hexadecimal digits that identify its classes.

        A run that stores them can tell later whether its model was trained on other classes.
        """
        return {
            "train": _class_digest(self.train),
            "validation": _class_digest(self.validation),
            "test": _class_digest(self.test),
        }

    @property
    def content_digests(self) -> dict[str, str]:
        """For each split, 16 hexadecimal digits that identify its classes and their images.

        For a family that does not draw from an `ImagePool`, they identify the classes alone.
        """
        digests = self.digests
        for split in SPLIT_NAMES:
            pool = getattr(getattr(self, split), "pool", None)
            if isinstance(pool, ImagePool):
                digests[split] = pool.digest
        return digests


def _class_digest(family: TaskFamily) -> str:
    classes = getattr(family, "classes", ())
    names = getattr(family, "class_names", classes)
    text = "\n".join(map(str, names))
    # A file's name may hold bytes that are not UTF-8, which Python writes as surrogates.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


class EpisodeSampler(Dataset[Episodes]):
    """An endless, seeded stream of batches of tasks, which can be resumed anywhere.

    Batch i depends on the family's name, `tasks`, `seed` and i alone. So neither the number of
    workers, nor a resumed run, nor reading a batch twice changes a batch.

    Args:
        family: Where the tasks come from.
        tasks: The number of tasks in a batch (the meta-batch), ≥ 1.
        seed: ≥ 0. Different seeds give different episodes of the same family.

    Attributes:
        position: The number of the batch that iteration gives next.

    Raises:
        ValueError: If `family` is none, or `tasks` or `seed` is out of range.

    Example:
        >>> import tasks
        >>> sampler = EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=4)
        >>> inputs, targets = sampler[0].support
        >>> inputs.shape
        torch.Size([4, 5, 1])
        >>> torch.equal(inputs, next(iter(sampler)).support[0])
        True
    """

    def __init__(self, family: TaskFamily, *, tasks: int, seed: int = 0) -> None:
        if not hasattr(family, "sample"):
            raise ValueError(
                f"family: got {type(family).__name__}, expected a family of tasks, such as the "
                "train, validation or test of tasks.load(…)"
            )
        number: Any = tasks
        if not isinstance(number, Integral) or number < 1:
            raise ValueError(f"tasks: got {tasks}, expected at least 1 task in a batch")
        number = seed
        if not isinstance(number, Integral) or number < 0:
            raise ValueError(f"seed: got {seed}, expected an integer ≥ 0")
        self.family = family
        self.tasks = int(tasks)  # NumPy has integers, too
        self.seed = int(seed)
        self.position = 0

    def __getitem__(self, index: int) -> Episodes:
        """Batch `index` ≥ 0 of the stream. The position stays where it is.

        Raises:
            ValueError: If the index is negative, since the stream has no end to count from, or no
                integer.
        """
        number: Any = index
        if not isinstance(number, Integral) or number < 0:
            raise ValueError(f"index: got {index!r}, expected a batch number ≥ 0")
        entropy = [self.seed, int(number), *self.family.name.encode()]
        return self.family.sample(self.tasks, np.random.default_rng(entropy))

    def __iter__(self) -> Iterator[Episodes]:
        """The batches from the position on, without end."""
        while True:
            self.position += 1
            yield self[self.position - 1]

    def batches(
        self,
        count: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[Episodes]:
        """The next `count` batches of the stream, in its order, drawn by a `DataLoader`.

        The position advances when a batch is yielded, not when a worker draws it, so a state that
        is taken between two batches resumes exactly.

        Args:
            count: How many batches.
            workers: The number of processes that draw them. If 0, this process draws them.
            pin_memory: Whether they come in page-locked memory.

        Raises:
            ValueError: If a number is not whole, or negative.
        """
        for name, number in (("count", count), ("workers", workers)):
            if not isinstance(number, Integral) or number < 0:
                raise ValueError(f"{name}: got {number!r}, expected a whole number ≥ 0")
        indices = range(self.position, self.position + count)
        # Without a generator, the loader would draw a seed from the global one.
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        loader = DataLoader(
            Subset(self, indices),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=generator,
            worker_init_fn=_ignore_signals,
        )
        with torch.device("cpu"):  # where its generator draws, whatever the default device is
            batches = iter(loader)
        for index, episodes in zip(indices, batches, strict=True):
            self.position = index + 1
            yield episodes

    def state_dict(self) -> dict[str, Any]:
        """The position and what identifies the stream, as plain numbers and strings."""
        return {
            "family": self.family.name,
            "tasks": self.tasks,
            "seed": self.seed,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a saved state.

        Raises:
            ValueError: If the state is that of another family, number of tasks or seed, or has no
                position.
        """
        for key, expected in self.state_dict().items():
            if key != "position" and state.get(key) != expected:
                raise ValueError(
                    f"sampler state: got {key}={state.get(key)!r}, "
                    f"expected {expected!r}; "
                    "resume with the options the run was started with"
                )
        if "position" not in state:
            raise ValueError(
                f"sampler state: got {', '.join(state)}, expected a position as well; give what "
                "state_dict returned"
            )
        self.position = int(state["position"])


def _ignore_signals(worker: int) -> None:
    """Leave signals to the main process, which may want batches until it ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
