"""Few-shot tasks: `load` a family by name, then draw seeded, resumable batches of it with `EpisodeSampler`.

splits = tasks.load("glyphs", ways=5, shots=1)
sampler = tasks.EpisodeSampler(splits.train, tasks=8, seed=0)

Whole labelled sets, for bilevel problems over one of them: `cifar10` and `mnist`, cut and flawed by `per_class`,
`long_tailed` and `corrupt_labels`, drawn in `Batches`.

validation, rest = tasks.per_class(tasks.mnist()[0], 100, seed=0)
train, wrong = tasks.corrupt_labels(rest, 0.4, seed=0)
batches = tasks.Batches(train, 128, seed=0)
"""

from __future__ import annotations

import importlib
import inspect
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tasks.episodes import Episodes, EpisodeSampler, Splits, TaskFamily
from tasks.examples import Batches, Examples
from tasks.pool import FewShot, ImagePool
from tasks.subsets import check_disjoint, corrupt_labels, long_tailed, long_tailed_counts, per_class
from tasks.vision import cifar10, mnist, standardise

FAMILIES = {  # name: module with `load(*, ways, shots, queries, **options) -> Splits`, imported when it is asked for
    "glyphs": "tasks.glyphs",
    "sinusoid": "tasks.sinusoid",
    "omniglot": "tasks.omniglot",
    "folder": "tasks.folder",
    "learn2learn": "tasks.learn2learn",
}

__all__ = [
    "FAMILIES",
    "Batches",
    "EpisodeSampler",
    "Episodes",
    "Examples",
    "FewShot",
    "ImagePool",
    "Splits",
    "TaskFamily",
    "check_disjoint",
    "cifar10",
    "corrupt_labels",
    "load",
    "long_tailed",
    "long_tailed_counts",
    "mnist",
    "per_class",
    "standardise",
]


def load(
    name: str,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    data_root: str | Path | None = None,
    **options: Any,
) -> Splits:
    """The train, validation and test families of `name`.

    Args:
        name: one of `FAMILIES`.
        ways: classes in a task (no meaning in regression).
        shots: support examples a class.
        queries: query examples a class.
        data_root: where the data is, for the families that read any.
        options: further ones of the family; its module's `load` explains them.

    Raises:
        ValueError: an unknown family or option, numbers the data cannot serve, damaged data.
        FileNotFoundError: no data.
    """
    if name not in FAMILIES:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(FAMILIES)}")
    family_load = importlib.import_module(FAMILIES[name]).load
    if data_root is not None:
        options["data_root"] = data_root
    known = set(inspect.signature(family_load).parameters) - {"ways", "shots", "queries"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"{name}: got option {', '.join(unknown)}, expected {', '.join(sorted(known)) or 'none'}"
        )
    for option, value in options.items():
        usual = inspect.signature(family_load).parameters[option].default
        kinds = {bool: bool, int: Integral, float: Real}.get(type(usual))
        if kinds is not None and (
            not isinstance(value, kinds) or isinstance(value, bool) != isinstance(usual, bool)
        ):
            raise ValueError(
                f"{name} {option}: got {value!r}, expected {type(usual).__name__}, such as {usual}"
            )
    splits: Splits = family_load(ways=ways, shots=shots, queries=queries, **options)
    return splits
