"""One step of each optimiser as a pure function of tensors, `rule(group, state, p, g) -> p`.

`p` is a parameter and `g` its gradient, both `[tasks, *shape]`. `group` holds the options, each a
number or a tensor. `state` holds the slots of this parameter. It is empty before the first step,
and a rule fills it in place. The derivative with respect to every option exists wherever the
formula has one, at zero gradients as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
Slots = dict[str, Any]

# A tensor. A type checker cannot follow its algebra with options and slots.
Value = Any
Rule = Callable[[Group, Slots, Value, Value], Value]


def sgd(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """SGD with momentum. A constant momentum of 0 costs nothing.

    Example:
        >>> group = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
        >>> sgd(group, {}, torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([0.8000])
    """
    lr = group["lr"]
    momentum = group["momentum"]
    g = _add_weight_decay(group, p, g)
    if isinstance(momentum, Tensor) or momentum != 0:
        # m_t = μ m_{t−1} + (1 − dampening) g_t, but the first step is not dampened: m_1 = g_1.
        buffer = momentum * state.get("buffer", 0.0) + _undamped(group, state, g) * g
        state["buffer"] = buffer
        g = g + momentum * buffer if group["nesterov"] else buffer
    return p - lr * g if isinstance(lr, Tensor) else p.add(g, alpha=-lr)


def _undamped(group: Group, state: Slots, g: Value) -> Value:
    """1 − dampening, and 1 in the first step of a task."""
    dampening = group["dampening"]
    if not isinstance(dampening, Tensor) and dampening == 0:
        return 1.0
    state.setdefault("step", 1 if "buffer" in state else 0)
    step = _count_step(state)
    if isinstance(step, Tensor):  # tasks have taken different numbers of steps
        return 1 - dampening * (step > 1).to(g.dtype)
    return 1 - dampening if step > 1 else 1.0


def sgdw(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """SGD with decoupled weight decay; see `SGDW`."""
    return sgd(
        group,
        state,
        p * (1 - group["lr"] * group["decoupled_weight_decay"]),
        g,
    )


def adam(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adam (Kingma & Ba 2015)."""
    return _adam_step(group, state, p, _add_weight_decay(group, p, g))


def adamw(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    shrunk = p * (1 - group["lr"] * group["weight_decay"])
    return _adam_step(group, state, shrunk, g)


def _adam_step(group: Group, state: Slots, p: Value, g: Value) -> Value:
    beta1, beta2 = group["betas"]
    step = _count_step(state)
    mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    state["mean"] = mean
    square = beta2 * state.get("square", 0.0) + (1 - beta2) * g * g
    state["square"] = square
    if group["amsgrad"]:
        square = torch.maximum(state.get("largest", square), square)
        state["largest"] = square
    # The bias corrections are powers of β₁ and β₂, so that both have their derivatives.
    scale = _root(square) / (1 - beta2**step) ** 0.5 + group["eps"]
    return p - group["lr"] / (1 - beta1**step) * mean / scale


def adadelta(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adadelta (Zeiler 2012)."""
    rho = group["rho"]
    eps = group["eps"]
    g = _add_weight_decay(group, p, g)
    square = rho * state.get("square", 0.0) + (1 - rho) * g * g
    state["square"] = square
    squared_steps = state.get("squared_steps", torch.zeros_like(g))
    step = (squared_steps + eps).sqrt() / (square + eps).sqrt() * g
    state["squared_steps"] = rho * squared_steps + (1 - rho) * step * step
    return p - group["lr"] * step


def adagrad(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adagrad (Duchi, Hazan & Singer 2011)."""
    g = _add_weight_decay(group, p, g)
    step = _count_step(state)
    total = state.get("sum", group["initial_accumulator_value"]) + g * g
    state["sum"] = total
    lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])
    return p - lr * g / (_root(total) + group["eps"])


def adamax(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adamax (Kingma & Ba 2015, §7.1)."""
    beta1, beta2 = group["betas"]
    g = _add_weight_decay(group, p, g)
    step = _count_step(state)
    mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    state["mean"] = mean
    past = beta2 * state.get("norm", torch.zeros_like(g))
    norm = torch.maximum(past, g.abs() + group["eps"])
    state["norm"] = norm
    return p - group["lr"] / (1 - beta1**step) * mean / norm


def nadam(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Adam with Nesterov's momentum (Dozat 2016)."""
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    step = _count_step(state)
    p, g = _decay(group, p, g)
    # μ_t = β₁ (1 − ½ 0.96^{tψ}), where ψ is the momentum's decay.
    momentum = beta1 * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
    next_momentum = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * group["momentum_decay"]))
    product = state.get("momentum_product", 1.0) * momentum
    state["momentum_product"] = product
    mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    state["mean"] = mean
    square = beta2 * state.get("square", 0.0) + (1 - beta2) * g * g
    state["square"] = square
    scale = _root(square) / (1 - beta2**step) ** 0.5 + group["eps"]
    from_gradient = (1 - momentum) / (1 - product) * g
    from_mean = next_momentum / (1 - product * next_momentum) * mean
    return p - lr * (from_gradient + from_mean) / scale


def radam(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Rectified Adam (Liu et al. 2020, alg. 2)."""
    beta1, beta2 = group["betas"]
    step = _count_step(state)
    p, g = _decay(group, p, g)
    mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
    state["mean"] = mean
    square = beta2 * state.get("square", 0.0) + (1 - beta2) * g * g
    state["square"] = square
    move = group["lr"] / (1 - beta1**step) * mean
    # While ρ_t ≤ 5, the mean square is too uncertain to divide by, and the rectification is 0.
    rectification = _rectification(beta2, step)
    if not isinstance(rectification, Tensor) and rectification == 0:
        return p - move
    rectified = rectification * (1 - beta2**step) ** 0.5 * move / (_root(square) + group["eps"])
    if not isinstance(rectification, Tensor):
        return p - rectified
    return p - torch.where(rectification > 0, rectified, move)


def _rectification(beta2: Value, step: int) -> Value:
    """The factor r_t of RAdam, and 0 where ρ_t ≤ 5."""
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * step * beta2**step / (1 - beta2**step)
    certain = rho > 5
    if isinstance(rho, Tensor):
        # Any other point at which the root has a derivative will do where r_t is 0.
        limit = torch.where(certain, limit + 0.0 * rho, 7.0)
        rho = torch.where(certain, rho, 6.0)
    elif not certain:
        return 0.0
    factor = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return torch.where(certain, factor, 0.0) if isinstance(rho, Tensor) else factor


def rmsprop(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """RMSprop (Hinton 2012, lecture 6e), which if centred divides by the deviation (Graves 2013).

    The variance of constant gradients is zero. There the derivative of its root is taken as zero.
    """
    alpha = group["alpha"]
    g = _add_weight_decay(group, p, g)
    square = alpha * state.get("square", 0.0) + (1 - alpha) * g * g
    state["square"] = square
    if group["centered"]:
        mean = alpha * state.get("mean", 0.0) + (1 - alpha) * g
        state["mean"] = mean
        square = square - mean * mean
    scaled = g / (_root(square) + group["eps"])
    momentum = group["momentum"]
    if not isinstance(momentum, Tensor) and momentum == 0:  # the buffer rests, as in torch
        return p - group["lr"] * scaled
    buffer = momentum * state.get("buffer", 0.0) + scaled
    state["buffer"] = buffer
    return p - group["lr"] * buffer


def asgd(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Averaged SGD (Polyak & Juditsky 1992).

    This is the iterate itself. Its average is not computed, because no step depends on it.
    """
    lr = group["lr"]
    lambd = group["lambd"]
    g = _add_weight_decay(group, p, g)
    eta = state.get("eta", lr)
    step = _count_step(state)
    state["eta"] = lr / (1 + lambd * lr * step) ** group["alpha"]
    return p * (1 - lambd * eta) - eta * g


def rprop(group: Group, state: Slots, p: Value, g: Value) -> Value:
    """Rprop (Riedmiller & Braun 1993).

    It uses the signs of the gradients only, so it has derivatives in lr and θ_0 alone.
    """
    shrink, grow = group["etas"]
    least, most = group["step_sizes"]
    agreement = (g * state.get("previous", torch.zeros_like(g))).sign()
    # agreement is 1, 0 or −1; the products with it keep the type of g.
    smaller = torch.where(agreement < 0, -shrink * agreement, 1.0)
    factor = torch.where(agreement > 0, grow * agreement, smaller)
    size: Value = state.get("size", group["lr"])
    size = (size * factor).clamp(least, most)
    state["size"] = size
    # After a change of sign the coordinate rests for one step.
    g = torch.where(agreement < 0, 0.0, g)
    state["previous"] = g
    return p - g.sign() * size


def clip_factor(gradients: Tensor, limit: Value) -> Tensor:
    """min(1, limit/(‖g‖ + 10⁻⁶)) of each task, the factor of `torch.nn.utils.clip_grad_norm_`.

    Args:
        gradients: g, `[tasks, n]`.
        limit: The largest norm, a number or a scalar tensor.

    Example:
        >>> clip_factor(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([0.2000, 1.0000])
    """
    norm = _root(gradients.square().sum(1))
    factor: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return factor


def _add_weight_decay(group: Group, p: Value, g: Value) -> Value:
    decay = group["weight_decay"]
    return g + decay * p if isinstance(decay, Tensor) or decay != 0 else g


def _decay(group: Group, p: Value, g: Value) -> tuple[Value, Value]:
    """The parameter and its gradient after weight decay, coupled or decoupled."""
    if group["decoupled_weight_decay"]:
        return p * (1 - group["lr"] * group["weight_decay"]), g
    return p, _add_weight_decay(group, p, g)


def _count_step(state: Slots) -> Value:
    step = state.get("step", 0) + 1
    state["step"] = step
    return step


def _root(x: Tensor) -> Tensor:
    """√x with the derivative 0 at x = 0, where that of √ is infinite.

    So a coordinate whose gradients have all been zero keeps its value and passes no NaN.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
