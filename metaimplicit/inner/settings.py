"""The numbers of an optimiser: one for all, one for each parameter, or one for each inner step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from metaimplicit.params import Params
from metaimplicit.problem import FromMeta, Number, resolve

# A number, a dict of settings by parameter, or a list of settings by step. They may be nested.
Setting = Number | Mapping[str, Any] | list[Any]

VARYING_NUMBERS = "whose numbers differ from step to step"


def resolve_setting(value: Any, meta: Params, parameter: str, *, option: str) -> Any:
    """The value of a setting for one parameter. A list stays a list, with one value for each step.

    Args:
        value: The setting. A key of a dict is the name of a parameter, the name of a module, which
            stands for all parameters in it, or a glob pattern. The first key that fits counts.
        meta: Where `FromMeta` numbers are read.
        parameter: The name of the parameter.
        option: What the error calls the setting.

    Raises:
        ValueError: A dict has no key for this parameter.

    Example:
        >>> sizes = {"head": [0.1, 0.01], "*": 0.5}
        >>> [resolve_setting(sizes, {}, name, option="lr") for name in ("head.bias", "body.bias")]
        [[0.1, 0.01], 0.5]
    """
    if isinstance(value, Mapping):
        entry = value[key_of(value, parameter, option)]
        return resolve_setting(entry, meta, parameter, option=option)
    if isinstance(value, list):
        return [
            resolve_setting(
                entry,
                meta,
                parameter,
                option=option,
            )
            for entry in value
        ]
    return resolve(value, meta, parameter)


def key_of(entries: Mapping[str, Any], parameter: str, option: str) -> str:
    """The first key of a dict of settings that fits a parameter.

    Raises:
        ValueError: No key fits.

    Example:
        >>> key_of({"head.*": 0.1, "body": 0.2, "*": 0.3}, "body.0.weight", "lr")
        'body'
    """
    for key in entries:
        if fits(key, parameter):
            return key
    raise ValueError(
        f"{option}: got a dict with the keys {list(entries)}, expected one that fits the "
        f"parameter {parameter!r}; add its name, or '*' for all others"
    )


def fits(key: str, parameter: str) -> bool:
    """Whether a key is the name of a parameter or of a module that it is in, or a pattern of both.

    Example:
        >>> fits("head", "head.bias"), fits("*.bias", "head.bias"), fits("he", "head.bias")
        (True, True, False)
    """
    return fnmatchcase(parameter, key) or parameter.startswith(f"{key}.") or parameter == key


def check_lengths(lists: Iterable[list[Any]], steps: int) -> None:
    """Raise ValueError if a list has fewer numbers than the loop has steps."""
    for numbers in lists:
        if len(numbers) < steps:
            raise ValueError(
                f"inner: got the numbers {numbers} for {steps} steps, expected one for each step"
            )


def at_step(options: dict[str, Any], step: int | None) -> dict[str, Any]:
    """The resolved options at one inner step.

    Args:
        options: By name. A list holds one value for each step.
        step: The number of the step, from 0. None stands for a step that belongs to no loop.

    Raises:
        ValueError: A list has no value for this step.

    Example:
        >>> at_step({"lr": [0.1, 0.01], "momentum": 0.9}, 1)
        {'lr': 0.01, 'momentum': 0.9}
    """
    scheduled = {name: value for name, value in options.items() if isinstance(value, list)}
    if not scheduled:
        return options
    chosen = dict(options)
    for name, value in scheduled.items():
        if step is None or step >= len(value):
            which = "a step outside of the inner loop" if step is None else f"step {step}"
            raise ValueError(
                f"{name}: got numbers for steps 0 to {len(value) - 1}, but the method needs one "
                f"for {which}; use the same number at every step, or another method"
            )
        chosen[name] = value[step]
    return chosen


def numbers_in(setting: Any) -> Iterator[Any]:
    """All numbers of a setting: floats, tensors and `FromMeta`.

    Example:
        >>> list(numbers_in({"weight": [0.1, 0.2], "*": (0.3, 0.4)}))
        [0.1, 0.2, 0.3, 0.4]
    """
    if isinstance(setting, Mapping):
        setting = list(setting.values())
    if not isinstance(setting, (list, tuple)):
        yield setting
        return
    for entry in setting:
        yield from numbers_in(entry)


def check_shapes(setting: Any, params: Params, meta: Params, *, option: str) -> None:
    """Raise ValueError if a tensor of a setting does not broadcast against its parameter.

    One with more axes would meet the task axis.

    Args:
        setting: The setting of an option.
        params: θ, `{name: [tasks, *shape]}`.
        meta: Where `FromMeta` numbers are read.
        option: The option's name, for the error.

    Example:
        >>> import torch
        >>> check_shapes(torch.ones(3), {"w": torch.zeros(2, 3)}, {}, option="lr")
    """
    if not any(isinstance(number, (Tensor, FromMeta)) for number in numbers_in(setting)):
        return
    for name, p in params.items():
        for number in numbers_in(resolve_setting(setting, meta, name, option=option)):
            shape = tuple(p.shape[1:])
            if isinstance(number, Tensor) and not _broadcasts(tuple(number.shape), shape):
                raise ValueError(
                    f"{option}: got shape {tuple(number.shape)} for the parameter {name!r} of "
                    f"shape {shape}, expected one number, or a shape that broadcasts against it; a "
                    "dict gives each parameter its own"
                )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is one of the target shape when it is expanded.

    A single number with an axis is one for a parameter without axes, beside the axis of tasks.
    """
    if math.prod(shape) == 1:
        return len(shape) <= len(target) + 1
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)


def lists_in(setting: Any) -> Iterator[list[Any]]:
    """The lists of a setting, each with one entry for each step.

    Example:
        >>> list(lists_in({"weight": [0.1, 0.2], "bias": 0.3}))
        [[0.1, 0.2]]
    """
    if isinstance(setting, list):
        yield setting
    elif isinstance(setting, Mapping):
        for entry in setting.values():
            yield from lists_in(entry)


def constant_choices(setting: Any) -> list[Any]:
    """The constants among the values that a parameter may get at some step.

    Values that depend on tensors are left out, because only their graph knows them.

    Example:
        >>> constant_choices({"weight": [0.1, FromMeta("lr")], "*": 0.3})
        [0.1, 0.3]
    """
    return [
        value
        for value in values_in(setting)
        if not any(isinstance(number, (Tensor, FromMeta)) for number in numbers_in(value))
    ]


def values_in(setting: Any) -> Iterator[Any]:
    """The values that a parameter may get at some step: numbers, or tuples of them.

    Example:
        >>> list(values_in({"weight": [(0.9, 0.99), (0.8, 0.99)], "*": (0.5, 0.9)}))
        [(0.9, 0.99), (0.8, 0.99), (0.5, 0.9)]
    """
    if isinstance(setting, Mapping):
        setting = list(setting.values())
    if not isinstance(setting, list):
        yield setting
        return
    for entry in setting:
        yield from values_in(entry)
