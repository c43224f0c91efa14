"""Hyperparameters of penalties on the model's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.params import Params
from metaimplicit.problem import FromMeta, Proximal
from metaimplicit.tuning.domains import Domain, Positive, Simplex
from metaimplicit.tuning.variables.base import Variable, check_choice, prototype


@dataclass(frozen=True)
class WeightDecay(Variable):
    """The penalty ½ Σⱼ λⱼ (θⱼ − cⱼ)².

    Args:
        scope: With `"scalar"`, there is one λ, `meta["weight_decay"]`. With `"tensor"` or
            `"element"`, there is one for each tensor or element of θ: `meta["weight_decay.NAME"]`
            for the parameter NAME.
        start: The value of every λ to start from.
        center: c: `"zero"`, or `"start"`, the parameters with which the model came (Li et al. 2018,
            L²-SP).
        domain: The domain of every λ.

    Raises:
        ValueError: The scope or the center is unknown.

    Example:
        >>> params = {"w": torch.tensor([2.0, 0.0])}
        >>> decay = WeightDecay(start=0.5)
        >>> decay.penalty(params, {}, decay.meta(params))
        tensor(1.)
    """

    scope: Literal["scalar", "tensor", "element"] = "scalar"
    start: float = 1e-4
    center: Literal["zero", "start"] = "zero"
    domain: Domain = Positive()

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("scalar", "tensor", "element"))
        check_choice("center", self.center, ("zero", "start"))

    def meta(self, params: Params) -> Params:
        """λ: one scalar, a scalar for each parameter, or a tensor shaped as each parameter."""
        like = prototype(params)
        if self.scope == "scalar":
            return {"weight_decay": like.new_tensor(self.start)}
        entries = {}
        for name, p in params.items():
            shape = p.shape if self.scope == "element" else ()
            entries[f"weight_decay.{name}"] = like.new_full(shape, self.start)
        return entries

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """The domain given, for every entry."""
        return dict.fromkeys(names, self.domain)

    def penalty(self, params: Params, start: Params, meta: Params) -> Tensor:
        """½ Σⱼ λⱼ (θⱼ − cⱼ)², a scalar."""
        parts = []
        for name, p in params.items():
            distance = p - start[name] if self.center == "start" else p
            # Another variable may have entries of the other scope.
            key = "weight_decay" if self.scope == "scalar" else f"weight_decay.{name}"
            parts.append((meta[key] * distance.square()).sum())
        return 0.5 * torch.stack(parts).sum()

    @property
    def proximal(self) -> Proximal | None:
        """λ/2 ‖θ‖² if there is one λ and c = 0; else None."""
        if self.scope != "scalar" or self.center != "zero":
            return None
        return Proximal(FromMeta("weight_decay"), center="zero")


@dataclass(frozen=True)
class GroupStructure(Variable):
    """A group lasso whose groups are learnt: strength · Σ_l √(‖s_l ⊙ w‖² + ε²).

    Column j of s = `meta["groups"]`, `[groups, features]`, is the membership of feature j, on the
    simplex: the relaxation of Frecon et al. (2018).

    Args:
        parameter: The name of w, `[…, features]`. The penalty is summed over its leading axes, such
            as one of several regressions that share the groups.
        groups: The number of groups, ≥ 2.
        strength: The factor of the penalty, ≥ 0.
        smoothing: ε > 0, which makes the norm differentiable at 0.
        seed: The seed of the memberships to start from. They are drawn near the uniform ones, where
            all groups would have the same gradient.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> groups = GroupStructure("w", groups=2, strength=1.0, smoothing=1e-6)
        >>> members = {"groups": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])}
        >>> groups.penalty({"w": torch.tensor([3.0, 4.0, 2.0])}, {}, members)
        tensor(7.)
    """

    parameter: str
    groups: int
    strength: float = 0.1
    smoothing: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("GroupStructure groups", self.groups, least=2)
        if not self.strength >= 0:
            raise ValueError(f"GroupStructure strength: got {self.strength}, expected a number ≥ 0")
        if not self.smoothing > 0:
            raise ValueError(
                f"GroupStructure smoothing: got {self.smoothing}, expected a number > 0"
            )

    def meta(self, params: Params) -> Params:
        """`{"groups": [groups, features]}`, whose columns sum to 1.

        Raises:
            ValueError: The model has no parameter of that name, or it has no axis.
        """
        if self.parameter not in params:
            known = sorted(params)
            raise ValueError(
                f"GroupStructure parameter: got {self.parameter!r}, expected one of {known}"
            )
        w = params[self.parameter]
        if not w.dim():
            raise ValueError(
                f"GroupStructure parameter: got {self.parameter!r}, a single number, expected one "
                "with an axis of features"
            )
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(
            self.groups,
            w.shape[-1],
            generator=generator,
            device="cpu",
        )
        return {"groups": (0.1 * draw).softmax(0).to(w)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """The simplex, for every column."""
        return {"groups": Simplex(dim=0)}

    def penalty(self, params: Params, start: Params, meta: Params) -> Tensor:
        """The penalty, summed over the leading axes of w, a scalar."""
        members = params[self.parameter].unsqueeze(-2) * meta["groups"]
        norms = (members.square().sum(-1) + self.smoothing**2).sqrt()
        return self.strength * norms.sum()
