"""Optimiser steps that autograd can pass through: the one module that imports `higher`.

`higher` takes the gradients of the stacked parameters `[tasks, …]` and holds the state of the
optimiser. The update itself is one of our `RULES`. The updates of `higher` lose some derivatives,
give NaN at a zero gradient, or differ from `torch.optim`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import as_variable, check_differentiable, check_twice_differentiable
from metaimplicit.inner.base import StepLoss, Trajectory, straight_through
from metaimplicit.inner.kept_state import KeptState
from metaimplicit.inner.optimizers import RULES
from metaimplicit.inner.settings import at_step
from metaimplicit.inner.step import DifferentiableStep, align_tasks
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.solvers.iteration import all_ended

with warnings.catch_warnings():
    # The source of `higher` compares a literal by `is`.
    warnings.simplefilter("ignore", SyntaxWarning)
    from higher import optim as higher_optim


def run_steps(
    step: DifferentiableStep,
    loss: StepLoss,
    start: Params,
    *,
    meta: Params,
    state: OptimizerState,
    steps: int,
    tol: float | None,
    differentiated_steps: int,
    keep_iterates: bool,
) -> Trajectory:
    """`InnerLoop.run` for the loop that takes `step` up to `steps` times."""
    loop = _RunningLoop(
        step,
        loss,
        start,
        state=state,
        last=steps - 1,
        tol=tol,
        keep_iterates=keep_iterates,
    )
    if tol is not None:
        loop.kept = KeptState(start, state, step.initial_slots(start, meta))
    first_differentiated = steps - differentiated_steps
    if first_differentiated > 0:
        constants = {name: value.detach() for name, value in meta.items()}
        loop.advance(range(first_differentiated), constants, differentiated=False)
        loop.params = straight_through(loop.params, start)
    if differentiated_steps > 0:
        loop.advance(range(first_differentiated, steps), meta, differentiated=True)
    return Trajectory(
        params=loop.params,
        steps=loop.steps_of_tasks(),
        gradient_norm=loop.gradient_norm,
        iterates=tuple(loop.iterates),
        state=loop.state if loop.kept is None else loop.kept.finish(loop.steps_of_tasks()),
    )


@dataclass
class _RunningLoop:
    """An inner loop between two of its steps.

    Attributes:
        step: What it does in a step.
        loss: `(params, t) -> [tasks]`.
        params: θ_t, `{name: [tasks, *shape]}`.
        state: The state of the optimiser after t steps.
        last: The number of the last step, T − 1.
        tol: ‖∂f/∂θ‖ at which a task stops, if it is not None.
        keep_iterates: Whether `iterates` are kept.
        iterates: θ_0 … θ_t.
        active: Which tasks go on, `[tasks]`, bool. It exists only if there is a `tol`.
        taken: The number of steps that each task took, `[tasks]`. Without a `tol`, no task stops
            early, and this is one number for all.
        kept: The state of tasks that stopped. None without a `tol`.
        gradient_norm: ‖∂f/∂θ‖ of each task at the start of its step, `[tasks]`. It is set by every
            step if there is a `tol`, else only by the last one, and does not exist before.
    """

    step: DifferentiableStep
    loss: StepLoss
    params: Params
    state: OptimizerState
    last: int
    tol: float | None
    keep_iterates: bool
    iterates: list[Params] = field(default_factory=list)
    active: Tensor = field(init=False)
    taken: Tensor | int = 0
    kept: KeptState | None = None
    gradient_norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.tol is not None:
            first = next(iter(self.params.values()))
            self.active = torch.ones(
                len(first),
                dtype=torch.bool,
                device=first.device,
            )

    def advance(self, steps: range, meta: Params, *, differentiated: bool) -> None:
        """Take these steps, with their graph or without one, until no task is active."""
        make_variables = _require_grad if differentiated else leaves
        self.params = make_variables(self.params)
        if self.keep_iterates and not self.iterates:
            self.iterates.append(self.params)

        stepper = _Stepper(
            self.step,
            list(self.params),
            state=self.state,
            meta=meta,
            track=differentiated,
            first=steps.start,
        )
        for t in steps:
            checked = meta if differentiated and t == steps.start else None
            inspect = partial(self._inspect_gradients, t=t, checked=checked)
            total = self.loss(self.params, t).sum()
            variables = list(self.params.values())
            if checked is not None:
                check_twice_differentiable([total], variables, ends=checked.values())
            stepped = stepper.step(total, variables, grad_callback=inspect)
            params = dict(zip(self.params, stepped, strict=True))

            if self.tol is not None:
                # NaN is not ≤ tol, so such a task goes on: it is not solved.
                self.active = self.active & ~(self.gradient_norm <= self.tol)
                for name, p in params.items():
                    params[name] = _choose(self.active, p, self.params[name])
                if self.kept is not None:
                    self.kept.update(stepper.slots(), self.active)
            if not differentiated:
                stepper.detach_state()
                params = leaves(params)

            self.params = params
            self.taken = self.taken + (1 if self.tol is None else self.active.long())
            if self.keep_iterates:
                self.iterates.append(params)
            if self._is_finished(t):
                break
        self.state = stepper.slots()

    def steps_of_tasks(self) -> Tensor:
        """The number of steps that each task took, `[tasks]`, int64."""
        if isinstance(self.taken, Tensor):
            return self.taken
        first = next(iter(self.params.values()))
        return torch.full((len(first),), self.taken, device=first.device)

    def _inspect_gradients(
        self, gradients: Sequence[Tensor | None], *, t: int, checked: Params | None
    ) -> Sequence[Tensor | None]:
        """What `higher` calls with the gradients of step t, before the update.

        They have to be differentiable in the meta-parameters `checked`, unless it is None.
        """
        if checked is not None:
            check_differentiable(gradients, ends=checked.values())
        if self.tol is not None or t == self.last:
            present = {str(i): g.detach() for i, g in enumerate(gradients) if g is not None}
            self.gradient_norm = flatten(present).norm(dim=-1)
        return gradients

    def _is_finished(self, t: int) -> bool:
        return self.tol is not None and all_ended(self.active, step=t + 1)


class _Stepper(higher_optim.DifferentiableOptimizer):  # type: ignore[misc]
    """The optimiser of `higher` with one of our rules. Every parameter has its own group."""

    def __init__(
        self,
        step: DifferentiableStep,
        names: list[str],
        *,
        state: OptimizerState,
        meta: Params,
        track: bool,
        first: int,
    ) -> None:
        self._rule = RULES[step.optimizer].step
        self._clipped = partial(step.clipped, meta=meta)
        self._options = {name: step.options_of(name, meta) for name in names}
        self._t = first
        # `higher` copies the groups, and asks of a parameter only which one it is. So the names
        # stand for the parameters.
        groups = [{"params": [name]} for name in names]
        super().__init__(
            SimpleNamespace(param_groups=groups, state={}), names, track_higher_grads=track
        )
        for name, group_state in zip(names, self.state, strict=True):
            group_state[0] = dict(state.get(name, {}))

    def _update(self, grouped_grads: Any, **_: Any) -> None:
        pairs = zip(self._options, grouped_grads, strict=True)
        present = {name: gradient for name, (gradient,) in pairs if gradient is not None}
        gradients = self._clipped(present)
        groups = zip(self._options.items(), self.param_groups, self.state, strict=True)
        for (name, options), group, group_state in groups:
            if name in gradients:
                (p,) = group["params"]
                settings = at_step(options, self._t)
                new = self._rule(settings, group_state[0], p, gradients[name])
                group["params"] = [new.to(p.dtype)]
        self._t += 1

    def slots(self) -> OptimizerState:
        """The state of the optimiser, by parameter."""
        pairs = zip(self._options, self.state, strict=True)
        return {name: dict(group_state[0]) for name, group_state in pairs}

    def detach_state(self) -> None:
        """Detach the slots: without this, weight decay would chain them through all steps."""
        for group_state in self.state:
            slots = group_state[0]
            for key, value in slots.items():
                slots[key] = value.detach() if isinstance(value, Tensor) else value


def _require_grad(params: Params) -> Params:
    """The same tensors; those that do not require grad are replaced by variables that do."""
    return {name: as_variable(p) for name, p in params.items()}


def _choose(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the active tasks, `old` for the others."""
    return torch.where(align_tasks(active, new), new, old)
