"""Splits with a flaw or without: long-tailed, balanced, mislabelled. Each depends on its seed alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.examples import Examples, random_stream


def long_tailed_counts(largest: int, classes: int, imbalance: float) -> list[int]:
    """Class sizes of an exponential long tail (Cui et al. 2019, section 5.1):

        n_c = ⌊largest · imbalance^(−c/(classes−1))⌋,  c = 0 … classes−1

    Args:
        largest: size of class 0, ≥ 1.
        classes: ≥ 1.
        imbalance: n_0 / n_{classes−1} before rounding down, finite and ≥ 1; 1 is balanced.

    Raises:
        ValueError: a number out of range, or a class that would be left empty.
    """
    if largest < 1 or classes < 1:
        name, got = ("largest", largest) if largest < 1 else ("classes", classes)
        raise ValueError(f"{name}: got {got}, expected at least 1")
    if not 1 <= imbalance < math.inf:
        raise ValueError(
            f"imbalance: got {imbalance}, expected a finite n_0 / n_last ≥ 1; 1 is balanced"
        )
    tail = [imbalance ** (-c / max(classes - 1, 1)) for c in range(classes)]
    counts = [
        math.floor(largest * share * (1 + 1e-12)) for share in tail
    ]  # 1e-12: 49.999999999999996 is 50
    if 0 in counts:
        raise ValueError(
            f"imbalance: got {imbalance} for largest {largest}, which leaves class {counts.index(0)} empty; "
            f"expected an imbalance of at most {largest}, or a larger class 0"
        )
    return counts


def long_tailed(
    examples: Examples, imbalance: float, seed: int, largest: int | None = None
) -> Examples:
    """`long_tailed_counts` of each class, drawn at random, in the order of `examples`.

    One seed's draws are nested: a stronger imbalance, or a smaller `largest`, takes a subset.

    Args:
        largest: size of class 0; None: the size of the smallest class, so that `imbalance` alone shapes the set.

    Raises:
        ValueError: a class without examples, too few in one, or what `long_tailed_counts` refuses.
    """
    present = _present(examples)
    counts = long_tailed_counts(
        min(present) if largest is None else largest, len(present), imbalance
    )
    return examples.take(_draw(examples, counts, random_stream(seed, "long_tailed"), "largest"))


def per_class(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """Exactly `count` ≥ 1 of each class, drawn at random, and all the others; both in the order of `examples`.

    Raises:
        ValueError: a class without examples, too few in one, or none left over.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1 of each class")
    present = _present(examples)
    drawn = _draw(examples, [count] * len(present), random_stream(seed, "per_class"), "count")
    if len(drawn) == len(examples):
        raise ValueError(
            f"count: got {count} of each class, which leaves no others; expected fewer"
        )
    others = torch.ones(len(examples), dtype=torch.bool)
    others[drawn] = False
    return examples.take(drawn), examples.take(others)


def corrupt_labels(examples: Examples, share: float, seed: int) -> tuple[Examples, Tensor]:
    """Exactly round(share · n) examples, drawn at random, get another class, uniform over all the others.

    One seed's corruptions are nested: a smaller share changes a subset, to the same classes.

    Args:
        share: in [0, 1].

    Returns:
        the set, which shares its inputs with `examples`, and which targets changed: bool `[n]`, on their device.

    Raises:
        ValueError: a share out of range, a class without examples, only one class.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}, expected a number in [0, 1]")
    n, classes = len(examples), len(_present(examples))
    if classes < 2:
        raise ValueError(
            "targets: got 1 class, expected at least 2; a wrong label needs another class"
        )
    random = random_stream(seed, "corrupt_labels")
    chosen = torch.from_numpy(random.permutation(n)[: round(share * n)])
    shift = torch.from_numpy(random.integers(1, classes, n)).to(examples.targets.device)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[chosen] = True
    mask = mask.to(examples.targets.device)
    moved = ((examples.targets.long() + shift) % classes).to(examples.targets.dtype)
    return Examples(examples.inputs, torch.where(mask, moved, examples.targets)), mask


def check_disjoint(train: Examples, validation: Examples) -> None:
    """Refuse two sets that share an input, to the bit. Rows are hashed: 16 bytes of memory an example.

    Raises:
        ValueError: shared inputs; inputs of two dtypes or shapes, whose bits say nothing.
    """
    kinds = [(str(part.inputs.dtype), tuple(part.inputs.shape[1:])) for part in (train, validation)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"validation: got inputs {kinds[1]}, expected {kinds[0]} as in train; compare both before standardising"
        )
    seen: dict[bytes, int] = {}
    for row, digest in enumerate(_digests(train.inputs)):
        seen.setdefault(digest, row)
    shared = [
        (seen[digest], row)
        for row, digest in enumerate(_digests(validation.inputs))
        if digest in seen
    ]
    if shared:
        raise ValueError(
            f"validation: {len(shared)} of {len(validation)} inputs are in train too, the first being train "
            f"{shared[0][0]} = validation {shared[0][1]}; expected none, so drop them from one set, or split one set "
            "without repeated inputs by `per_class`"
        )


def _present(examples: Examples) -> list[int]:
    """Size of each class 0 … max; refuses an absent one."""
    counts = examples.counts()
    if 0 in counts:
        raise ValueError(
            f"targets: got no example of class {counts.index(0)} in 0 … {len(counts) - 1}; "
            "number the classes without gaps"
        )
    return counts


def _draw(
    examples: Examples, counts: Sequence[int], random: np.random.Generator, name: str
) -> Tensor:
    """Positions, ascending, of the first `counts[c]` of each class c in a random order."""
    order = torch.from_numpy(random.permutation(len(examples)))
    targets = examples.targets.cpu()[order]
    drawn = []
    for c, count in enumerate(counts):
        of_class = order[targets == c]
        if len(of_class) < count:
            raise ValueError(
                f"{name}: class {c} needs {count} examples and has {len(of_class)}; lower {name}, or add examples"
            )
        drawn.append(of_class[:count])
    return torch.cat(drawn).sort().values


def _digests(inputs: Tensor) -> Iterator[bytes]:
    for chunk in inputs.detach().split(1024):
        rows = chunk.cpu().reshape(len(chunk), -1).contiguous().view(torch.uint8).numpy()
        yield from (hashlib.blake2b(row, digest_size=16).digest() for row in rows)
