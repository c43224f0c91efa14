"""One step of an optimiser as a pure function that autograd can pass through."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.optimizers import RULES
from metaimplicit.inner.rules import Group, clip_factor
from metaimplicit.inner.settings import (
    at_step,
    constant_choices,
    resolve_setting,
    values_in,
)
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten
from metaimplicit.problem import FromMeta, Number, resolve

PAIRS = ("betas", "etas", "step_sizes")  # the options of torch.optim that are tuples

UNTESTED = "the others have no derivative that could be tested against torch.optim"
# What takes the place of an option of torch.optim.
NO_EFFECT = "leave it out, because it changes how torch computes, and no number"
REPLACEMENTS = {
    "decoupled_weight_decay": "use torch.optim.AdamW for Adam, or inner.SGDW for SGD",
    "maximize": "negate the loss",
    "foreach": NO_EFFECT,
    "fused": NO_EFFECT,
    "capturable": NO_EFFECT,
    "differentiable": NO_EFFECT,
}


@dataclass(frozen=True)
class DifferentiableStep:
    """One step of an optimiser of `torch.optim`, differentiable in all that it reads.

    Args:
        optimizer: A class in `RULES`.
        options: Its options, each a number, a tensor, `FromMeta`, or a tuple of these; or a dict
            of these by parameter, or a list by step.
        max_grad_norm: The largest norm of the gradient of a task, beyond which it is scaled down.
            If None, it is not clipped.

    Raises:
        ValueError: The optimiser or an option is not known to agree with `torch.optim`, or a
            constant is out of range.

    Example:
        >>> step = DifferentiableStep(torch.optim.SGD, {"lr": 0.5})
        >>> gradients = {"w": torch.tensor([[2.0]])}
        >>> params, state = step.take({"w": torch.tensor([[3.0]])}, gradients, state={}, meta={})
        >>> params["w"]
        tensor([[2.]])
    """

    optimizer: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    max_grad_norm: Number | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in RULES:
            known = ", ".join(sorted(cls.__name__ for cls in RULES))
            raise ValueError(
                f"optimizer: got {self.optimizer!r}, expected one of {known}, such as "
                "torch.optim.Adam"
            )
        tested = RULES[self.optimizer].options
        unknown = sorted(set(self.options) - tested)
        if unknown:
            raise ValueError(
                f"{self.optimizer.__name__} options: got {unknown}, expected some of "
                f"{sorted(tested)}; {REPLACEMENTS.get(unknown[0], UNTESTED)}"
            )
        for option, setting in self.options.items():
            _check_numbers(option, setting)
            _check_tuples(option, setting)
        _ = self.defaults  # torch checks the range of constants
        limit = self.max_grad_norm
        if limit is not None and (isinstance(limit, (list, Mapping)) or not _is_number(limit)):
            raise ValueError(
                f"max_grad_norm: got {limit!r}, expected one number for all parameters and steps, "
                "because it bounds the norm of the whole gradient"
            )
        if isinstance(limit, (int, float)) and not limit > 0:
            raise ValueError(f"max_grad_norm: got {limit}, expected a norm > 0, or None")

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """All options of the optimiser. Options that depend on tensors have stand-ins."""
        choices = {key: constant_choices(setting) for key, setting in self.options.items()}
        if len(choices.get("momentum", [0.0])) != 1:
            # A stand-in, because torch refuses Nesterov's momentum without one that is not 0, which
            # some parameters or steps may have.
            choices["momentum"] = [x or 0.5 for x in choices["momentum"]] or [0.5]
        parameter = torch.zeros((), device="cpu", requires_grad=True)
        for row in range(max([1, *map(len, choices.values())])):
            constants = {key: x[min(row, len(x) - 1)] for key, x in choices.items() if x}
            defaults = self.optimizer([parameter], **constants).defaults
        return defaults

    def options_of(self, parameter: str, meta: Params) -> Group:
        """All options for one parameter. A list holds one value for each step."""
        given = {
            key: resolve_setting(setting, meta, parameter, option=key)
            for key, setting in self.options.items()
        }
        return {**self.defaults, **given}

    def clipped(self, gradients: Params, meta: Params) -> Params:
        """The gradients of each task, scaled as `torch.nn.utils.clip_grad_norm_` does.

        Args:
            gradients: ∂f/∂θ, `{name: [tasks, *shape]}`.
            meta: Where a `max_grad_norm` of `FromMeta` is read.
        """
        limit = self.max_grad_norm
        if limit is None or not gradients:
            return gradients
        # Torch takes infinity for no limit as well. Its derivative would be 0 · ∞.
        if isinstance(limit, float) and limit == math.inf:
            return gradients
        factor = clip_factor(flatten(gradients), resolve(limit, meta))
        return {name: g * align_tasks(factor, g).to(g) for name, g in gradients.items()}

    def initial_slots(self, names: Iterable[str], meta: Params) -> OptimizerState:
        """The slots before the first step that are not 0, by parameter."""
        initial = RULES[self.optimizer].initial
        return {name: initial(at_step(self.options_of(name, meta), 0)) for name in names}

    def take(
        self,
        params: Params,
        gradients: Params,
        *,
        state: OptimizerState,
        meta: Params,
        step: int | None = None,
    ) -> tuple[Params, OptimizerState]:
        """The step as a pure function; see `InnerLoop.take_step`."""
        rule = RULES[self.optimizer].step
        new_params = dict(params)
        new_state = dict(state)
        for name, gradient in self.clipped(gradients, meta).items():
            options = at_step(self.options_of(name, meta), step)
            slots = dict(state.get(name, {}))
            # The numbers of a continued state may be tensors of double precision.
            new_params[name] = rule(options, slots, params[name], gradient).to(gradient.dtype)
            new_state[name] = slots
        return new_params, new_state


def _check_numbers(option: str, setting: Any) -> None:
    """Raise ValueError if a setting holds anything but numbers."""
    if isinstance(setting, Mapping):
        for key, entry in setting.items():
            if not isinstance(key, str):
                raise ValueError(
                    f"{option}: got a dict with the key {key!r}, expected names of parameters or "
                    "modules, or patterns of names"
                )
            _check_numbers(option, entry)
    elif isinstance(setting, (list, tuple)):
        for entry in setting:
            _check_numbers(option, entry)
    elif not _is_number(setting):
        raise ValueError(
            f"{option}: got {setting!r}, expected a number, a tensor or FromMeta, a dict of these "
            "by parameter, or a list by step"
        )


def _check_tuples(option: str, setting: Any) -> None:
    """Raise ValueError unless a setting has a tuple of two where torch does, and only there."""
    for value in values_in(setting):
        is_pair = isinstance(value, tuple) and len(value) == 2
        if option in PAIRS and not (is_pair or isinstance(value, (Tensor, FromMeta))):
            raise ValueError(
                f"{option}: got {setting!r}, expected a tuple of two numbers, a dict of these "
                "by parameter, or a list of these by step"
            )
        if option not in PAIRS and isinstance(value, tuple):
            raise ValueError(
                f"{option}: got {setting!r}, expected a number, a dict of numbers by parameter, or "
                "a list of numbers by step"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Number, Tensor, FromMeta))


def align_tasks(per_task: Tensor, p: Tensor) -> Tensor:
    """`[tasks]` with as many axes as a parameter, so that both broadcast.

    Example:
        >>> align_tasks(torch.ones(3), torch.zeros(3, 5, 2)).shape
        torch.Size([3, 1, 1])
    """
    return per_task.reshape(-1, *[1] * (p.dim() - 1))
