"""Inner loops that take the steps of an optimiser of `torch.optim`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.inner.differentiable import DifferentiableStep, run_steps
from metaimplicit.inner.rules import RULES
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params
from metaimplicit.problem import Number


class _StepwiseLoop(InnerLoop):
    """A loop that takes the same differentiable step up to T times."""

    @abstractmethod
    def _make_step(self) -> DifferentiableStep:
        """The step, whose construction checks the options."""

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
        return run_steps(
            self._make_step(),
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
    ) -> tuple[Params, OptimizerState]:
        """One step as a pure function; see `InnerLoop.take_step`."""
        return self._make_step().take(params, gradients, state=state, meta=meta)


@dataclass(frozen=True)
class GradientDescent(_StepwiseLoop):
    """θ_{t+1} = θ_t − η m_{t+1} with m_{t+1} = μ m_t + ∂f/∂θ(θ_t) and m_0 = 0 (SGD of torch).

    Args:
        steps: T ≥ 1.
        lr: η, a float, a tensor or `FromMeta` (one number, or one for each tensor or element).
        momentum: μ, likewise.
        tol: A task stops once its ‖∂f/∂θ‖ ≤ tol. If None, every task takes T steps.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> GradientDescent(steps=10, lr=0.5).updated(lr=0.1)
        GradientDescent(steps=10, lr=0.1, momentum=0.0, tol=None)
    """

    steps: int = 5
    lr: Number = 0.1
    momentum: Number = 0.0
    tol: float | None = None

    fixed_point_objection = ""

    def __post_init__(self) -> None:
        self.check()
        self._make_step()

    def _make_step(self) -> DifferentiableStep:
        options = {"lr": self.lr, "momentum": self.momentum}
        return DifferentiableStep(torch.optim.SGD, options)


@dataclass(frozen=True, init=False)
class TorchOptimizer(_StepwiseLoop):
    """An optimiser of `torch.optim` as the inner loop. Gradients pass through its whole state.

    Args:
        optimizer: `torch.optim.SGD`, `Adam`, `AdamW`, `Adadelta`, `Adagrad`, `Adamax`, `ASGD`,
            `RMSprop` or `Rprop`.
        steps: T ≥ 1.
        tol: A task stops once its ‖∂f/∂θ‖ ≤ tol. If None, every task takes T steps.
        options: The options of the optimiser, each a float, a tensor or `FromMeta`, as in
            `lr=0.01, betas=(FromMeta("beta1"), 0.999)`.

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
    options: dict[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer],
        *,
        steps: int = 5,
        tol: float | None = None,
        **options: Any,
    ) -> None:
        # A frozen dataclass allows no plain assignment.
        object.__setattr__(self, "optimizer", optimizer)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "tol", tol)
        object.__setattr__(self, "options", options)
        self.check()
        self._make_step()

    def _make_step(self) -> DifferentiableStep:
        return DifferentiableStep(self.optimizer, self.options)

    @property
    def fixed_point_objection(self) -> str:  # type: ignore[override]
        """Adaptive steps divide by the size of past gradients, which vanish at the fixed point."""
        if issubclass(self.optimizer, torch.optim.SGD):
            return ""
        return f"and the step of {self.optimizer.__name__} is not differentiable at its fixed point"

    @property
    def drift(self) -> str:  # type: ignore[override]
        """Decoupled decay pulls on θ for as long as the step size does not vanish."""
        options = self._make_step().defaults
        decays = bool(options.get("weight_decay", 0.0))
        if issubclass(self.optimizer, torch.optim.AdamW) and decays:
            return f"the decoupled weight decay of {self.optimizer.__name__}"
        return ""

    def decay(self, meta: Params, parameter: str) -> float | Tensor:
        """λ of the penalty that the rule of the optimiser minimises beside the loss."""
        step = self._make_step()
        group = step.defaults | step.resolved_options(meta, parameter)
        strength: float | Tensor = RULES[self.optimizer].decay(group)
        return strength

    @property
    def lr(self) -> Any:
        """The step size that was given. If None, it is the default of the optimiser."""
        return self.options.get("lr")

    def updated(self, **changes: Any) -> TorchOptimizer:
        """A copy of this loop in which `steps`, `tol` or some options have other values.

        Raises:
            ValueError: An option is unknown, or a value is out of range.
        """
        arguments = {"steps": self.steps, "tol": self.tol, **self.options}
        return TorchOptimizer(self.optimizer, **(arguments | changes))
