"""Proximal gradient steps, for a smooth loss with a regulariser that is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import as_variable
from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory, straight_through
from metaimplicit.inner.regularizers import Regularizer
from metaimplicit.inner.settings import (
    VARYING_NUMBERS,
    Setting,
    at_step,
    check_lengths,
    check_shapes,
    fits,
    lists_in,
    numbers_in,
    resolve_setting,
)
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.problem import FromMeta, resolve


@dataclass(frozen=True)
class ProximalGradient(InnerLoop):
    """θ_{t+1} = prox_{ηR}(θ_t − η ∂f/∂θ(θ_t)), for min_θ f(θ) + R(θ).

    With `accelerated`, the gradient step starts from an extrapolated point (FISTA, Beck & Teboulle
    2009); without, it is ISTA. Where θ* is sparse or on the border of a constraint, ∂f/∂θ(θ*) ≠ 0.
    So take `"fixed-point"`, `"unrolled"` or `"forward"` as the method: an implicit method would
    leave R out, and is refused.

    Args:
        regularizer: R, for every parameter, or a dict of them. Its keys are names of parameters or
            modules, or glob patterns. The name of a parameter counts first, then the first key that
            fits. Parameters without one take plain gradient steps.
        steps: T ≥ 1.
        lr: η, below 2/λ_max of the Hessian of f for ISTA, and below 1/λ_max for FISTA: a number, a
            dict by parameter, or a list by step, as for `GradientDescent`.
        accelerated: Whether to extrapolate.

    Raises:
        ValueError: A number is out of range, a regularizer is none, or there are fewer step sizes
            than steps. On running: a key of the dict fits no parameter.

    Example:
        The lasso min_w ½(w − 3)² + |w| has w* = 2.

        >>> from metaimplicit.inner import L1Norm
        >>> loop = ProximalGradient(L1Norm(1.0), steps=50, lr=0.5)
        >>> def loss(params, t):
        ...     return 0.5 * (params["w"] - 3).square().sum(1)
        >>> loop.run(loss, {"w": torch.zeros(1, 1)}, {}, differentiated_steps=0).params["w"]
        tensor([[2.]])
    """

    regularizer: Regularizer | dict[str, Regularizer]
    steps: int = 100
    lr: Setting = 0.1
    accelerated: bool = False
    tol: float | None = field(default=None, init=False, repr=False)

    fixed_point_objection = ""
    optimizer_name = "ProximalGradient"
    implicit_objection = "whose end is no stationary point of the inner loss alone"

    def __post_init__(self) -> None:
        self.check()
        for regularizer in self._regularizers():
            # A class of the same behaviour is as good.
            if not all(hasattr(regularizer, method) for method in ("prox", "numbers")):
                raise ValueError(
                    f"regularizer: got {regularizer!r}, expected a `Regularizer`, such as "
                    "L1Norm(0.1), or a dict of them by parameter; a sum needs one with its own prox"
                )
        for lr in numbers_in(self.lr):
            if isinstance(lr, (int, float)) and not lr > 0:
                raise ValueError(f"lr: got {self.lr}, expected a step size > 0")
        check_lengths(lists_in(self.lr), self.steps)

    @property
    def replay_objection(self) -> str:  # type: ignore[override]
        """An accelerated step takes its gradient at another point than its iterate."""
        return "whose steps are accelerated" if self.accelerated else ""

    @property
    def compile_objection(self) -> str:
        """Whether its steps are accelerated, or their sizes differ."""
        return self.replay_objection or (VARYING_NUMBERS if list(lists_in(self.lr)) else "")

    def gradient_point(self, params: Params, state: OptimizerState) -> Params:
        """y_t = x_t + d_t, where x_t are the iterates and d_t the momentum of an accelerated loop.

        See `InnerLoop.gradient_point`.
        """
        moved = {name: params[name] + d for name, d in self._momenta(state).items()}
        return {**params, **moved}

    def take_step(
        self,
        params: Params,
        gradients: Params,
        state: OptimizerState,
        meta: Params,
        step: int | None = None,
    ) -> tuple[Params, OptimizerState]:
        """One step as a pure function; see `InnerLoop.take_step`."""
        momenta = self._momenta(state)
        # A parameter that the loss does not read stays at x_t = y_t − d_t.
        new_params = params | {name: params[name] - d for name, d in momenta.items()}
        new_state = dict(state)
        for name, gradient in gradients.items():
            y = params[name]
            x = self._proximal_step(name, y, gradient, meta, step)
            new_params[name] = x
            if self.accelerated:
                # d_{t+1} = (k_t − 1)/k_{t+1} (x_{t+1} − x_t), with x_t = y_t − d_t
                k = state.get(name, {}).get("k", 1.0)
                k_next = (1 + math.sqrt(1 + 4 * k * k)) / 2
                moved = x - y + momenta.get(name, 0.0)
                new_state[name] = {"momentum": (k - 1) / k_next * moved, "k": k_next}
        return new_params, new_state

    def learns_before(self, step: int) -> bool:
        """Whether some step size that only steps before `step` use is read from φ."""
        early = [number for numbers in lists_in(self.lr) for number in numbers_in(numbers[:step])]
        return any(isinstance(number, FromMeta) for number in early)

    def check_at(self, params: Params, meta: Params) -> None:
        """Raise ValueError if a key fits no parameter, or a number of φ is out of range.

        So it does if a step size has another shape than a parameter.
        """
        check_shapes(self.lr, params, meta, option="lr")
        if isinstance(self.regularizer, dict):
            unused = [
                key for key in self.regularizer if not any(fits(key, name) for name in params)
            ]
            if unused:
                raise ValueError(
                    f"regularizer: got the keys {unused}, which fit no parameter; expected names "
                    f"of parameters or modules, or patterns, that fit some of {list(params)}"
                )
        for name in params:
            regularizer = self._regularizer_of(name)
            if isinstance(regularizer, Regularizer):
                regularizer.check(_values(regularizer, meta, name))

    def _proximal_step(
        self, name: str, p: Tensor, gradient: Tensor, meta: Params, step: int | None
    ) -> Tensor:
        setting = {"lr": resolve_setting(self.lr, meta, name, option="lr")}
        lr = at_step(setting, step)["lr"]
        x: Tensor = p - lr * gradient
        regularizer = self._regularizer_of(name)
        if regularizer is None:
            return x
        numbers = _values(regularizer, meta, name)
        _check_rows(regularizer, {"lr": lr, **numbers}, name)
        # The only axis of a scalar is that of the tasks, and no operator may sum over it.
        is_scalar = x.dim() == 1
        end = regularizer.prox(x.unsqueeze(-1) if is_scalar else x, lr, numbers)
        end = end.squeeze(-1) if is_scalar else end
        if end.shape != p.shape:
            raise ValueError(
                f"regularizer: {type(regularizer).__name__} takes the parameter {name!r} from "
                f"{tuple(p.shape)} to {tuple(end.shape)}, axis of the tasks first, expected the "
                "same shape; give its numbers a shape that broadcasts against the parameter"
            )
        return end

    def _regularizer_of(self, parameter: str) -> Regularizer | None:
        if not isinstance(self.regularizer, dict):
            return self.regularizer
        if parameter in self.regularizer:
            return self.regularizer[parameter]
        fitting = (r for key, r in self.regularizer.items() if fits(key, parameter))
        return next(fitting, None)

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
        params = start
        state = state or {}
        first_differentiated = self.steps - differentiated_steps
        iterates = [start] if keep_iterates else []
        constants = {name: m.detach() for name, m in meta.items()}
        gradients: Params = {}
        for t in range(self.steps):
            differentiated = t >= first_differentiated
            if t == first_differentiated and t > 0:
                # The identity from x_0 to x_t is one to y_t = x_t + d_t as well.
                params = straight_through(params, start)
            point = self.gradient_point(params, state)
            point = _variables(point) if differentiated else leaves(point)
            total = loss(point, t).sum()
            gradients = _gradients(total, point, create_graph=differentiated)
            params, state = self.take_step(
                point,
                gradients,
                state,
                meta if differentiated else constants,
                step=t,
            )
            if not differentiated:
                params = {name: p.detach() for name, p in params.items()}
                state = _detached(state)
            if keep_iterates:
                iterates.append(params)
        if differentiated_steps == 0:
            params = straight_through(params, start)
        first = next(iter(start.values()))
        taken = torch.full((len(first),), self.steps, device=first.device)
        norm = flatten({name: g.detach() for name, g in gradients.items()}).norm(dim=-1)
        return Trajectory(
            params,
            taken,
            norm,
            iterates=tuple(iterates),
            state=state,
        )

    def _numbers(self) -> Iterator[tuple[str, Any]]:
        for number in numbers_in(self.lr):
            yield "lr", number
        for regularizer in self._regularizers():
            yield from regularizer.numbers().items()

    def _regularizers(self) -> list[Regularizer]:
        given = self.regularizer
        return list(given.values()) if isinstance(given, dict) else [given]

    def _momenta(self, state: OptimizerState) -> Params:
        """d_t of the parameters that have one."""
        if not self.accelerated:
            return {}
        return {name: slots["momentum"] for name, slots in state.items() if "momentum" in slots}


def _check_rows(regularizer: Regularizer, numbers: dict[str, Any], parameter: str) -> None:
    """Raise ValueError if numbers differ within a row that the operator takes as a whole."""
    # A class of the same behaviour may lack the attribute.
    if getattr(regularizer, "separable", True):
        return
    for key, x in numbers.items():
        if isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] != 1:
            raise ValueError(
                f"{key}: got a tensor {tuple(x.shape)} for the parameter {parameter!r}, expected "
                f"one number, or one for each row, [..., 1], because the operator of "
                f"{type(regularizer).__name__} takes a row as a whole"
            )


def _values(regularizer: Regularizer, meta: Params, parameter: str) -> dict[str, Any]:
    """The numbers of a regulariser for one parameter."""
    return {key: resolve(x, meta, parameter) for key, x in regularizer.numbers().items()}


def _variables(params: Params) -> Params:
    """The same tensors; those that do not require grad are replaced by variables that do."""
    return {name: as_variable(p) for name, p in params.items()}


def _gradients(total: Tensor, params: Params, *, create_graph: bool) -> Params:
    """∂total/∂θ, without the parameters that the loss does not read."""
    if not total.requires_grad:
        return {}
    gradients = torch.autograd.grad(
        total,
        list(params.values()),
        create_graph=create_graph,
        allow_unused=True,
    )
    pairs = zip(params, gradients, strict=True)
    return {name: g for name, g in pairs if g is not None}


def _detached(state: OptimizerState) -> OptimizerState:
    return {
        name: {key: x.detach() if isinstance(x, Tensor) else x for key, x in slots.items()}
        for name, slots in state.items()
    }
