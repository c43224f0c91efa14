"""One step of each optimiser as a pure function of tensors, `rule(group, state, p, g) -> p`, a line of algebra a line.

`group` holds the options, numbers or tensors; `state` this parameter's own slots, empty before the first step, and is
filled in place. Every derivative in an option exists where the formula has one, at zero gradients as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
Slots = dict[str, Any]
Value = Any  # a tensor: its algebra with slots and options, numbers or tensors, is beyond a type checker
Rule = Callable[[Group, Slots, Value, Value], Value]


def sgd(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """SGD with momentum; a constant 0 costs nothing."""
    lr, momentum = group["lr"], group["momentum"]
    g = _decayed(group, p, g)
    if isinstance(momentum, Tensor) or momentum != 0:
        dampening = group["dampening"] if "buffer" in state else 0.0
        state["buffer"] = buffer = momentum * state.get("buffer", 0.0) + (1 - dampening) * g
        g = g + momentum * buffer if group["nesterov"] else buffer
    return p - lr * g if isinstance(lr, Tensor) else p.add(g, alpha=-lr)


def adam(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adam (Kingma & Ba 2015), bias corrections in tensor operations so that β₁ and β₂ have their derivatives."""
    return _adam(group, state, p, _decayed(group, p, g))


def adamw(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return _adam(group, state, p * (1 - group["lr"] * group["weight_decay"]), g)


def _adam(group: Group, state: Slots, p: Value, g: Value) -> Value:
    beta1, beta2 = group["betas"]
    state["step"] = step = state.get("step", 0) + 1
    state["mean"] = mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    state["square"] = square = beta2 * state.get("square", 0.0) + (1 - beta2) * g * g
    if group["amsgrad"]:
        state["largest"] = square = torch.maximum(state.get("largest", square), square)
    scale = _root(square) / (1 - beta2**step) ** 0.5 + group["eps"]
    return p - group["lr"] / (1 - beta1**step) * mean / scale


def adadelta(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adadelta (Zeiler 2012)."""
    rho, eps = group["rho"], group["eps"]
    g = _decayed(group, p, g)
    state["square"] = square = rho * state.get("square", 0.0) + (1 - rho) * g * g
    moved = state.get("moved", torch.zeros_like(g))
    step = (moved + eps).sqrt() / (square + eps).sqrt() * g
    state["moved"] = rho * moved + (1 - rho) * step * step
    return p - group["lr"] * step


def adagrad(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adagrad (Duchi, Hazan & Singer 2011)."""
    g = _decayed(group, p, g)
    state["step"] = step = state.get("step", 0) + 1
    state["sum"] = total = state.get("sum", group["initial_accumulator_value"]) + g * g
    return p - group["lr"] / (1 + (step - 1) * group["lr_decay"]) * g / (
        _root(total) + group["eps"]
    )


def adamax(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adamax (Kingma & Ba 2015, §7.1)."""
    beta1, beta2 = group["betas"]
    g = _decayed(group, p, g)
    state["step"] = step = state.get("step", 0) + 1
    state["mean"] = mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    state["norm"] = norm = torch.maximum(
        beta2 * state.get("norm", torch.zeros_like(g)), g.abs() + group["eps"]
    )
    return p - group["lr"] / (1 - beta1**step) * mean / norm


def rmsprop(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """RMSprop (Hinton 2012, lecture 6e), uncentred."""
    alpha, momentum = group["alpha"], group["momentum"]
    g = _decayed(group, p, g)
    state["square"] = square = alpha * state.get("square", 0.0) + (1 - alpha) * g * g
    state["buffer"] = buffer = momentum * state.get("buffer", 0.0) + g / (
        _root(square) + group["eps"]
    )
    return p - group["lr"] * buffer


def asgd(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Averaged SGD (Polyak & Juditsky 1992), the iterate itself: the average does not feed back."""
    g, lr, lambd = _decayed(group, p, g), group["lr"], group["lambd"]
    eta = state.get("eta", lr)
    state["step"] = step = state.get("step", 0) + 1
    state["eta"] = lr / (1 + lambd * lr * step) ** group["alpha"]
    return p * (1 - lambd * eta) - eta * g


def rprop(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Rprop (Riedmiller & Braun 1993): only signs of gradients act, so it is differentiable in lr and θ₀ alone."""
    (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
    turn = (g * state.get("previous", torch.zeros_like(g))).sign()
    factor = torch.where(turn > 0, grow * turn, torch.where(turn < 0, -shrink * turn, 1.0))
    size: Value = state.get("size", group["lr"])
    state["size"] = size = (size * factor).clamp(least, most)
    state["previous"] = g = torch.where(turn < 0, 0.0, g)
    return p - g.sign() * size


def _decayed(group: Group, p: Value, g: Value) -> Value:
    decay = group["weight_decay"]
    return g + decay * p if isinstance(decay, Tensor) or decay != 0 else g


def _root(x: Tensor) -> Tensor:
    """√x whose derivative at 0 is 0, not infinite: a coordinate whose gradient has always been zero stays put."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


_ADAM = frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"})
RULES: dict[
    type[torch.optim.Optimizer], tuple[Rule, frozenset[str]]
] = {  # and the options held against torch.optim
    torch.optim.SGD: (sgd, frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"})),
    torch.optim.Adam: (adam, _ADAM),
    torch.optim.AdamW: (adamw, _ADAM),
    torch.optim.Adadelta: (adadelta, frozenset({"lr", "rho", "eps", "weight_decay"})),
    torch.optim.Adagrad: (
        adagrad,
        frozenset({"lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value"}),
    ),
    torch.optim.Adamax: (adamax, frozenset({"lr", "betas", "eps", "weight_decay"})),
    torch.optim.ASGD: (asgd, frozenset({"lr", "lambd", "alpha", "t0", "weight_decay"})),
    torch.optim.RMSprop: (rmsprop, frozenset({"lr", "alpha", "eps", "weight_decay", "momentum"})),
    torch.optim.Rprop: (rprop, frozenset({"lr", "etas", "step_sizes"})),
}
