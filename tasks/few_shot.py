"""N-way K-shot classification tasks, drawn from the classes of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from tasks.episodes import SPLIT_NAMES, Episodes, Pair, Splits
from tasks.pool import ImagePool


class FewShot:
    """N-way K-shot classification tasks.

    A task has `ways` distinct classes, drawn uniformly. Of each class it has `shots` support
    images and `queries` other query images.

    Inputs are float32 in [0, 1], `[tasks, ways·shots, channels, height, width]` (query:
    `ways·queries`): first all images of way 0, then those of way 1, and so on. Features of a float
    type are inputs as they are, `[tasks, ways·shots, ...]`. Targets are int64
    `[tasks, ways·shots]` in 0 … ways−1. `labels["classes"]`, int64 `[tasks, ways]`, holds the
    number in the whole pool (`pool.ids`) of the class behind each way.

    Args:
        pool: The classes of one split.
        ways: The number of classes in a task, 1 … len(pool).
        shots: The number of support images of each class, ≥ 1.
        queries: The number of query images of each class, ≥ 1.
        name: The source and the split, such as "glyphs/train". It seeds the episodes.

    Raises:
        ValueError: If a number is below 1, there are fewer classes than ways, or a class has fewer
            than shots + queries images.

    Example:
        >>> images = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
        >>> pool = ImagePool.from_sorted(images, counts=[4, 4, 4], names=["a", "b", "c"])
        >>> family = FewShot(pool, ways=2, shots=1, queries=3, name="letters/train")
        >>> family.sample(5, np.random.default_rng(0)).query[0].shape
        torch.Size([5, 6, 1, 8, 8])
    """

    kind = "classification"

    def __init__(
        self,
        pool: ImagePool,
        *,
        ways: int,
        shots: int,
        queries: int,
        name: str,
    ) -> None:
        require_at_least_one(ways=ways, shots=shots, queries=queries)
        if ways > len(pool):
            advice = "ask for fewer ways or give it more classes"
            if len(pool) == 0:
                advice = "give it more classes"
            raise ValueError(f"ways: got {ways}, but {name} has {len(pool)} classes; {advice}")
        smallest = int(np.argmin(pool.counts))
        available = pool.counts[smallest]
        if shots + queries > available:
            raise ValueError(
                f"shots + queries: got {shots} + {queries} = {shots + queries}, "
                f"but class {pool.names[smallest]!r} of {name} has {available} images; "
                "ask for fewer shots or queries"
            )
        self.pool = pool
        self.name = name
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.input_shape = tuple(pool.images.shape[1:])
        self.outputs = ways

    def with_sizes(self, *, ways: int, shots: int, queries: int | None = None) -> FewShot:
        """Tasks of the same classes with other numbers of ways, shots and, if given, queries.

        Raises:
            ValueError: If the classes cannot give such tasks.
        """
        return FewShot(
            self.pool,
            ways=ways,
            shots=shots,
            queries=self.queries if queries is None else queries,
            name=self.name,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that tasks are drawn from."""
        return self.pool.names

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` tasks. Equal states of `rng` give equal tasks."""
        pool = self.pool
        classes = [rng.choice(len(pool), self.ways, replace=False) for _ in range(tasks)]
        ways = np.stack(classes)  # [tasks, ways]

        # Support and query share no image, because they are cut from one draw without replacement.
        count = self.shots + self.queries
        drawn = [
            pool.starts[c] + rng.choice(pool.counts[c], count, replace=False) for c in ways.ravel()
        ]
        rows = np.stack(drawn).reshape(tasks, self.ways, count)
        images = torch.from_numpy(rows)
        return Episodes(
            support=self._inputs_and_targets(images[:, :, : self.shots]),
            query=self._inputs_and_targets(images[:, :, self.shots :]),
            labels={"classes": torch.from_numpy(pool.ids[ways])},
        )

    def _inputs_and_targets(self, rows: Tensor) -> Pair:
        """The images at `rows`, `[tasks, ways, count]`, and the ways that they belong to."""
        inputs = self.pool.images[rows.flatten(1)]
        if not inputs.is_floating_point():
            inputs = inputs.float().div_(255)
        return inputs, way_targets(*rows.shape)


def way_targets(tasks: int, ways: int, count: int) -> Tensor:
    """Targets 0 … ways−1, each `count` times in turn: int64 `[tasks, ways·count]`.

    Example:
        >>> way_targets(tasks=1, ways=3, count=2)
        tensor([[0, 0, 1, 1, 2, 2]])
    """
    return torch.arange(ways, device="cpu").repeat_interleave(count).repeat(tasks, 1)


def require_at_least_one(**numbers: int) -> None:
    """Raise a ValueError that names the first of these arguments that is no whole number ≥ 1.

    Example:
        >>> require_at_least_one(ways=5, shots=0)
        Traceback (most recent call last):
            ...
        ValueError: shots: got 0, expected at least 1
    """
    for argument, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{argument}: got {number!r}, expected a whole number")
        if number < 1:
            raise ValueError(f"{argument}: got {number}, expected at least 1")


def shuffled_split(
    classes: int, seed: int, shares: tuple[float, float] = (0.64, 0.16)
) -> list[np.ndarray]:
    """Split class positions 0 … classes−1 at random into train, validation and test.

    Args:
        classes: The number of classes.
        seed: The shuffle depends on this seed alone.
        shares: The shares of train and validation. Test has the remaining classes.

    Returns:
        Three arrays of positions, int64, in shuffled order. Any of them may be empty.

    Raises:
        ValueError: If the seed is no integer, or negative.

    Example:
        >>> [len(part) for part in shuffled_split(25, seed=0)]
        [16, 4, 5]
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed: got {seed}, expected an integer ≥ 0")
    boundaries = np.round(np.cumsum(shares) * classes).astype(int)
    order = np.random.default_rng(seed).permutation(classes)
    return np.split(order, boundaries)


def few_shot_splits(
    name: str,
    pool: ImagePool,
    split: Sequence[np.ndarray],
    *,
    ways: int,
    shots: int,
    queries: int,
    source: str = "",
) -> Splits:
    """Few-shot families on the train, validation and test classes of a pool.

    Args:
        name: The source. The families are called name/train, name/validation and name/test.
        pool: All classes.
        split: The positions in `pool` of the train, validation and test classes.
        ways: As for `FewShot`, as are `shots` and `queries`.
        shots: See `ways`.
        queries: See `ways`.
        source: As for `Splits`.

    Raises:
        ValueError: If a family cannot give such tasks, or two of them share a class.
    """
    families = [
        FewShot(
            pool.subset(classes),
            ways=ways,
            shots=shots,
            queries=queries,
            name=f"{name}/{part}",
        )
        for part, classes in zip(SPLIT_NAMES, split, strict=True)
    ]
    return Splits(*families, source=source)
