"""What a level of a tower is: an optimiser whose step can be differentiated in its numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from metaimplicit.tuning.domains import Box, Domain, Interval, Positive

Granularity = Literal["scalar", "per-tensor", "per-element"]
Hyperparameters = dict[str, Tensor]  # scalars; lr may be [tensors] or [n]
Slots = dict[str, Any]  # the state, and what the last step leaves to its derivatives


@dataclass(frozen=True)
class Level(ABC):
    """An optimiser θ' = θ − lr ∘ u(θ, g, state; h) whose hyperparameters can be learnt.

    The gradient g, the old θ and the old state are constants of the derivative in the
    hyperparameters (Chandra et al. 2022, section 2.2), so

        ∂θ'/∂lr = −u,    ∂θ'/∂h = −lr ∘ ∂u/∂h.

    A subclass is a frozen dataclass whose fields are its hyperparameters h. It implements
    `direction`, which is u, and `pull_back`, which multiplies with (∂u/∂h)ᵀ. The latter is written
    out by hand: most entries are inner products of what the step has left, which take a fraction of
    the time of autograd.

    Args:
        lr: The step size.
        optimizer: The level above, which moves the hyperparameters. If None, they are constant.
        learn: The names of the hyperparameters that `optimizer` moves. If None, all but those that
            are 0, `eps`, and `weight_decay` (which the training loss would take to 0). A mapping
            gives their granularity, too: `{"lr": "per-tensor"}` or `{"lr": "per-element"}`; all
            others can only be `"scalar"`.
        domains: The domain of each hyperparameter, in whose free coordinates `optimizer` moves it.
            The defaults are `Box(0.0)` for lr, which moves as it is and stops at 0, as in the
            paper; `Interval(0, 1)` for those in [0, 1); and `Positive()` for `eps` and
            `weight_decay`. `{"lr": Positive()}` moves log lr, which under Adam crosses orders of
            magnitude fast. `{"lr": Real()}` lets lr turn negative, which is an error.

    Attributes:
        unit_interval: The hyperparameters that lie in [0, 1); all others are ≥ 0.
        omitted_at_zero: Hyperparameters that are left out of h where they are a constant 0.
        settings: The fields, beside the arguments above, that are not hyperparameters.

    Raises:
        ValueError: A value is out of range or outside its domain, `learn` or `domains` names
            something that is not a hyperparameter, or `optimizer` comes without anything to learn
            or the reverse.

    Example:
        >>> class SignSGD(Level):
        ...     def direction(self, h, slots, gradient, *, params):
        ...         return gradient.sign()
        ...
        ...     def pull_back(self, names, h, slots, *, vector):
        ...         return {}  # there is nothing to learn but lr
        >>> SignSGD(0.1).direction({}, {}, torch.tensor([3.0, -0.5]), params=None)
        tensor([ 1., -1.])
    """

    lr: float = 0.01
    optimizer: Level | None = field(default=None, kw_only=True)
    learn: tuple[str, ...] | Mapping[str, Granularity] | None = field(default=None, kw_only=True)
    domains: Mapping[str, Domain] = field(default_factory=dict, kw_only=True)

    unit_interval: ClassVar[frozenset[str]] = frozenset()
    omitted_at_zero: ClassVar[frozenset[str]] = frozenset({"momentum", "weight_decay"})
    settings: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, value in self.initial_values.items():
            self.check_value(name, value)
        self._check_names("learn", self.learn or ())
        self._check_names("domains", self.domains)
        self._check_granularity()
        for name in self.granularity:
            start = torch.tensor(self.initial_values[name], device="cpu")
            try:
                self.domain(name).free(start)
            except ValueError as error:
                raise ValueError(f"{self.name} {name}: {error}") from error

    @property
    def name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    def initial_values(self) -> dict[str, float]:
        """The value of every hyperparameter to start from, by name."""
        others = {"optimizer", "learn", "domains"} | self.settings
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}

    @property
    def granularity(self) -> dict[str, Granularity]:
        """The hyperparameters that are learnt, and whether each is one number or many."""
        if isinstance(self.learn, Mapping):
            return dict(self.learn)
        if self.optimizer is None:
            return {}
        if self.learn is not None:
            return dict.fromkeys(self.learn, "scalar")
        return {
            name: "scalar"
            for name, value in self.initial_values.items()
            if value != 0 and name not in ("eps", "weight_decay")
        }

    def domain(self, name: str) -> Domain:
        """The domain of a hyperparameter: the one given, or its default."""
        if name in self.domains:
            return self.domains[name]
        if name == "lr":
            return Box(0.0)
        return Interval(0, 1) if name in self.unit_interval else Positive()

    def check_value(self, name: str, value: float) -> None:
        """Raise ValueError for a value of a hyperparameter that is out of range."""
        if name in self.unit_interval and not 0 <= value < 1:
            raise ValueError(f"{self.name} {name}: got {value}, expected a number in [0, 1)")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{self.name} {name}: got {value}, expected a finite number ≥ 0")

    @abstractmethod
    def direction(
        self,
        h: Hyperparameters,
        slots: Slots,
        gradient: Tensor,
        *,
        params: Tensor | None,
    ) -> Tensor:
        """The direction u, `[n]`. It may be `gradient` itself or a tensor of `slots`.

        Args:
            h: The hyperparameters, without those that are omitted at zero.
            slots: The state, changed in place. It starts empty.
            gradient: g, `[n]`.
            params: θ, `[n]`, if h has a weight decay; else None.
        """

    @abstractmethod
    def pull_back(
        self,
        names: Collection[str],
        h: Hyperparameters,
        slots: Slots,
        *,
        vector: Tensor,
    ) -> Hyperparameters:
        """(∂u/∂h)ᵀ vector at the last step, a scalar for each name.

        Args:
            names: Hyperparameters to differentiate with respect to; lr is never among them.
            h: The hyperparameters of the last step.
            slots: The state as the last step left it.
            vector: `[n]`.
        """

    def _check_names(self, option: str, names: Iterable[str]) -> None:
        known = sorted(self.initial_values)
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"{self.name} {option}: got {unknown}, expected some of {known}")

    def _check_granularity(self) -> None:
        known = get_args(Granularity)
        wrong = {
            name: kind
            for name, kind in self.granularity.items()
            if kind not in known or (kind != "scalar" and name != "lr")
        }
        if wrong:
            raise ValueError(
                f"{self.name} learn: got {wrong}, expected 'scalar', or for lr one of "
                f"{', '.join(known)}"
            )
        if self.optimizer is None and self.learn:
            raise ValueError(
                f"{self.name} learn: got {tuple(self.learn)} and no optimizer; "
                "pass optimizer=SGD(…)"
            )
        if self.optimizer is not None and not self.granularity:
            raise ValueError(
                f"{self.name}: got an optimizer and nothing to learn, "
                "expected one or more names in learn"
            )


def slot(slots: Slots, name: str, like: Tensor) -> Tensor:
    """The buffer of that name, which is created as zeros shaped as `like`."""
    if name not in slots:
        slots[name] = torch.zeros_like(like)
    buffer: Tensor = slots[name]
    return buffer
