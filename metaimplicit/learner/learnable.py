"""Numbers of the inner problem that are learnt with the initialisation, by their logarithms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from metaimplicit.inner import InnerLoop
from metaimplicit.inner.settings import Setting, key_of
from metaimplicit.learner.heads import BIAS, WEIGHT, Head
from metaimplicit.methods import Method
from metaimplicit.params import Params
from metaimplicit.problem import FromMeta, Proximal

Granularity = Literal["scalar", "per-tensor", "per-element"]
Learn = Iterable[str] | Mapping[str, Granularity]

DEFAULT_PROXIMAL = 2.0  # λ of Rajeswaran et al. (2019) for Omniglot

REACH = {"lr": "loop", "proximal": "loss"}
"""The numbers that can be learnt, and the part of the inner problem that a method must reach."""


class Learnable(NamedTuple):
    """The numbers of the inner problem, of which some are read from φ.

    Attributes:
        inner: The inner loop. If its step size is learnt, it reads it from φ.
        penalty: The proximal term, likewise. None if λ = 0.
        logs: The entries of φ that they read, at their initial values.
    """

    inner: InnerLoop
    penalty: Proximal | None
    logs: Params


class LearntNumbers(nn.ParameterDict):
    """Parameters whose names may hold dots, which the names of torch's parameters may not.

    Args:
        values: The initial value of each number, by name.
        taken: Names that are not free.

    Raises:
        ValueError: A name is taken.

    Example:
        >>> numbers = LearntNumbers({"log_lr.0.weight": torch.tensor(0.0)}, taken=[])
        >>> list(numbers), list(numbers.by_name())
        (['log_lr/0/weight'], ['log_lr.0.weight'])
    """

    def __init__(self, values: Params, *, taken: Iterable[str]) -> None:
        conflicts = sorted(set(values) & set(taken))
        if conflicts:
            raise ValueError(
                f"learn: the model has a parameter {conflicts[0]!r} already, "
                "expected that name to be free; rename the parameter"
            )
        self.names = list(values)
        super().__init__({_key(name): nn.Parameter(x) for name, x in values.items()})

    def by_name(self) -> Params:
        """The parameters under their own names."""
        return {name: self[_key(name)] for name in self.names}


def make_learnable(
    learn: Learn,
    inner: InnerLoop,
    strength: float,
    *,
    method: Method,
    params: Params,
) -> Learnable:
    """Let the inner loop and the proximal term read the numbers to learn from φ.

    Args:
        learn: The numbers to learn, of `"lr"` and `"proximal"`. A mapping gives their granularity,
            which is `"scalar"` otherwise. If the loop has a step size for each step or each layer,
            each of them is learnt, at this granularity.
        inner: The inner loop.
        strength: λ ≥ 0 of the proximal term.
        method: The method, which must be able to give their gradients.
        params: The parameters that adapt. The entries of φ take the first one's type and device.

    Raises:
        ValueError: A number cannot be learnt, or not at this granularity, or its initial value is
            not positive. The method cannot give its gradient.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> from metaimplicit.methods import Unrolled
        >>> params = {"weight": torch.zeros(2)}
        >>> learnable = make_learnable(
        ...     {"lr": "per-tensor"}, GradientDescent(lr=1.0), 0.0, method=Unrolled(), params=params
        ... )
        >>> learnable.logs, learnable.penalty
        ({'log_lr.weight': tensor(0.)}, None)
    """
    if "lr" in _by_name(learn) and getattr(inner, "lr", None) is None:
        raise ValueError(
            f"learn 'lr': got it with {type(inner).__name__}, which has no step size, expected "
            "another inner loop, such as gradient descent; leave 'lr' out"
        )
    granularities = _granularities(learn, method)
    penalty = Proximal(strength) if strength > 0 else None
    logs: Params = {}

    if "lr" in granularities:
        lr, logs = _learn_step_sizes(
            getattr(inner, "lr", None),
            "log_lr",
            params,
            granularity=granularities["lr"],
        )
        inner = inner.updated(lr=lr)
    if "proximal" in granularities:
        if strength == 0:
            raise ValueError(
                "learn 'proximal': got proximal=0, expected a strength > 0 to start from"
            )
        like = next(iter(params.values()))
        logs["log_proximal"] = _log(strength, (), like)
        penalty = Proximal(FromMeta("log_proximal", torch.exp))
    return Learnable(inner, penalty, logs)


def make_head_learnable(
    learn: Learn,
    inner: InnerLoop,
    head: Head,
    *,
    method: Method,
    params: Params,
    like: Tensor,
) -> tuple[Head, Learnable]:
    """Let a head and its inner loop read the numbers to learn from φ.

    Args:
        learn: Names of the head's `numbers`, and `"lr"` if the loop has step sizes.
        inner: The inner loop.
        head: The head.
        method: The method.
        params: The parameters of the model that adapt, for the granularity of `"lr"`.
        like: A tensor whose type and device the logarithms take.

    Raises:
        ValueError: A number cannot be learnt.

    Example:
        >>> from metaimplicit.learner.heads import HEADS
        >>> from metaimplicit.methods import METHODS
        >>> head, learnable = make_head_learnable(
        ...     ["scale"],
        ...     HEADS["ridge"].inner,
        ...     HEADS["ridge"],
        ...     method=METHODS["auto"],
        ...     params={},
        ...     like=torch.zeros(()),
        ... )
        >>> learnable.logs
        {'log_scale': tensor(2.7081)}
    """
    by_name = _by_name(learn)
    of_loop = {name: by_name[name] for name in by_name if name == "lr"}
    of_head = [name for name in by_name if name in head.numbers]
    unknown = sorted(set(by_name) - {*of_loop, *of_head})
    if unknown:
        known = [*head.numbers, "lr"]
        raise ValueError(f"learn: got {unknown} with a head, expected some of {known}")
    for name, granularity in by_name.items():
        if granularity == "per-element" or (name in of_head and granularity != "scalar"):
            raise ValueError(
                f"learn {name!r}: got {granularity!r} with a head, whose size depends on the task, "
                "expected 'scalar'"
            )
    sizes = params | {name: like.new_zeros(()) for name in (WEIGHT, BIAS)}
    learnable = make_learnable(of_loop, inner, 0.0, method=method, params=sizes)
    head, logs = head.learning(of_head, like)
    return head, learnable._replace(logs=learnable.logs | logs)


def proximal_strength(proximal: float | None, method: Method) -> float:
    """λ as given, or the default for a method.

    Args:
        proximal: λ ≥ 0. If None, the default: 2 for a method that does not reach the start of the
            inner loop, 0 for all others.
        method: The method.

    Raises:
        ValueError: λ is negative, or 0 for a method that sees the initialisation only through the
            proximal term.

    Example:
        >>> from metaimplicit.methods import METHODS
        >>> proximal_strength(None, METHODS["cg"]), proximal_strength(None, METHODS["unrolled"])
        (2.0, 0.0)
    """
    sees_start = "start" in method.reach
    if proximal is None:
        return 0.0 if sees_start else DEFAULT_PROXIMAL
    if not isinstance(proximal, (Real, Tensor)) or not proximal >= 0:
        raise ValueError(
            f"proximal: got {proximal!r}, expected a strength ≥ 0; learn='proximal' learns it"
        )
    if proximal == 0 and not sees_start:
        raise ValueError(
            "proximal: got 0 with an implicit method, expected a strength > 0: without it "
            "θ* does not depend on the initialisation, and its gradient is zero"
        )
    return proximal


def _key(name: str) -> str:
    return name.replace(".", "/")


def _by_name(learn: Learn) -> dict[str, Granularity]:
    if isinstance(learn, str):
        return {learn: "scalar"}
    if not isinstance(learn, Iterable):
        raise ValueError(
            f"learn: got {learn!r}, expected the names of inner numbers, such as 'lr' or "
            "['lr', 'proximal']; leave it out to learn none"
        )
    return {name: learn[name] if isinstance(learn, Mapping) else "scalar" for name in learn}


def _granularities(learn: Learn, method: Method) -> dict[str, Granularity]:
    granularities = _by_name(learn)
    unknown = sorted(set(granularities) - set(REACH))
    if unknown:
        raise ValueError(f"learn: got {unknown}, expected some of {list(REACH)}")
    for name, granularity in granularities.items():
        if REACH[name] not in method.reach:
            raise ValueError(
                f"learn {name!r}: {method.flag} cannot give its gradient: {method.remedy}"
            )
        known = list(get_args(Granularity)) if name == "lr" else ["scalar"]
        if granularity not in known:
            raise ValueError(f"learn {name!r}: got {granularity!r}, expected one of {known}")
    return granularities


def _learn_step_sizes(
    lr: Any, name: str, params: Params, *, granularity: Granularity
) -> tuple[Setting, Params]:
    """A setting like `lr` whose numbers are read from φ, and their logarithms by name.

    Args:
        lr: A number, or a dict of settings by parameter, or a list of settings by step.
        name: The name of the logarithm, or what the names of several begin with.
        params: The parameters that the setting is for.
        granularity: How many logarithms there are for each number.
    """
    logs: Params = {}
    if isinstance(lr, Mapping):
        by_parameter = {}
        for key, entry in lr.items():
            own = {n: p for n, p in params.items() if key_of(lr, n, "lr") == key}
            if own:
                setting, entry_logs = _learn_step_sizes(
                    entry, f"{name}.{key}", own, granularity=granularity
                )
                by_parameter[key] = setting
                logs |= entry_logs
        return by_parameter, logs
    if isinstance(lr, list):
        by_step = []
        for t, entry in enumerate(lr):
            setting, entry_logs = _learn_step_sizes(
                entry, f"{name}[{t}]", params, granularity=granularity
            )
            by_step.append(setting)
            logs |= entry_logs
        return by_step, logs

    if not isinstance(lr, (int, float)) or not lr > 0:
        raise ValueError(
            f"learn 'lr': got an inner loop with lr={lr!r}, expected a number > 0 to start from"
        )
    like = next(iter(params.values()))
    if granularity == "scalar":
        logs[name] = _log(lr, (), like)
    else:
        for parameter, p in params.items():
            shape = () if granularity == "per-tensor" else tuple(p.shape)
            logs[f"{name}.{parameter}"] = _log(lr, shape, like)
    return FromMeta(name, torch.exp), logs


def _log(value: float, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, float(value), dtype=like.dtype, device=like.device).log()
