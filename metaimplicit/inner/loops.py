"""Inner loops that take the steps of an optimiser of `torch.optim`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.inner.differentiable import run_steps
from metaimplicit.inner.optimizers import RULES
from metaimplicit.inner.settings import (
    VARYING_NUMBERS,
    Setting,
    at_step,
    check_lengths,
    check_shapes,
    lists_in,
    numbers_in,
)
from metaimplicit.inner.step import DifferentiableStep
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params
from metaimplicit.problem import FromMeta, Number


class _StepwiseLoop(InnerLoop):
    """A loop that takes the same differentiable step up to T times."""

    replay_objection = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        has_own_step = cls.take_step is not _StepwiseLoop.take_step
        if has_own_step and cls.run is _StepwiseLoop.run:
            warnings.warn(
                f"{cls.__name__}: it defines take_step, which the run that it inherits does not "
                "call, so that methods differ; define run, too, or derive it from InnerLoop",
                RuntimeWarning,
                stacklevel=2,
            )

    @abstractmethod
    def _make_step(self) -> DifferentiableStep:
        """The step, whose construction checks the options."""

    @cached_property
    def _step(self) -> DifferentiableStep:
        return self._make_step()

    def run(
        self,
        loss: StepLoss,
        start: Params,
        meta: Params,
        *,
        differentiated_steps: int,
        keep_iterates: bool = False,
        state: OptimizerState | None = None,
    ) -> Trajectory:
        """Run the loop; see `InnerLoop.run`."""
        self.check_at(start, meta)
        return run_steps(
            self._step,
            loss,
            start,
            meta=meta,
            state=state or {},
            steps=self.steps,
            tol=self.tol,
            differentiated_steps=differentiated_steps,
            keep_iterates=keep_iterates,
        )

    def take_step(
        self,
        params: Params,
        gradients: Params,
        state: OptimizerState,
        meta: Params,
        step: int | None = None,
    ) -> tuple[Params, OptimizerState]:
        """One step as a pure function; see `InnerLoop.take_step`."""
        return self._step.take(
            params,
            gradients,
            state=state,
            meta=meta,
            step=step,
        )

    @property
    def optimizer_name(self) -> str:  # type: ignore[override]
        """The name of the class in `torch.optim`."""
        return self._step.optimizer.__name__

    def initial_slots(self, names: Iterable[str], meta: Params) -> OptimizerState:
        """The slots that are not 0 at the start; see `InnerLoop.initial_slots`."""
        return self._step.initial_slots(names, meta)

    def check_at(self, params: Params, meta: Params) -> None:
        """Raise ValueError if an option has another shape than a parameter."""
        for option, setting in self._step.options.items():
            check_shapes(setting, params, meta, option=option)

    @property
    def compile_objection(self) -> str:
        """Whether the numbers of its steps differ."""
        return VARYING_NUMBERS if self._lists() else ""

    def learns_before(self, step: int) -> bool:
        """Whether some number that only steps before `step` use is read from φ."""
        early = [number for numbers in self._lists() for number in numbers_in(numbers[:step])]
        return any(isinstance(number, FromMeta) for number in early)

    def _check_steps(self) -> None:
        """Check the options, and that every list of numbers has one for each step."""
        self.check()
        _ = self._step
        check_lengths(self._lists(), self.steps)

    def _lists(self) -> list[list[Any]]:
        options = self._step.options.values()
        return [numbers for setting in options for numbers in lists_in(setting)]


@dataclass(frozen=True)
class GradientDescent(_StepwiseLoop):
    """θ_{t+1} = θ_t − η m_{t+1} with m_{t+1} = μ m_t + ∂f/∂θ(θ_t) and m_0 = 0 (SGD of torch).

    Args:
        steps: T ≥ 1.
        lr: η, a float, a tensor or `FromMeta` (one number, or one for each tensor or element). A
            dict gives each parameter its own: its keys are names of parameters or modules, or glob
            patterns, of which the first that fits counts. A list gives each step its own.
        momentum: μ, likewise.
        tol: A task stops once its ‖∂f/∂θ‖ ≤ tol. If None, every task takes T steps.
        max_grad_norm: The gradient of a task is scaled down to this norm if it is larger, as by
            `torch.nn.utils.clip_grad_norm_`. If None, it is not clipped.

    Raises:
        ValueError: A number is out of range, or there are fewer of them than steps.

    Example:
        >>> GradientDescent(steps=10, lr=0.5).updated(lr=0.1).lr
        0.1
        >>> GradientDescent(steps=2, lr={"head": [0.1, 0.01], "*": 0.5}).lr["*"]
        0.5
    """

    steps: int = 5
    lr: Setting = 0.1
    momentum: Setting = 0.0
    tol: float | None = None
    max_grad_norm: Number | None = None

    fixed_point_objection = ""

    def __post_init__(self) -> None:
        self._check_steps()

    def _make_step(self) -> DifferentiableStep:
        options = {"lr": self.lr, "momentum": self.momentum}
        return DifferentiableStep(torch.optim.SGD, options, self.max_grad_norm)


def _may_be_used(setting: Any) -> bool:
    """Whether a setting has a number that is not zero, or is known at run time only."""
    return any(not isinstance(x, (int, float)) or x != 0 for x in numbers_in(setting))


@dataclass(frozen=True, init=False)
class TorchOptimizer(_StepwiseLoop):
    """An optimiser of `torch.optim` as the inner loop. Gradients pass through its whole state.

    Args:
        optimizer: `torch.optim.SGD`, `Adam`, `AdamW`, `NAdam`, `RAdam`, `Adadelta`, `Adagrad`,
            `Adamax`, `ASGD`, `RMSprop` or `Rprop`, or `metaimplicit.inner.SGDW`.
        steps: T ≥ 1.
        tol: A task stops once its ‖∂f/∂θ‖ ≤ tol. If None, every task takes T steps.
        max_grad_norm: The gradient of a task is scaled down to this norm if it is larger, as by
            `torch.nn.utils.clip_grad_norm_`. If None, it is not clipped.
        options: The options of the optimiser, each a float, a tensor or `FromMeta`, as in
            `lr=0.01, betas=(FromMeta("beta1"), 0.999)`. A dict gives each parameter its own, and a
            list each step, as for `GradientDescent`.

    Raises:
        ValueError: The optimiser or an option is not known to agree with `torch.optim`, or a number
            is out of range.

    Example:
        >>> loop = TorchOptimizer(torch.optim.Adam, steps=3, lr=0.01)
        >>> loop.updated(steps=5).options
        {'lr': 0.01}
    """

    optimizer: type[torch.optim.Optimizer]
    steps: int
    tol: float | None
    max_grad_norm: Number | None
    options: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer],
        *,
        steps: int = 5,
        tol: float | None = None,
        max_grad_norm: Number | None = None,
        **options: Any,
    ) -> None:
        # A frozen dataclass allows no plain assignment.
        object.__setattr__(self, "optimizer", optimizer)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "tol", tol)
        object.__setattr__(self, "max_grad_norm", max_grad_norm)
        object.__setattr__(self, "options", options)
        self._check_steps()

    def _make_step(self) -> DifferentiableStep:
        return DifferentiableStep(self.optimizer, self.options, self.max_grad_norm)

    @property
    def fixed_point_objection(self) -> str:  # type: ignore[override]
        """Adaptive steps divide by the size of past gradients, which vanish at the fixed point."""
        if issubclass(self.optimizer, torch.optim.SGD):
            return ""
        return f"and the step of {self.optimizer.__name__} is not differentiable at its fixed point"

    @property
    def drift(self) -> str:  # type: ignore[override]
        """Decoupled decay pulls on θ for as long as the step size does not vanish.

        So does a decay that is added after clipping, where the gradient is clipped.
        """
        options = self._step.defaults | self.options
        keys = ("weight_decay", "lambd", "decoupled_weight_decay")
        decays = [options.get(key, 0.0) for key in keys]
        if not any(_may_be_used(decay) for decay in decays):
            return ""

        # As a flag, not a number, the option says that the decay is decoupled.
        flags = numbers_in(options.get("decoupled_weight_decay"))
        is_adamw = issubclass(self.optimizer, torch.optim.AdamW)
        if _may_be_used(options.get("weight_decay", 0.0)) and (is_adamw or True in flags):
            return f"the decoupled weight decay of {self.optimizer.__name__}"
        if self.max_grad_norm is not None:
            return f"max_grad_norm, which does not clip the decay of {self.optimizer.__name__},"
        return ""

    def decay(self, meta: Params, parameter: str) -> float | Tensor:
        """λ of the penalty that the rule of the optimiser minimises, at its last step."""
        options = at_step(self._step.options_of(parameter, meta), self.steps - 1)
        strength: float | Tensor = RULES[self.optimizer].decay(options)
        return strength

    @property
    def lr(self) -> Any:
        """The step size that was given. If None, it is the default of the optimiser."""
        return self.options.get("lr")

    def updated(self, **changes: Any) -> TorchOptimizer:
        """A copy of this loop in which some fields or options have other values.

        Raises:
            ValueError: An option is unknown, or a value is out of range.
        """
        fields = {"steps": self.steps, "tol": self.tol, "max_grad_norm": self.max_grad_norm}
        return TorchOptimizer(self.optimizer, **{**fields, **self.options, **changes})
