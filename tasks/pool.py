"""Images by class, and the N-way K-shot classification tasks drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tasks.episodes import Episodes, Splits


@dataclass(frozen=True, eq=False)
class ImagePool:
    """Images sorted by class. A subset shares the pixels and keeps the class numbers of the whole.

    Args:
        images: uint8 `[N, channels, height, width]`.
        starts: row of each class's first image, `[classes]`.
        counts: images of each class, `[classes]`.
        names: what each class is called; a class belongs to one split, which is checked by name.
        ids: number of each class in the whole pool, `[classes]`.
    """

    images: Tensor
    starts: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]
    ids: np.ndarray

    @classmethod
    def from_sorted(
        cls, images: Tensor, counts: Sequence[int] | np.ndarray, names: Iterable[str]
    ) -> ImagePool:
        """A whole pool: `counts[0]` images of class 0, then `counts[1]` of class 1, and so on.

        Raises ValueError where counts, names and images do not fit together.
        """
        counts, names = np.asarray(counts, dtype=np.int64), tuple(names)
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images: got {images.dtype} of shape {tuple(images.shape)}, "
                "expected torch.uint8 [N, channels, height, width]"
            )
        if len(names) != len(counts) or counts.sum() != len(images):
            raise ValueError(
                f"counts: got {len(counts)} classes of {counts.sum()} images in all, "
                f"expected {len(names)} classes (names) of {len(images)} images (images)"
            )
        return cls(images, np.cumsum(counts) - counts, counts, names, np.arange(len(names)))

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, classes: Sequence[int] | np.ndarray) -> ImagePool:
        """The pool of these classes (positions in this pool), without copying an image."""
        names = tuple(self.names[c] for c in classes)
        return ImagePool(
            self.images, self.starts[classes], self.counts[classes], names, self.ids[classes]
        )

    def images_of(self, position: int) -> Tensor:
        """The images of one class, `[count, channels, height, width]`."""
        return self.images[self.starts[position] :][: self.counts[position]]


class FewShot:
    """N-way K-shot classification: `ways` distinct classes, of each `shots` support and `queries` other query images.

    Inputs are float32 in [0, 1], `[tasks, ways·shots, channels, height, width]` (query: `ways·queries`), class-major:
    all images of way 0, then of way 1 … Targets are int64 `[tasks, ways·shots]` in 0 … ways−1, in the order the
    classes were drawn. `labels["classes"]`, `[tasks, ways]`, holds the class number (`pool.ids`) behind each way.

    Args:
        pool: the classes of one split.
        ways, shots, queries: each ≥ 1; every class needs shots + queries images.
        name: family and split, e.g. "glyphs/train".

    Raises:
        ValueError: a number below 1, more ways than classes, or more shots + queries than images.
    """

    kind = "classification"

    def __init__(self, pool: ImagePool, *, ways: int, shots: int, queries: int, name: str) -> None:
        require_at_least_one(ways=ways, shots=shots, queries=queries)
        if ways > len(pool):
            raise ValueError(
                f"ways: got {ways}, but {name} has {len(pool)} classes; ask for fewer ways or give it more classes"
            )
        smallest = int(np.argmin(pool.counts))
        if shots + queries > pool.counts[smallest]:
            raise ValueError(
                f"shots + queries: got {shots} + {queries} = {shots + queries}, but class {pool.names[smallest]!r} of "
                f"{name} has {pool.counts[smallest]} images; ask for fewer shots or queries"
            )
        self.pool, self.name = pool, name
        self.ways, self.shots, self.queries = ways, shots, queries
        self.input_shape, self.outputs = tuple(pool.images.shape[1:]), ways

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes tasks are made of."""
        return self.pool.names

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` tasks, with `rng` alone."""
        each = self.shots + self.queries
        ways = np.stack(
            [rng.choice(len(self.pool), self.ways, replace=False) for _ in range(tasks)]
        )
        # one draw without replacement, then cut in two, so that support and query share no image
        rows = [
            self.pool.starts[c] + rng.choice(self.pool.counts[c], each, replace=False)
            for c in ways.ravel()
        ]
        images = torch.from_numpy(np.stack(rows).reshape(tasks, self.ways, each))
        support = self._pair(images[:, :, : self.shots])
        query = self._pair(images[:, :, self.shots :])
        return Episodes(support, query, {"classes": torch.from_numpy(self.pool.ids[ways])})

    def _pair(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of image rows `[tasks, ways, each]`."""
        tasks, ways, each = rows.shape
        targets = torch.arange(ways).repeat_interleave(each).repeat(tasks, 1)
        return self.pool.images[rows.flatten(1)].float().div_(255), targets


def require_at_least_one(**numbers: int) -> None:
    """Refuse a number of ways, shots or queries below 1 (ValueError)."""
    for argument, number in numbers.items():
        if number < 1:
            raise ValueError(f"{argument}: got {number}, expected at least 1")


def shuffled_split(
    classes: int, seed: int, shares: tuple[float, float] = (0.64, 0.16)
) -> list[np.ndarray]:
    """Class positions of train, validation and test (the rest), from a seeded shuffle."""
    cuts = np.round(np.cumsum(shares) * classes).astype(int)
    return np.split(np.random.default_rng(seed).permutation(classes), cuts)


def few_shot_splits(
    name: str, pool: ImagePool, split: Sequence[np.ndarray], *, ways: int, shots: int, queries: int
) -> Splits:
    """Few-shot families on the train, validation and test classes of `pool`."""
    train, validation, test = (
        FewShot(
            pool.subset(classes), ways=ways, shots=shots, queries=queries, name=f"{name}/{part}"
        )
        for part, classes in zip(("train", "validation", "test"), split, strict=True)
    )
    return Splits(train, validation, test)
