"""The optimisers that towers are built of: a direction, and its derivative in every hyperparameter.

Each steps θ' = θ − lr ∘ u(θ, g, state; h). The gradient g, the old θ and the old state are constants of the derivative
(Chandra et al. 2022, §2.2), so ∂θ'/∂lr = −u and ∂θ'/∂h = −lr ∘ ∂u/∂h. The latter are written out: mostly inner
products with what the step has left, they take a fraction of the time of autograd through the same lines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metaimplicit.tuning.domains import Box, Domain, Interval, Positive

Granularity = Literal["scalar", "per-tensor", "per-element"]
Numbers = dict[
    str, Tensor
]  # h: 0-dim, but for lr, which may have an entry for each tensor or element of θ
Slots = dict[str, Any]  # the state, and what the last step leaves to its derivatives


@dataclass(frozen=True)
class Level(ABC):
    """One optimiser of a tower; `optimizer` moves its hyperparameters.

    Args:
        lr: the step size.
        optimizer: the level above; None, the hyperparameters stay.
        learn: the hyperparameters that `optimizer` moves; by default all but `eps` and `weight_decay` (the training
            loss would take the latter to 0) and those that are 0. A mapping says of what size, `{"lr": "per-tensor"}`
            or `"per-element"`; only lr may be other than a scalar.
        domains: where they may lie, in whose free coordinates `optimizer` moves them. By default lr itself is moved,
            as in the paper, and stopped at 0 (`Box(0)`); numbers in [0, 1) move by their logit (`Interval(0, 1)`),
            `eps` and `weight_decay` by their logarithm. `{"lr": Positive()}` moves log lr, which under Adam crosses
            orders of magnitude fast. `{"lr": Real()}` lets it turn negative, which is an error.

    Raises:
        ValueError: a number out of range; `learn` or `domains` of something else; a level that learns nothing.
    """

    lr: float = 0.01
    optimizer: Level | None = field(default=None, kw_only=True)
    learn: tuple[str, ...] | Mapping[str, Granularity] | None = field(default=None, kw_only=True)
    domains: Mapping[str, Domain] = field(default_factory=dict, kw_only=True)

    unit_interval: ClassVar[frozenset[str]] = frozenset()  # hyperparameters in [0, 1)
    optional: ClassVar[frozenset[str]] = frozenset(
        {"momentum", "weight_decay"}
    )  # no part of h as a constant 0

    def __post_init__(self) -> None:
        for name, value in self.initial_values.items():
            self.check(name, value)
        for option, given in (("learn", self.learn or ()), ("domains", self.domains)):
            if unknown := sorted(set(given) - set(self.initial_values)):
                raise ValueError(
                    f"{self.name} {option}: got {unknown}, expected some of {sorted(self.initial_values)}"
                )
        wrong = {
            k: v
            for k, v in self.granularity.items()
            if v not in _GRANULARITIES or (v != "scalar" and k != "lr")
        }
        if wrong:
            raise ValueError(
                f"{self.name} learn: got {wrong}, expected 'scalar', or for lr one of {', '.join(_GRANULARITIES)}"
            )
        if self.optimizer is None and self.learn:
            raise ValueError(
                f"{self.name} learn: got {tuple(self.learn)} and no optimizer; pass optimizer=SGD(…)"
            )
        if self.optimizer is not None and not self.granularity:
            raise ValueError(
                f"{self.name}: got an optimizer and nothing to learn, expected one or more names in learn"
            )
        for name in self.granularity:
            try:
                self.domain(name).free(torch.tensor(self.initial_values[name]))
            except ValueError as error:
                raise ValueError(f"{self.name} {name}: {error}") from error

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def initial_values(self) -> dict[str, float]:
        """Every hyperparameter's value to start from."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OWN}

    @property
    def granularity(self) -> dict[str, Granularity]:
        """What is learnt, and of what size."""
        if isinstance(self.learn, Mapping):
            return dict(self.learn)
        if self.learn is None:
            chosen = [
                n
                for n, x in self.initial_values.items()
                if x != 0 and n not in ("eps", "weight_decay")
            ]
        else:
            chosen = list(self.learn)
        return dict.fromkeys(chosen if self.optimizer is not None else [], "scalar")

    def domain(self, name: str) -> Domain:
        usual = (
            Box(0.0)
            if name == "lr"
            else Interval(0, 1)
            if name in self.unit_interval
            else Positive()
        )
        return self.domains.get(name, usual)

    def check(self, name: str, value: float) -> None:
        """Raise ValueError for a hyperparameter out of range."""
        if name in self.unit_interval and not 0 <= value < 1:
            raise ValueError(f"{self.name} {name}: got {value}, expected a number in [0, 1)")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{self.name} {name}: got {value}, expected a finite number ≥ 0")

    @abstractmethod
    def direction(self, h: Numbers, slots: Slots, g: Tensor, point: Tensor | None) -> Tensor:
        """u for a gradient, `[n]`; `slots` take the new state. `point` is θ, given if h has a weight decay."""

    @abstractmethod
    def pullback(self, names: Collection[str], h: Numbers, slots: Slots, a: Tensor) -> Numbers:
        """∂(uᵀa)/∂h at the last step for the h in `names`, lr not among them, and maybe others."""


_OWN = ("optimizer", "learn", "domains", "initial")
_GRANULARITIES = ("scalar", "per-tensor", "per-element")


@dataclass(frozen=True)
class SGD(Level):
    """u = b, b = μ b₋ + g + λθ, b₋ = 0 at first: torch's SGD with momentum μ and weight decay λ."""

    momentum: float = field(default=0.0, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)

    unit_interval = frozenset({"momentum"})

    def direction(self, h: Numbers, slots: Slots, g: Tensor, point: Tensor | None) -> Tensor:
        if point is not None:
            slots["point"], g = point, torch.addcmul(g, point, h["weight_decay"])
        if "momentum" not in h:
            return g
        last = _slot(slots, "buffer", g)
        slots["buffer"] = torch.addcmul(g, last, h["momentum"], out=_slot(slots, "last", g))
        slots["last"] = last
        buffer: Tensor = slots["buffer"]
        return buffer

    def pullback(self, names: Collection[str], h: Numbers, slots: Slots, a: Tensor) -> Numbers:
        parts = {"momentum": "last", "weight_decay": "point"}
        return {name: a.dot(slots[parts[name]]) for name in names}


@dataclass(frozen=True)
class AdaGrad(Level):
    """u = g/(√s + ε), s = s₋ + g² from `initial` ≥ 0 on, a constant (Duchi, Hazan & Singer 2011).

    From 0 the first steps are sign(g), and so long that the level above sees little else: the paper starts at 0.1.
    """

    eps: float = field(default=1e-10, kw_only=True)
    initial: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("initial", self.initial)

    def direction(self, h: Numbers, slots: Slots, g: Tensor, point: Tensor | None) -> Tensor:
        slots["sum"] = slots["sum"] if "sum" in slots else torch.full_like(g, self.initial)
        total = slots["sum"].addcmul_(g, g)
        below = torch.sqrt(total, out=_slot(slots, "below", g)).add_(h["eps"])
        return torch.div(g, below, out=_slot(slots, "ratio", g))

    def pullback(self, names: Collection[str], h: Numbers, slots: Slots, a: Tensor) -> Numbers:
        return {"eps": -(a / slots["below"]).dot(slots["ratio"])} if "eps" in names else {}


@dataclass(frozen=True)
class RMSProp(Level):
    """u = g/(√v + ε), v = α v₋ + (1 − α) g² (Hinton 2012, lecture 6e)."""

    alpha: float = field(default=0.99, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    unit_interval = frozenset({"alpha"})

    def direction(self, h: Numbers, slots: Slots, g: Tensor, point: Tensor | None) -> Tensor:
        root = torch.sqrt(
            _average(slots, "square", _square(g), h["alpha"]), out=_slot(slots, "root", g)
        )
        below = torch.add(root, h["eps"], out=_slot(slots, "below", g))
        return torch.div(g, below, out=_slot(slots, "ratio", g))

    def pullback(self, names: Collection[str], h: Numbers, slots: Slots, a: Tensor) -> Numbers:
        if not names:
            return {}
        y = (a / slots["below"]).mul_(slots["ratio"])  # −∂(uᵀa)/∂√v
        found = {"eps": -y.sum()} if "eps" in names else {}
        return found | {"alpha": -0.5 * y.div_(slots["root"]).dot(slots["square change"])}


@dataclass(frozen=True)
class Adam(Level):
    """u = m̂/(√v̂ + ε), m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ), of the averages m of g and v of g² (Kingma & Ba 2015)."""

    lr: float = 1e-3
    beta1: float = field(default=0.9, kw_only=True)
    beta2: float = field(default=0.999, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    unit_interval = frozenset({"beta1", "beta2"})

    def direction(self, h: Numbers, slots: Slots, g: Tensor, point: Tensor | None) -> Tensor:
        slots["step"] = step = slots.get("step", 0) + 1
        rest1, rest2 = slots["rest1"], slots["rest2"] = (
            1 - h["beta1"] ** step,
            1 - h["beta2"] ** step,
        )
        mean = _average(slots, "mean", g, h["beta1"])
        root = torch.sqrt(
            _average(slots, "square", _square(g), h["beta2"]), out=_slot(slots, "root", g)
        )
        below = torch.mul(root, rest1 / rest2.sqrt(), out=_slot(slots, "below", g))
        below.add_(h["eps"] * rest1)  # (1 − β₁ᵗ)(√v̂ + ε)
        return torch.div(mean, below, out=_slot(slots, "ratio", g))

    def pullback(self, names: Collection[str], h: Numbers, slots: Slots, a: Tensor) -> Numbers:
        if not names:
            return {}
        step, rest1, rest2 = slots["step"], slots["rest1"], slots["rest2"]
        x, found = a / slots["below"], {}
        if "beta1" in names:  # ∂m̂/∂β₁ = (m₋ − g + m tβ₁ᵗ⁻¹/(1 − β₁ᵗ))/(1 − β₁ᵗ)
            found["beta1"] = x.dot(slots["mean change"]) + step * h["beta1"] ** (
                step - 1
            ) / rest1 * x.dot(slots["mean"])
        x.mul_(slots["ratio"])
        if "eps" in names:
            found["eps"] = -rest1 * x.sum()
        if "beta2" in names:  # ∂√v̂/∂β₂ = ((v₋ − g²)/√v + √v tβ₂ᵗ⁻¹/(1 − β₂ᵗ))/2√(1 − β₂ᵗ)
            bias = step * h["beta2"] ** (step - 1) / rest2 * x.dot(slots["root"])
            found["beta2"] = (
                -rest1
                / (2 * rest2.sqrt())
                * (x.div_(slots["root"]).dot(slots["square change"]) + bias)
            )
        return found


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam's u + λθ: decoupled weight decay (Loshchilov & Hutter 2019)."""

    weight_decay: float = field(default=0.01, kw_only=True)

    def direction(self, h: Numbers, slots: Slots, g: Tensor, point: Tensor | None) -> Tensor:
        u = super().direction(h, slots, g, None)
        if point is None:
            return u
        slots["point"] = point
        return torch.addcmul(u, point, h["weight_decay"])

    def pullback(self, names: Collection[str], h: Numbers, slots: Slots, a: Tensor) -> Numbers:
        found = super().pullback([name for name in names if name != "weight_decay"], h, slots, a)
        return found | ({"weight_decay": a.dot(slots["point"])} if "weight_decay" in names else {})


def _slot(slots: Slots, name: str, like: Tensor) -> Tensor:
    """The buffer of that name, zero when new."""
    if name not in slots:
        slots[name] = torch.zeros_like(like)
    found: Tensor = slots[name]
    return found


def _average(slots: Slots, name: str, new: Tensor, decay: Tensor) -> Tensor:
    """a = β a₋ + (1 − β) new, and beside it "… change" = ∂a/∂β = a₋ − new."""
    average = _slot(slots, name, new)
    change = torch.sub(average, new, out=_slot(slots, f"{name} change", new))
    return average.addcmul_(change, decay - 1)  # new + β change would lose the digits of 1 − β


def _square(g: Tensor) -> Tensor:
    """g² + 1e-32, so that an average of it has a root with a derivative; the root, 1e-16 at most, is lost beside ε."""
    return torch.addcmul(g.new_full((), 1e-32), g, g)
