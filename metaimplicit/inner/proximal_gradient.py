"""Proximal gradient steps, for a smooth loss with a regulariser that is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory, straight_through
from metaimplicit.inner.regularizers import Regularizer
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.problem import Number, resolve


@dataclass(frozen=True)
class ProximalGradient(InnerLoop):
    """θ_{t+1} = prox_{ηR}(θ_t − η ∂f/∂θ(θ_t)), for min_θ f(θ) + R(θ).

    With `accelerated`, the gradient step starts from an extrapolated point (FISTA, Beck & Teboulle
    2009); without, it is ISTA. Where θ* is sparse or on the border of a constraint, ∂f/∂θ(θ*) ≠ 0.
    So take `"fixed-point"`, `"unrolled"` or `"forward"` as the method: an implicit method would
    leave R out, and is refused.

    Args:
        regularizer: R, for every parameter, or `{name: R}`. Parameters without one take plain
            gradient steps.
        steps: T ≥ 1.
        lr: η, below 2/λ_max of the Hessian of f for ISTA, and below 1/λ_max for FISTA.
        accelerated: Whether to extrapolate.

    Raises:
        ValueError: A number is out of range.

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
    lr: Number = 0.1
    accelerated: bool = False
    tol: float | None = field(default=None, init=False, repr=False)

    fixed_point_objection = ""
    implicit_objection = "whose end is no stationary point of the inner loss alone"

    def __post_init__(self) -> None:
        self.check()
        if isinstance(self.lr, (int, float)) and not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected a step size > 0")

    def take_step(
        self,
        params: Params,
        gradients: Params,
        state: OptimizerState,
        meta: Params,
        step: int | None = None,
    ) -> tuple[Params, OptimizerState]:
        """One step as a pure function; see `InnerLoop.take_step`.

        If accelerated, `params` are the extrapolated point, and the state holds the solution.
        """
        new_params = dict(params)
        new_state = dict(state)
        for name, gradient in gradients.items():
            x = self._proximal_step(name, params[name], gradient, meta)
            new_params[name] = x
            if self.accelerated:
                # y_{t+1} = x_{t+1} + (k_t − 1)/k_{t+1} (x_{t+1} − x_t)
                slots = state.get(name, {})
                k = slots.get("k", 1.0)
                k_next = (1 + math.sqrt(1 + 4 * k * k)) / 2
                moved = x - slots.get("solution", x)
                new_params[name] = x + (k - 1) / k_next * moved
                new_state[name] = {"solution": x, "k": k_next}
        return new_params, new_state

    def _proximal_step(self, name: str, p: Tensor, gradient: Tensor, meta: Params) -> Tensor:
        lr = resolve(self.lr, meta, name)
        x: Tensor = p - lr * gradient
        regularizer = self.regularizer
        if isinstance(regularizer, dict):
            if name not in regularizer:
                return x
            regularizer = regularizer[name]
        numbers = {
            key: resolve(number, meta, name) for key, number in regularizer.numbers().items()
        }
        return regularizer.prox(x, lr, numbers)

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
        params = start
        state = state or {}
        first_differentiated = self.steps - differentiated_steps
        iterates = [start] if keep_iterates else []
        constants = {name: m.detach() for name, m in meta.items()}
        gradients: Params = {}
        for t in range(self.steps):
            differentiated = t >= first_differentiated
            if t == first_differentiated and t > 0:
                params = straight_through(params, start)
            point = _variables(params) if differentiated else leaves(params)
            total = loss(point, t).sum()
            gradients = _gradients(total, point, create_graph=differentiated)
            params, state = self.take_step(
                point, gradients, state, meta if differentiated else constants
            )
            if not differentiated:
                params = {name: p.detach() for name, p in params.items()}
                state = _detached(state)
            if keep_iterates:
                iterates.append(self._solution(params, state))
        if differentiated_steps == 0:
            params = straight_through(params, start)
        first = next(iter(start.values()))
        taken = torch.full((len(first),), self.steps, device=first.device)
        norm = flatten({name: g.detach() for name, g in gradients.items()}).norm(dim=-1)
        solution = self._solution(params, state)
        return Trajectory(solution, taken, norm, iterates=tuple(iterates), state=state)

    def _numbers(self) -> Iterator[tuple[str, Any]]:
        yield "lr", self.lr
        regularizer = self.regularizer
        chosen = regularizer.values() if isinstance(regularizer, dict) else [regularizer]
        for each in chosen:
            yield from each.numbers().items()

    def _solution(self, params: Params, state: OptimizerState) -> Params:
        """The iterates without extrapolation."""
        return {name: state.get(name, {}).get("solution", p) for name, p in params.items()}


def _variables(params: Params) -> Params:
    """The same tensors; those that do not require grad are replaced by leaves that do."""
    return {
        name: p if p.requires_grad else p.detach().requires_grad_() for name, p in params.items()
    }


def _gradients(total: Tensor, params: Params, *, create_graph: bool) -> Params:
    """∂total/∂θ, without the parameters that the loss does not read."""
    if not total.requires_grad:
        return {}
    gradients = torch.autograd.grad(
        total, list(params.values()), create_graph=create_graph, allow_unused=True
    )
    pairs = zip(params, gradients, strict=True)
    return {name: g for name, g in pairs if g is not None}


def _detached(state: OptimizerState) -> OptimizerState:
    return {
        name: {key: x.detach() if isinstance(x, Tensor) else x for key, x in slots.items()}
        for name, slots in state.items()
    }
