"""Optimiser steps that autograd can pass through: the one module that imports `higher`.

`higher` steps the stacked parameters `[tasks, …]` as they are. Where its update cuts a derivative, is NaN at a zero
gradient or differs from `torch.optim`, a rule of ours stands in, as a subclass of its `DifferentiableOptimizer`; only
options held against `torch.optim` are let through.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import check_differentiable
from metaimplicit.inner.base import StepLoss, Trajectory
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.problem import FromMeta, resolve

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # `is` with a literal, in its source
    from higher import optim as higher_optim


def _root(x: Tensor) -> Tensor:
    """√x whose derivative at 0 is 0, not infinite: a coordinate whose gradient has always been zero stays put."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


class _Elementwise(higher_optim.DifferentiableOptimizer):  # type: ignore[misc]
    """An optimiser given by one rule, `_rule(group, state, p, g) -> p`."""

    def _update(self, grouped_grads: Any, **_: Any) -> None:
        for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    group["params"][i] = self._rule(group, self.state[index][i], p, g)

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        raise NotImplementedError


class _SGD(_Elementwise, higher_optim.DifferentiableSGD):  # type: ignore[misc]
    """`higher`'s SGD. It skips a momentum or decay of 0, and the derivative there with it, so tensors take our rule."""

    def _update(self, grouped_grads: Any, **_: Any) -> None:
        learnt = any(
            isinstance(group[key], Tensor) for group in self.param_groups for key in ("momentum", "weight_decay")
        )
        (_Elementwise if learnt else higher_optim.DifferentiableSGD)._update(self, grouped_grads)

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        g = g + group["weight_decay"] * p
        dampening = group["dampening"] if "buffer" in state else 0.0
        state["buffer"] = buffer = group["momentum"] * state.get("buffer", 0.0) + (1 - dampening) * g
        return p - group["lr"] * (g + group["momentum"] * buffer if group["nesterov"] else buffer)


class _Adam(_Elementwise):
    """Adam (Kingma & Ba 2015), bias corrections in tensor operations so that β₁ and β₂ have their derivatives."""

    decoupled = False

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        if self.decoupled:
            p = p * (1 - group["lr"] * decay)
        else:
            g = g + decay * p
        state["step"] = step = state.get("step", 0) + 1
        state["mean"] = mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
        state["square"] = square = beta2 * state.get("square", 0.0) + (1 - beta2) * g * g
        if group["amsgrad"]:
            state["largest"] = square = torch.maximum(state.get("largest", square), square)
        scale = _root(square) / (1 - beta2**step) ** 0.5 + group["eps"]
        return p - group["lr"] / (1 - beta1**step) * mean / scale


class _AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    decoupled = True


class _Adagrad(_Elementwise):
    """Adagrad (Duchi, Hazan & Singer 2011)."""

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        g = g + group["weight_decay"] * p
        state["step"] = step = state.get("step", 0) + 1
        state["sum"] = total = state.get("sum", group["initial_accumulator_value"]) + g * g
        return p - group["lr"] / (1 + (step - 1) * group["lr_decay"]) * g / (_root(total) + group["eps"])


class _Adamax(_Elementwise):
    """Adamax (Kingma & Ba 2015, §7.1)."""

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        beta1, beta2 = group["betas"]
        g = g + group["weight_decay"] * p
        state["step"] = step = state.get("step", 0) + 1
        state["mean"] = mean = beta1 * state.get("mean", 0.0) + (1 - beta1) * g
        state["norm"] = norm = torch.maximum(beta2 * state.get("norm", torch.zeros_like(g)), g.abs() + group["eps"])
        return p - group["lr"] / (1 - beta1**step) * mean / norm


class _RMSprop(_Elementwise):
    """RMSprop (Hinton 2012, lecture 6e), uncentred."""

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        alpha, momentum = group["alpha"], group["momentum"]
        g = g + group["weight_decay"] * p
        state["square"] = square = alpha * state.get("square", 0.0) + (1 - alpha) * g * g
        state["buffer"] = buffer = momentum * state.get("buffer", 0.0) + g / (_root(square) + group["eps"])
        return p - group["lr"] * buffer


class _ASGD(_Elementwise):
    """Averaged SGD (Polyak & Juditsky 1992), the iterate itself: the average does not feed back."""

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        g, lr, lambd = g + group["weight_decay"] * p, group["lr"], group["lambd"]
        eta = state.get("eta", lr)
        state["step"] = step = state.get("step", 0) + 1
        state["eta"] = lr / (1 + lambd * lr * step) ** group["alpha"]
        return p * (1 - lambd * eta) - eta * g


class _Rprop(_Elementwise):
    """Rprop (Riedmiller & Braun 1993): only signs of gradients act, so it is differentiable in lr and θ₀ alone."""

    def _rule(self, group: Any, state: dict[str, Any], p: Any, g: Any) -> Any:
        (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
        turn = (g * state.get("previous", torch.zeros_like(g))).sign()
        factor = torch.where(turn > 0, grow * turn, torch.where(turn < 0, -shrink * turn, 1.0))
        state["size"] = size = (state.get("size", group["lr"]) * factor).clamp(least, most)
        state["previous"] = g = torch.where(turn < 0, 0.0, g)
        return p - g.sign() * size


_OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[type[Any], frozenset[str]]] = {
    torch.optim.SGD: (_SGD, frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"})),
    torch.optim.Adam: (_Adam, frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"})),
    torch.optim.AdamW: (_AdamW, frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad"})),
    torch.optim.Adadelta: (higher_optim.DifferentiableAdadelta, frozenset({"lr", "rho", "eps", "weight_decay"})),
    torch.optim.Adagrad: (
        _Adagrad,
        frozenset({"lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value"}),
    ),
    torch.optim.Adamax: (_Adamax, frozenset({"lr", "betas", "eps", "weight_decay"})),
    torch.optim.ASGD: (_ASGD, frozenset({"lr", "lambd", "alpha", "t0", "weight_decay"})),
    torch.optim.RMSprop: (_RMSprop, frozenset({"lr", "alpha", "eps", "weight_decay", "momentum"})),
    torch.optim.Rprop: (_Rprop, frozenset({"lr", "etas", "step_sizes"})),
}


def check_optimizer(optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Raise ValueError for an optimiser or option that is not known to agree with `torch.optim`."""
    if optimizer not in _OPTIMIZERS:
        known = ", ".join(sorted(cls.__name__ for cls in _OPTIMIZERS))
        raise ValueError(f"optimizer: got {optimizer!r}, expected one of torch.optim's {known}")
    known_options = _OPTIMIZERS[optimizer][1]
    if unknown := sorted(set(options) - known_options):
        raise ValueError(
            f"{optimizer.__name__} options: got {unknown}, expected some of {sorted(known_options)}; the others have "
            "no derivative that could be tested against torch.optim"
        )
    _build(optimizer, options, {}, [""], track=False)


def _build(
    optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], meta: Params, names: list[str], track: bool
) -> Any:
    """A differentiable optimiser with one group per tensor; constants pass through torch's own range checks."""
    constants = {key: value for key, value in options.items() if not _is_tensor(value)}
    if "momentum" in options and "momentum" not in constants:
        constants["momentum"] = 0.5  # a stand-in: Nesterov's check wants one
    reference = optimizer([{"params": [torch.zeros((), requires_grad=True)]} for _ in names], **constants)
    if not meta and any(_is_tensor(value) for value in options.values()):
        return None  # a check without values to read
    override = {key: [resolve(value, meta, name) for name in names] for key, value in options.items()}
    reference.state.clear()  # Adagrad fills its state at birth; ours is made in the first step
    slots = [object() for _ in names]  # `higher` copies the groups deeply and asks of a parameter only which it is
    for group, slot in zip(reference.param_groups, slots, strict=True):
        group["params"] = [slot]
    return _OPTIMIZERS[optimizer][0](reference, slots, override=override, track_higher_grads=track)


def _is_tensor(value: Any) -> bool:
    return any(map(_is_tensor, value)) if isinstance(value, tuple) else isinstance(value, (Tensor, FromMeta))


def run(
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    loss: StepLoss,
    start: Params,
    meta: Params,
    *,
    steps: int,
    tol: float | None,
    track: int,
    keep: bool,
) -> Trajectory:
    """`InnerLoop.run` for any optimiser in the table."""
    names, tasks = list(start), len(next(iter(start.values())))
    device = next(iter(start.values())).device
    active = torch.ones(tasks, dtype=torch.bool, device=device)
    taken = torch.zeros(tasks, dtype=torch.int64, device=device)
    norm = torch.zeros(tasks, device=device)
    frozen = {name: value.detach() for name, value in meta.items()}
    params, free = start, steps - track
    stepper = _build(optimizer, options, meta if free == 0 else frozen, names, track=free == 0)
    if free > 0:
        params = leaves(start)
    elif not all(p.requires_grad for p in start.values()):
        params = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in start.items()}
    iterates = [params] if keep else []
    check_every = 8 if device.type == "cuda" else 1

    def look(gradients: Any) -> Any:
        nonlocal norm
        if t == free:
            check_differentiable(gradients)
        if tol is not None or t == steps - 1:
            norm = flatten({str(i): g.detach() for i, g in enumerate(gradients) if g is not None}).norm(dim=-1)
        return gradients

    for t in range(steps):
        if t == free and free > 0:
            params, state = _straight_through(params, start), stepper.state
            params = {name: p if p.requires_grad else p.requires_grad_() for name, p in params.items()}
            stepper = _build(optimizer, options, meta, names, track=True)
            stepper.state = state
        losses = loss(params, t)
        stepped = dict(zip(names, stepper.step(losses.sum(), list(params.values()), grad_callback=look), strict=True))
        if tol is not None:
            active = active & (norm > tol)
            stepped = {name: _where(active, new, params[name]) for name, new in stepped.items()}
        if t < free:
            _detach(stepper.state)
            stepped = leaves(stepped)
        params = stepped
        taken += active
        if keep:
            iterates.append(params)
        if tol is not None and (t + 1) % check_every == 0 and not active.any():
            break
    if track == 0:
        params = _straight_through(params, start)
    return Trajectory(params, taken, norm, tuple(iterates))


def _straight_through(params: Params, start: Params) -> Params:
    """θ with the gradient of θ₀: the steps between them pulled back as the identity."""
    return {
        name: p.detach() + (start[name] - start[name].detach()) if start[name].requires_grad else p.detach()
        for name, p in params.items()
    }


def _where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(active.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _detach(state: list[Any]) -> None:
    """Cut the graph that `higher` builds through the optimiser's state even where it tracks nothing."""
    for group in state:
        for slot in group.values():
            for key, value in slot.items():
                slot[key] = value.detach() if isinstance(value, Tensor) else value
