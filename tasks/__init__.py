"""Few-shot tasks, and labelled sets for bilevel problems.

`load` a family of few-shot tasks by name, and draw seeded, resumable batches of it:

    splits = tasks.load("glyphs", ways=5, shots=1)
    sampler = tasks.EpisodeSampler(splits.train, tasks=8, seed=0)

Whole labelled sets are `cifar10` and `mnist`. Cut or flaw them with `per_class`, `long_tailed` and
`corrupt_labels`, and draw `Batches`:

    validation, others = tasks.per_class(tasks.mnist()[0], 100, seed=0)
    train, wrong = tasks.corrupt_labels(others, 0.4, seed=0)
    batches = tasks.Batches(train, 128, seed=0)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.augmentation import Augmented
from tasks.cifar import cifar10
from tasks.distortion import Distorted
from tasks.episodes import Episodes, EpisodeSampler, Splits, TaskFamily
from tasks.examples import Batches, Examples
from tasks.few_shot import FewShot
from tasks.pool import ImagePool
from tasks.subsets import (
    check_disjoint,
    corrupt_labels,
    long_tailed,
    long_tailed_counts,
    per_class,
)
from tasks.vision import mnist, standardise

# A family is a module with a function `load(*, ways, shots, queries, **options) -> Splits`. Further
# options have defaults. A family of regression tasks also sets `KIND = "regression"`. The module is
# imported when the family is asked for.
FAMILIES = {
    "glyphs": "tasks.glyphs",
    "sinusoid": "tasks.sinusoid",
    "omniglot": "tasks.omniglot",
    "cifar-fs": "tasks.cifar_fs",
    "fc100": "tasks.fc100",
    "mini-imagenet": "tasks.mini_imagenet",
    "folder": "tasks.folder",
    "dataset": "tasks.dataset",
    "learn2learn": "tasks.learn2learn",
}

__all__ = [
    "FAMILIES",
    "Augmented",
    "Batches",
    "Distorted",
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
    "family_kind",
    "family_summaries",
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
    """The train, validation and test families of few-shot tasks called `name`.

    Args:
        name: One of `FAMILIES`.
        ways: The number of classes in a task. It has no meaning in regression.
        shots: The number of support examples of each class.
        queries: The number of query examples of each class.
        data_root: Where the data is, for a family that reads any. If None, the family's default.
        options: Further options of the family, which the `load` of its module documents.

    Raises:
        ValueError: If the family or an option is unknown, an option has another type than its
            default, the data cannot give such tasks, or the data is damaged.
        FileNotFoundError: If there is no data.
        ImportError: If the family needs a package that is not installed.

    Example:
        >>> splits = load("sinusoid", shots=10, queries=10)
        >>> splits.test.name, splits.test.kind
        ('sinusoid/test', 'regression')
    """
    load_family = _module(name).load
    if data_root is not None:
        options["data_root"] = data_root
    parameters = inspect.signature(load_family).parameters
    family_options = parameters.keys() - {"ways", "shots", "queries"}
    defaults = {option: parameters[option].default for option in family_options}
    _check_options(name, options, defaults)
    splits: Splits = load_family(
        ways=ways,
        shots=shots,
        queries=queries,
        **options,
    )
    return splits


def family_kind(name: str) -> str:
    """What the tasks of a family are: "classification" or "regression". No data is read.

    Raises:
        ValueError: If the family is unknown.

    Example:
        >>> family_kind("sinusoid")
        'regression'
    """
    kind: str = getattr(_module(name), "KIND", "classification")
    return kind


def family_summaries() -> dict[str, str]:
    """What each of `FAMILIES` is: the first line of its module's docstring.

    Example:
        >>> family_summaries()["sinusoid"]
        "Few-shot regression of sine waves, MAML's toy problem (Finn et al. 2017, section 5.1)."
    """
    summaries = {}
    for name in FAMILIES:
        docstring = _module(name).__doc__ or ""
        summaries[name] = docstring.partition("\n")[0]
    return summaries


def _module(name: str) -> ModuleType:
    if name not in FAMILIES:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(FAMILIES)}")
    return importlib.import_module(FAMILIES[name])


def _check_options(
    name: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> None:
    """Raise if an option has no default, or another type than its default."""
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        known = ", ".join(sorted(defaults)) or "none"
        raise ValueError(f"{name}: got option {', '.join(unknown)}, expected {known}")
    for option, value in options.items():
        default = defaults[option]
        kind = {bool: bool, int: Integral, float: Real}.get(type(default))
        if kind is None:
            continue
        # In Python True is an int, but no option takes it for one.
        is_bool = isinstance(value, bool)
        if not isinstance(value, kind) or is_bool != (kind is bool):
            raise ValueError(
                f"{name} {option}: got {value!r}, expected {type(default).__name__}, "
                f"such as {default}"
            )
