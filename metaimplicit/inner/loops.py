"""The inner loops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.inner.differentiable import check_optimizer, run, take_step
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params
from metaimplicit.problem import Number


class _Stepped(InnerLoop):
    """A loop whose every step is one of an optimiser's."""

    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]

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
        return run(
            self.optimizer,
            self.options,
            loss,
            start,
            meta,
            steps=self.steps,
            tol=self.tol,
            differentiated_steps=differentiated_steps,
            keep_iterates=keep_iterates,
            state=state or {},
        )

    def take_step(
        self, params: Params, gradients: Params, state: OptimizerState, meta: Params
    ) -> tuple[Params, OptimizerState]:
        return take_step(self.optimizer, self.options, params, gradients, state, meta)


@dataclass(frozen=True)
class GradientDescent(_Stepped):
    """θ_{t+1} = θ_t − η m_{t+1}, m_{t+1} = μ m_t + ∂f/∂θ(θ_t), m_0 = 0 (torch's SGD).

    Args:
        steps: T ≥ 1.
        lr: η, a float, a tensor, or `FromMeta` (scalar, per tensor, or per element).
        momentum: μ.
        tol: stop a task once ‖∂f/∂θ‖ ≤ tol; None, never.
    """

    steps: int = 5
    lr: Number = 0.1
    momentum: Number = 0.0
    tol: float | None = None

    def __post_init__(self) -> None:
        self.check()
        check_optimizer(torch.optim.SGD, {"lr": self.lr, "momentum": self.momentum})

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:  # type: ignore[override]
        return torch.optim.SGD

    @property
    def options(self) -> dict[str, Any]:  # type: ignore[override]
        return {"lr": self.lr, "momentum": self.momentum}


@dataclass(frozen=True, init=False)
class TorchOptimizer(_Stepped):
    """An optimiser of `torch.optim` as the inner loop, its whole state part of the graph.

    Args:
        optimizer: SGD, Adam, AdamW, Adadelta, Adagrad, Adamax or RMSprop, from `torch.optim`.
        steps: T ≥ 1.
        tol: stop a task once ‖∂f/∂θ‖ ≤ tol; None, never.
        options: the optimiser's own, each a float, a tensor or `FromMeta` (`lr=0.01, betas=(FromMeta("b1"), 0.999)`).

    Raises:
        ValueError: an optimiser or an option that does not agree with `torch.optim`, or is out of range.
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
        for name, value in {
            "optimizer": optimizer,
            "steps": steps,
            "tol": tol,
            "options": options,
        }.items():
            object.__setattr__(self, name, value)
        self.check()
        check_optimizer(optimizer, options)

    @property
    def lr(self) -> Any:
        """The step size given, or None for the optimiser's own default."""
        return self.options.get("lr")

    def updated(self, **changes: Any) -> TorchOptimizer:
        return TorchOptimizer(
            self.optimizer, **({"steps": self.steps, "tol": self.tol} | self.options | changes)
        )
