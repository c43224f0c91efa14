"""What an inner loop is: a point and a loss in, the iterates of an optimiser out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from metaimplicit.iterate import Iterate, OptimizerState
from metaimplicit.params import Params
from metaimplicit.problem import FromMeta

StepLoss = Callable[[Params, int], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """Where an inner loop went.

    Attributes:
        params: θ_T, `{name: [tasks, *shape]}`.
        steps: `[tasks]`, the steps each task took.
        gradient_norm: `[tasks]`, ‖∂f/∂θ‖ at the last iterate at which it was computed, θ_{T−1}.
        iterates: θ_0 … θ_T if asked for.
        state: the optimiser's after the last step.
    """

    params: Params
    steps: Tensor
    gradient_norm: Tensor
    iterates: tuple[Params, ...] = ()
    state: OptimizerState = field(default_factory=dict)

    @property
    def end(self) -> Iterate:
        """(θ_T, the optimiser's state), without a graph."""
        return Iterate(self.params, self.state).detach()


class InnerLoop(ABC):
    """θ₀ → θ_T. Leaves are frozen dataclasses with a field `steps`, the cap T ≥ 1."""

    steps: int
    tol: float | None = None
    differentiable: ClassVar[bool] = True  # its steps; else it is for implicit methods

    @abstractmethod
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
        """Run the loop.

        Args:
            loss: `(params, t) -> [tasks]`, the inner loss that step t sees.
            start: θ₀, `{name: [tasks, *shape]}`.
            meta: where `FromMeta` numbers are read.
            differentiated_steps: the last `differentiated_steps` steps leave their graph; the T − differentiated_steps before them pass gradients to `start` as
                the identity and to nothing else.
            keep_iterates: hand back all iterates.
            state: the optimiser's, from an earlier run; None, a fresh one.
        """

    def take_step(
        self, params: Params, gradients: Params, state: OptimizerState, meta: Params
    ) -> tuple[Params, OptimizerState]:
        """One step s_t = Φ(s_{t−1}, φ) as a pure function; parameters without a gradient stay.

        Raises:
            ValueError: a loop whose steps are no such function (a line search).
        """
        raise ValueError(
            f"inner: got {type(self).__name__}, whose steps are not differentiable; use GradientDescent"
        )

    def updated(self, **changes: Any) -> InnerLoop:
        """The same loop with some of its numbers changed."""
        return replace(self, **changes)  # type: ignore[type-var]

    def reads(self, key: str) -> bool:
        """Whether a number of this loop is read from the meta-parameter `key`."""
        return any(
            isinstance(number, FromMeta) and number.reads(key) for _, number in self._numbers()
        )

    def check(self) -> None:
        """Raise ValueError for a cap or a tolerance out of range."""
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1 inner step")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol: got {self.tol}, expected a gradient norm > 0, or None")

    def check_captured(self) -> None:
        """Raise ValueError for a number that requires grad but is no part of `meta`: its gradient would be lost."""
        for name, number in self._numbers():
            if isinstance(number, Tensor) and number.requires_grad:
                raise ValueError(
                    f"{name}: got a tensor that requires grad, expected FromMeta({name!r}) and meta[{name!r}]"
                )

    def _numbers(self) -> Iterator[tuple[str, Any]]:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            for name, parts in value.items() if isinstance(value, dict) else [(f.name, value)]:
                for part in parts if isinstance(parts, tuple) else (parts,):
                    yield name, part


def straight_through(params: Params, start: Params) -> Params:
    """θ with the gradient of θ₀: the steps between them pulled back as the identity."""
    return {
        name: p.detach() + (start[name] - start[name].detach())
        if start[name].requires_grad
        else p.detach()
        for name, p in params.items()
    }
