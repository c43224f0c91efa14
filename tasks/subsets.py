"""Seeded subsets and flaws of a labelled set: long-tailed, balanced, mislabelled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from tasks.examples import Examples, random_stream


def long_tailed_counts(largest: int, classes: int, imbalance: float) -> list[int]:
    """The class sizes of an exponential long tail (Cui et al. 2019, section 5.1).

        n_c = ⌊largest · imbalance^(−c/(classes−1))⌋,  c = 0 … classes−1

    Args:
        largest: The size n_0 of class 0, ≥ 1.
        classes: The number of classes, ≥ 1.
        imbalance: n_0 / n_{classes−1} before rounding down, finite and ≥ 1. With 1, all classes
            have the same size.

    Raises:
        ValueError: If a number is out of range, or a class would be empty.

    Example:
        >>> long_tailed_counts(largest=100, classes=3, imbalance=100)
        [100, 10, 1]
    """
    for name, number in {"largest": largest, "classes": classes}.items():
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1")
    if not 1 <= imbalance < math.inf:
        raise ValueError(
            f"imbalance: got {imbalance}, expected a finite n_0 / n_last ≥ 1; 1 is balanced"
        )
    counts = []
    for c in range(classes):
        share = imbalance ** (-c / max(classes - 1, 1))
        # Round-off must not lose an example: 49.999999999999996 means 50.
        counts.append(math.floor(largest * share * (1 + 1e-12)))
    if 0 in counts:
        raise ValueError(
            f"imbalance: got {imbalance} for largest {largest}, "
            f"which leaves class {counts.index(0)} empty; "
            f"expected an imbalance of at most {largest}, or a larger class 0"
        )
    return counts


def long_tailed(
    examples: Examples,
    imbalance: float,
    seed: int,
    largest: int | None = None,
) -> Examples:
    """Draw a long-tailed subset at random, with the class sizes of `long_tailed_counts`.

    The subset keeps the order of `examples`. The subsets of one seed are nested: a stronger
    imbalance, or a smaller `largest`, gives a subset of the same examples.

    Args:
        examples: The set, with at least one example of each class.
        imbalance: As for `long_tailed_counts`.
        seed: ≥ 0.
        largest: The size of class 0. If None, that of the smallest class of `examples`.

    Raises:
        ValueError: If a class has no or too few examples, the seed is negative, or
            `long_tailed_counts` refuses the numbers.

    Example:
        >>> examples = Examples(torch.rand(30, 2), torch.arange(30) % 3)
        >>> long_tailed(examples, imbalance=9, seed=0).counts()
        [10, 3, 1]
    """
    sizes = _class_sizes(examples)
    largest = min(sizes) if largest is None else largest
    counts = long_tailed_counts(largest, len(sizes), imbalance)
    order = random_stream(seed, "long_tailed").permutation(len(examples))
    drawn = _first_of_each_class(examples, counts, order, argument="largest")
    return examples.take(drawn)


def per_class(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """Draw `count` examples of each class at random, and separate them from the others.

    Args:
        examples: The set, with at least one example of each class.
        count: ≥ 1.
        seed: ≥ 0.

    Returns:
        The drawn examples and all others. Both keep the order of `examples`.

    Raises:
        ValueError: If `count` is below 1, a class has no or too few examples, no example would be
            left over, or the seed is negative.

    Example:
        >>> examples = Examples(torch.rand(30, 2), torch.arange(30) % 3)
        >>> validation, train = per_class(examples, count=2, seed=0)
        >>> validation.counts(), train.counts()
        ([2, 2, 2], [8, 8, 8])
    """
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"count: got {count!r}, expected at least 1 of each class")
    counts = [count] * len(_class_sizes(examples))
    order = random_stream(seed, "per_class").permutation(len(examples))
    drawn = _first_of_each_class(examples, counts, order, argument="count")
    if len(drawn) == len(examples):
        raise ValueError(
            f"count: got {count} of each class, which leaves no others; expected fewer"
        )
    others = torch.ones(len(examples), dtype=torch.bool, device="cpu")
    others[drawn] = False
    return examples.take(drawn), examples.take(others)


def corrupt_labels(examples: Examples, share: float, seed: int) -> tuple[Examples, Tensor]:
    """Give exactly round(share · n) random examples another class, uniform over all others.

    The corruptions of one seed are nested: a smaller share changes a subset of the same examples,
    to the same classes.

    Args:
        examples: The set of n examples, with at least one example of each of at least two classes.
        share: In [0, 1].
        seed: ≥ 0.

    Returns:
        The corrupted set, which shares its inputs with `examples`, and a mask of the examples whose
        target changed, bool `[n]`, on the device of the targets.

    Raises:
        ValueError: If `share` is out of range, a class has no examples, there is only one class, or
            the seed is negative.

    Example:
        >>> examples = Examples(torch.rand(10, 2), torch.arange(10) % 2)
        >>> corrupted, changed = corrupt_labels(examples, share=0.3, seed=0)
        >>> int(changed.sum()), torch.equal(corrupted.targets != examples.targets, changed)
        (3, True)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}, expected a number in [0, 1]")
    n = len(examples)
    classes = len(_class_sizes(examples))
    if classes < 2:
        raise ValueError(
            "targets: got 1 class, expected at least 2; a wrong label needs another class"
        )
    random = random_stream(seed, "corrupt_labels")
    chosen = random.permutation(n)[: round(share * n)]
    shift = torch.from_numpy(random.integers(1, classes, n))  # never 0: the class changes
    changed = torch.zeros(n, dtype=torch.bool, device="cpu")
    changed[torch.from_numpy(chosen)] = True

    targets = examples.targets
    changed = changed.to(targets.device)
    shifted = (targets.long() + shift.to(targets.device)) % classes
    corrupted = torch.where(changed, shifted.to(targets.dtype), targets)
    return Examples(examples.inputs, corrupted), changed


def check_disjoint(train: Examples, validation: Examples) -> None:
    """Raise if two sets share an input, compared bit by bit.

    Inputs are compared by 16-byte hashes, so the memory needed is 16 bytes for each example.

    Args:
        train: The first set.
        validation: The second set, with inputs of the same type and shape.

    Raises:
        ValueError: If an input is in both sets, or their inputs differ in type or shape.

    Example:
        >>> examples = Examples(torch.arange(4.0), torch.zeros(4))
        >>> check_disjoint(examples.take(torch.tensor([0, 1])), examples.take(torch.tensor([2])))
    """
    expected = (str(train.inputs.dtype), tuple(train.inputs.shape[1:]))
    got = (str(validation.inputs.dtype), tuple(validation.inputs.shape[1:]))
    if got != expected:
        raise ValueError(
            f"validation: got inputs {got}, expected {expected} as in train; "
            "compare both before standardising"
        )
    first_row: dict[bytes, int] = {}
    for row, digest in enumerate(_digests(train.inputs)):
        first_row.setdefault(digest, row)
    shared = [
        (first_row[digest], row)
        for row, digest in enumerate(_digests(validation.inputs))
        if digest in first_row
    ]
    if shared:
        train_row, validation_row = shared[0]
        raise ValueError(
            f"validation: {len(shared)} of {len(validation)} inputs are in train too, "
            f"the first being train {train_row} = validation {validation_row}; "
            "expected none, so drop them from one set, "
            "or split one set without repeated inputs by `per_class`"
        )


def _class_sizes(examples: Examples) -> list[int]:
    """The size of each class 0 … max. A ValueError names a class without examples."""
    sizes = examples.counts()
    if 0 in sizes:
        raise ValueError(
            f"targets: got no example of class {sizes.index(0)} "
            f"in 0 … {len(sizes) - 1}; number the classes without gaps"
        )
    return sizes


def _first_of_each_class(
    examples: Examples,
    counts: Sequence[int],
    order: np.ndarray,
    *,
    argument: str,
) -> Tensor:
    """The positions, ascending, of the first `counts[c]` examples of each class c in `order`."""
    positions = torch.from_numpy(order)
    targets = examples.targets.cpu()[positions]
    drawn = []
    for c, count in enumerate(counts):
        members = positions[targets == c]
        if len(members) < count:
            raise ValueError(
                f"{argument}: class {c} needs {count} examples "
                f"and has {len(members)}; lower {argument}, or add examples"
            )
        drawn.append(members[:count])
    return torch.cat(drawn).sort().values


def _digests(inputs: Tensor) -> Iterator[bytes]:
    """A hash of the bits of each row."""
    for chunk in inputs.detach().split(1024):
        rows = chunk.cpu().reshape(len(chunk), -1).contiguous()
        for row in rows.view(torch.uint8).numpy():
            yield hashlib.blake2b(row, digest_size=16).digest()
