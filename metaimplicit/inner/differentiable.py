"""Optimiser steps that autograd can pass through: the one module that imports `higher`.

`higher` steps the stacked parameters `[tasks, …]` as they are, and holds their state. The update itself is one of our
`RULES`: `higher`'s own cut a derivative here and there, are NaN at a zero gradient or differ from `torch.optim`; only
options held against `torch.optim` are let through.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import check_differentiable
from metaimplicit.inner.base import StepLoss, Trajectory, straight_through
from metaimplicit.inner.rules import RULES
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.problem import FromMeta, resolve

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # `is` with a literal, in its source
    from higher import optim as higher_optim


class _Stepper(higher_optim.DifferentiableOptimizer):  # type: ignore[misc]
    """`higher`'s optimiser around one of our rules; one group for each tensor."""

    rule: Any

    def _update(self, grouped_grads: Any, **_: Any) -> None:
        for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    group["params"][i] = self.rule(group, self.state[index][i], p, g)


def check_optimizer(optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
    """Raise ValueError for an optimiser or option that is not known to agree with `torch.optim`."""
    if optimizer not in RULES:
        known = ", ".join(sorted(cls.__name__ for cls in RULES))
        raise ValueError(f"optimizer: got {optimizer!r}, expected one of torch.optim's {known}")
    if unknown := sorted(set(options) - RULES[optimizer][1]):
        raise ValueError(
            f"{optimizer.__name__} options: got {unknown}, expected some of {sorted(RULES[optimizer][1])}; the others "
            "have no derivative that could be tested against torch.optim"
        )
    _reference(optimizer, options, [""])


def take_step(
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    params: Params,
    gradients: Params,
    state: OptimizerState,
    meta: Params,
) -> tuple[Params, OptimizerState]:
    """`InnerLoop.take_step` for any optimiser in the table: the step that `run` takes, as a pure function."""
    rule, defaults = RULES[optimizer][0], _reference(optimizer, options, [""]).defaults
    stepped, after = dict(params), dict(state)
    for name, g in gradients.items():
        group = {**defaults, **{key: resolve(value, meta, name) for key, value in options.items()}}
        after[name] = dict(state.get(name, {}))
        stepped[name] = rule(group, after[name], params[name], g)
    return stepped, after


def _reference(
    optimizer: type[torch.optim.Optimizer], options: Mapping[str, Any], names: list[str]
) -> torch.optim.Optimizer:
    """torch's optimiser, whose own range checks the constants pass."""
    constants = {key: value for key, value in options.items() if not _is_tensor(value)}
    if "momentum" in options and "momentum" not in constants:
        constants["momentum"] = 0.5  # a stand-in: Nesterov's check wants one
    return optimizer(
        [{"params": [torch.zeros((), requires_grad=True)]} for _ in names], **constants
    )


def _build(
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    meta: Params,
    names: list[str],
    state: OptimizerState,
    track: bool,
) -> Any:
    """A differentiable optimiser with one group for each tensor, going on from `state`."""
    reference = _reference(optimizer, options, names)
    override = {
        key: [resolve(value, meta, name) for name in names] for key, value in options.items()
    }
    reference.state.clear()  # Adagrad fills its state at birth; ours is made in the first step
    slots = [
        object() for _ in names
    ]  # `higher` copies the groups deeply and asks of a parameter only which it is
    for group, slot in zip(reference.param_groups, slots, strict=True):
        group["params"] = [slot]
    stepper = _Stepper(reference, slots, override=override, track_higher_grads=track)
    stepper.rule = RULES[optimizer][0]
    for slot, name in zip(stepper.state, names, strict=True):
        slot[0] = dict(state.get(name, {}))
    return stepper


def _is_tensor(value: Any) -> bool:
    return (
        any(map(_is_tensor, value))
        if isinstance(value, tuple)
        else isinstance(value, (Tensor, FromMeta))
    )


def run(
    optimizer: type[torch.optim.Optimizer],
    options: Mapping[str, Any],
    loss: StepLoss,
    start: Params,
    meta: Params,
    *,
    steps: int,
    tol: float | None,
    differentiated_steps: int,
    keep_iterates: bool,
    state: OptimizerState,
) -> Trajectory:
    """`InnerLoop.run` for any optimiser in the table."""
    names, tasks = list(start), len(next(iter(start.values())))
    device = next(iter(start.values())).device
    active = torch.ones(tasks, dtype=torch.bool, device=device)
    taken = torch.zeros(tasks, dtype=torch.int64, device=device)
    norm = torch.zeros(tasks, device=device)
    frozen = {name: value.detach() for name, value in meta.items()}
    params, free = start, steps - differentiated_steps
    stepper = _build(
        optimizer, options, meta if free == 0 else frozen, names, state, track=free == 0
    )
    if free > 0:
        params = leaves(start)
    elif not all(p.requires_grad for p in start.values()):
        params = {
            name: p if p.requires_grad else p.detach().requires_grad_() for name, p in start.items()
        }
    iterates = [params] if keep_iterates else []
    check_every = 8 if device.type == "cuda" else 1

    def look(gradients: Any) -> Any:
        nonlocal norm
        if t == free:
            check_differentiable(gradients)
        if tol is not None or t == steps - 1:
            norm = flatten(
                {str(i): g.detach() for i, g in enumerate(gradients) if g is not None}
            ).norm(dim=-1)
        return gradients

    for t in range(steps):
        if t == free and free > 0:
            params = straight_through(params, start)
            params = {
                name: p if p.requires_grad else p.requires_grad_() for name, p in params.items()
            }
            stepper = _build(optimizer, options, meta, names, _state(stepper, names), track=True)
        losses = loss(params, t)
        stepped = dict(
            zip(
                names,
                stepper.step(losses.sum(), list(params.values()), grad_callback=look),
                strict=True,
            )
        )
        if tol is not None:
            active = active & (norm > tol)
            stepped = {name: _where(active, new, params[name]) for name, new in stepped.items()}
        if t < free:
            _detach(stepper.state)
            stepped = leaves(stepped)
        params = stepped
        taken += active
        if keep_iterates:
            iterates.append(params)
        if tol is not None and (t + 1) % check_every == 0 and not active.any():
            break
    if differentiated_steps == 0:
        params = straight_through(params, start)
    return Trajectory(params, taken, norm, tuple(iterates), _state(stepper, names))


def _state(stepper: Any, names: list[str]) -> OptimizerState:
    return {name: dict(slots[0]) for name, slots in zip(names, stepper.state, strict=True)}


def _where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(active.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _detach(state: list[Any]) -> None:
    """Cut the graph that `higher` builds through the optimiser's state even where it tracks nothing."""
    for group in state:
        for slot in group.values():
            for key, value in slot.items():
                slot[key] = value.detach() if isinstance(value, Tensor) else value
