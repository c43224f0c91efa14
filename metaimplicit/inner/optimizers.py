"""The optimisers that an inner loop can take steps of, and what is known of their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import metaimplicit.inner.rules as rules
from metaimplicit.inner.rules import Group, Rule, Slots, Value


class SGDW(torch.optim.SGD):
    """SGD with decoupled weight decay (Loshchilov & Hutter 2019, alg. 1): θ ← (1 − ηδ)θ − ηm.

    Args:
        params: The parameters, or groups of them.
        decoupled_weight_decay: δ ≥ 0.
        options: The options of `torch.optim.SGD`.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> w.grad = torch.tensor([2.0])
        >>> optimizer = SGDW([w], lr=0.1, decoupled_weight_decay=0.5)
        >>> optimizer.step()
        >>> w.data  # 0.95 · 1 − 0.1 · 2
        tensor([0.7500])
    """

    def __init__(self, params: Any, *, decoupled_weight_decay: float = 0.0, **options: Any) -> None:
        if not decoupled_weight_decay >= 0:
            raise ValueError(
                f"decoupled_weight_decay: got {decoupled_weight_decay}, expected a number ≥ 0"
            )
        super().__init__(params, **options)
        self.defaults["decoupled_weight_decay"] = decoupled_weight_decay
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", decoupled_weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Shrink the parameters, then take the step of SGD."""
        for group in self.param_groups:
            shrinkage = 1 - group["lr"] * group["decoupled_weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(shrinkage)
        return super().step(closure)


def _coupled_decay(group: Group) -> Value:
    """The decay that is added to the gradient. A decoupled one is no penalty; see `_no_decay`."""
    return 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]


def _no_decay(_: Group) -> float:
    """AdamW's decay is no penalty: where the loop ends, ∂f/∂θ = 0 all the same."""
    return 0.0


def _decay_of_sgdw(group: Group) -> Value:
    """At rest m = (1 − dampening) g/(1 − μ) and δθ + m = 0, so g + λθ = 0 with this λ."""
    momentum = group["momentum"]
    if not isinstance(momentum, Tensor) and momentum == 0:
        return group["decoupled_weight_decay"]
    return group["decoupled_weight_decay"] * (1 - momentum) / (1 - group["dampening"])


def _zeros(group: Group) -> Slots:
    """All slots start at 0."""
    return {}


class UpdateRule(NamedTuple):
    """A rule, and what is known of its options.

    Attributes:
        step: The rule.
        options: The options for which tests compare it with `torch.optim`.
        decay: λ of the penalty λ/2 ‖p‖² that the rule minimises beside the loss, from the options.
        initial: The slots before the first step that are not 0, from the options.
    """

    step: Rule
    options: set[str]
    decay: Callable[[Group], Value] = _coupled_decay
    initial: Callable[[Group], Slots] = _zeros


RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: UpdateRule(
        rules.sgd, options={"lr", "momentum", "dampening", "weight_decay", "nesterov"}
    ),
    SGDW: UpdateRule(
        rules.sgdw,
        options={"lr", "momentum", "dampening", "nesterov", "decoupled_weight_decay"},
        decay=_decay_of_sgdw,
    ),
    torch.optim.Adam: UpdateRule(
        rules.adam, options={"lr", "betas", "eps", "weight_decay", "amsgrad"}
    ),
    torch.optim.AdamW: UpdateRule(
        rules.adamw, options={"lr", "betas", "eps", "weight_decay", "amsgrad"}, decay=_no_decay
    ),
    torch.optim.Adadelta: UpdateRule(rules.adadelta, options={"lr", "rho", "eps", "weight_decay"}),
    torch.optim.Adagrad: UpdateRule(
        rules.adagrad,
        options={"lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value"},
        initial=lambda group: {"sum": group["initial_accumulator_value"]},
    ),
    torch.optim.Adamax: UpdateRule(rules.adamax, options={"lr", "betas", "eps", "weight_decay"}),
    torch.optim.ASGD: UpdateRule(
        rules.asgd,
        options={"lr", "lambd", "alpha", "t0", "weight_decay"},
        decay=lambda group: group["weight_decay"] + group["lambd"],
        initial=lambda group: {"eta": group["lr"]},
    ),
    torch.optim.NAdam: UpdateRule(
        rules.nadam,
        options={
            "lr",
            "betas",
            "eps",
            "weight_decay",
            "momentum_decay",
            "decoupled_weight_decay",
        },
        initial=lambda group: {"momentum_product": 1.0},
    ),
    torch.optim.RAdam: UpdateRule(
        rules.radam, options={"lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"}
    ),
    torch.optim.RMSprop: UpdateRule(
        rules.rmsprop, options={"lr", "alpha", "eps", "weight_decay", "momentum", "centered"}
    ),
    torch.optim.Rprop: UpdateRule(
        rules.rprop,
        options={"lr", "etas", "step_sizes"},
        decay=_no_decay,
        initial=lambda group: {"size": group["lr"]},
    ),
}
