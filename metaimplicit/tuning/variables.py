"""Ready-made hyperparameters of a model's training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from metaimplicit.params import Params
from metaimplicit.problem import FromMeta, Proximal
from metaimplicit.tuning.domains import Box, Domain, Positive, Simplex

Batch = dict[str, Tensor]


class Variable(ABC):
    """A hyperparameter: where it starts, where it may lie, and what it does to the training loss

    f = (1/m) Σᵢ wᵢ ℓ(model(xᵢ), yᵢ) + penalty.
    """

    @abstractmethod
    def meta(self, params: Params) -> Params:
        """Its entries of φ to start from, given the model's parameters."""

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """Where its entries, of these names, lie, if not anywhere."""
        return {}

    def inputs(self, meta: Params, batch: Batch) -> Tensor:
        """xᵢ, what the model is trained on, `[m, *shape]`."""
        return batch["inputs"]

    def targets(self, batch: Batch) -> Tensor:
        """yᵢ, `[m]`, which only one that makes the inputs may change."""
        return batch["targets"]

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor | None:
        """wᵢ, `[m]`, given detached ℓᵢ; None, it has no say."""
        return None

    def penalty(self, params: Params, start: Params, meta: Params) -> Tensor | None:
        """What it adds, a scalar, where the model's parameters were `start`; None, nothing."""
        return None

    @property
    def proximal(self) -> Proximal | None:
        """The same penalty as a multiple of the identity that solvers know, where it is one."""
        return None


@dataclass(frozen=True)
class Scalar(Variable):
    """A number that the inner loop reads by `FromMeta(name)`: a step size, a momentum.

    Args:
        name: of its entry.
        start: its value.
        domain: `Positive()` for a step size, `Interval(0, 1)` for a momentum.
    """

    name: str
    start: float
    domain: Domain = Positive()

    def meta(self, params: Params) -> Params:
        return {self.name: _like(params).new_tensor(self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        return {self.name: self.domain}


@dataclass(frozen=True)
class ExampleWeights(Variable):
    """wᵢ = `meta["example_weights"][index of i]`, one for each training example (Franceschi et al. 2017, §5.1).

    Args:
        count: of training examples; batches say which they hold by `index`.
        start: of all of them.
        domain: `Box(0.0)`, or `Interval(0, 1)`, in which a weight never quite vanishes.
    """

    count: int
    start: float = 1.0
    domain: Domain = Box(0.0)

    def meta(self, params: Params) -> Params:
        return {"example_weights": _like(params).new_full((self.count,), self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        return {"example_weights": self.domain}

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        index = _index(self, batch)
        return meta["example_weights"][
            torch.where(index < 0, self.count, index)
        ]  # −1 is no last one, but an error


@dataclass(frozen=True)
class ClassWeights(Variable):
    """wᵢ = `meta["class_weights"][yᵢ]` > 0.

    Args:
        classes: how many.
        start: of all of them.
    """

    classes: int
    start: float = 1.0

    def meta(self, params: Params) -> Params:
        return {"class_weights": _like(params).new_full((self.classes,), self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        return {"class_weights": Positive()}

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        return meta["class_weights"][batch["targets"]]


@dataclass(frozen=True)
class WeightNetwork(Variable):
    """wᵢ = 2 sigmoid(V(ℓᵢ)), V a network of one hidden layer: Meta-Weight-Net (Shu et al. 2019), here from wᵢ = 1.

    Args:
        hidden: its width.
        classes: V sees the example's class, too, one-hot; None, its loss alone.
        seed: of V's hidden layer; its last starts at zero.
    """

    hidden: int = 100
    classes: int | None = None
    seed: int = 0

    def meta(self, params: Params) -> Params:
        like, width = _like(params), 1 + (self.classes or 0)
        draw = torch.randn(self.hidden, width, generator=torch.Generator().manual_seed(self.seed))
        return {
            "weight_network.in": draw.to(like) / math.sqrt(width),
            "weight_network.bias": like.new_zeros(self.hidden),
            "weight_network.out": like.new_zeros(self.hidden),
            "weight_network.shift": like.new_zeros(()),
        }

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        seen = losses[:, None]
        if self.classes is not None:
            seen = torch.cat(
                [seen, nn.functional.one_hot(batch["targets"].long(), self.classes).to(seen)], 1
            )
        hidden = torch.relu(seen @ meta["weight_network.in"].T + meta["weight_network.bias"])
        return 2 * torch.sigmoid(hidden @ meta["weight_network.out"] + meta["weight_network.shift"])


@dataclass(frozen=True)
class WeightDecay(Variable):
    """½ Σⱼ λⱼ (θⱼ − cⱼ)².

    Args:
        scope: one λ > 0 in all, `meta["weight_decay"]`; one for each "tensor"; or for each "element", entries
            `meta["weight_decay.NAME"]`.
        start: of all of them.
        center: c: "zero", or "start", the model's parameters as they were given (Li et al. 2018, L²-SP).
        domain: of λ.
    """

    scope: Literal["scalar", "tensor", "element"] = "scalar"
    start: float = 1e-4
    center: Literal["zero", "start"] = "zero"
    domain: Domain = Positive()

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, ("scalar", "tensor", "element"))
        _check_choice("center", self.center, ("zero", "start"))

    def meta(self, params: Params) -> Params:
        like = _like(params)
        if self.scope == "scalar":
            return {"weight_decay": like.new_tensor(self.start)}
        shapes = {name: p.shape if self.scope == "element" else () for name, p in params.items()}
        return {
            f"weight_decay.{name}": like.new_full(shape, self.start)
            for name, shape in shapes.items()
        }

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        return dict.fromkeys(names, self.domain)

    @property
    def proximal(self) -> Proximal | None:
        return (
            Proximal(FromMeta("weight_decay"), "zero")
            if (self.scope, self.center) == ("scalar", "zero")
            else None
        )

    def penalty(self, params: Params, start: Params, meta: Params) -> Tensor:
        strength, parts = FromMeta("weight_decay"), []
        for name, p in params.items():
            moved = p - start[name] if self.center == "start" else p
            parts.append((strength(meta, name) * moved.square()).sum())
        return 0.5 * torch.stack(parts).sum()


@dataclass(frozen=True)
class GroupStructure(Variable):
    """Which features belong together: strength · Σ_l √(‖s_l ⊙ w‖² + ε²), s = `meta["groups"]`, `[groups, features]`.

    Column j of s is feature j's membership, on the simplex: the relaxation of a group lasso whose groups are not known
    (Frecon et al. 2018). Leading axes of w, such as one of regressions that share the groups, are summed over.

    Args:
        parameter: the name of w, `[…, features]`.
        groups: how many, ≥ 2.
        strength: of the penalty, ≥ 0.
        smoothing: ε > 0, which makes the norm differentiable at 0.
        seed: of the start, near the uniform memberships, which alone could not be told apart.

    Raises:
        ValueError: a number out of range.
    """

    parameter: str
    groups: int
    strength: float = 0.1
    smoothing: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("groups", self.groups >= 2, "at least 2"),
            ("strength", self.strength >= 0, "a number ≥ 0"),
            ("smoothing", self.smoothing > 0, "a number > 0"),
        ):
            if not fine:
                raise ValueError(
                    f"GroupStructure {name}: got {getattr(self, name)}, expected {expected}"
                )

    def meta(self, params: Params) -> Params:
        if self.parameter not in params:
            raise ValueError(
                f"GroupStructure parameter: got {self.parameter!r}, expected one of {sorted(params)}"
            )
        w = params[self.parameter]
        draw = torch.randn(
            self.groups, w.shape[-1], generator=torch.Generator().manual_seed(self.seed)
        )
        return {"groups": (0.1 * draw).softmax(0).to(w)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        return {"groups": Simplex(dim=0)}

    def penalty(self, params: Params, start: Params, meta: Params) -> Tensor:
        members = params[self.parameter].unsqueeze(-2) * meta["groups"]
        return self.strength * (members.square().sum(-1) + self.smoothing**2).sqrt().sum()


@dataclass(frozen=True)
class Augmentation(Variable):
    """xᵢ ↦ (1 + c u₂ᵢ)(xᵢ − x̄ᵢ) + x̄ᵢ + b u₁ᵢ + n εᵢ: brightness, contrast and noise, u and ε standard normal.

    The draws are a function of the batch's `index`, so that an inner loop can be replayed.

    Args:
        start: of the strengths, entries `meta["augmentation.KIND"]` > 0.
        kinds: of "noise", "brightness", "contrast".
    """

    start: float = 0.1
    kinds: tuple[str, ...] = ("noise", "brightness", "contrast")

    def __post_init__(self) -> None:
        for kind in self.kinds:
            _check_choice("kinds", kind, ("noise", "brightness", "contrast"))

    def meta(self, params: Params) -> Params:
        return {f"augmentation.{kind}": _like(params).new_tensor(self.start) for kind in self.kinds}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        return dict.fromkeys(names, Positive())

    def inputs(self, meta: Params, batch: Batch) -> Tensor:
        x, random = batch["inputs"], np.random.default_rng(_index(self, batch).tolist())
        each = (len(x), *[1] * (x.dim() - 1))
        shapes = {"brightness": each, "contrast": each, "noise": x.shape}
        draws = {
            kind: torch.from_numpy(random.standard_normal(shape)).to(x)
            for kind, shape in shapes.items()
        }
        moved = {kind: meta[f"augmentation.{kind}"] * draws[kind] for kind in self.kinds}
        if "contrast" in moved:
            mean = x.flatten(1).mean(1).reshape(each)
            x = x + moved["contrast"] * (x - mean)
        for kind in ("brightness", "noise"):
            if kind in moved:
                x = x + moved[kind]
        return x


@dataclass(frozen=True, eq=False)
class SyntheticData(Variable):
    """The training set itself, `meta["synthetic"]`: dataset distillation (Wang et al. 2018).

    Args:
        data: inputs to start from, `[n, *shape]`; whatever the training batch holds is not looked at.
        labels: theirs, `[n]`, on the model's device, which stay.
    """

    data: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.data) != len(self.labels):
            raise ValueError(
                f"SyntheticData labels: got {len(self.labels)}, expected {len(self.data)}, one an input"
            )

    def meta(self, params: Params) -> Params:
        like = _like(params)
        if self.labels.device != like.device:
            raise ValueError(
                f"SyntheticData labels: got them on {self.labels.device}, expected on {like.device}"
            )
        return {"synthetic": self.data.to(like)}

    def inputs(self, meta: Params, batch: Batch) -> Tensor:
        return meta["synthetic"]

    def targets(self, batch: Batch) -> Tensor:
        return self.labels


def _index(variable: Variable, batch: Batch) -> Tensor:
    if "index" not in batch:
        name = type(variable).__name__
        raise ValueError(
            f"{name}: got a batch without 'index', expected which examples it holds, int64 [m]"
        )
    return batch["index"]


def _like(params: Params) -> Tensor:
    return next(iter(params.values()))


def _check_choice(name: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(known)}")
