"""One step with a damped curvature of the whole model, and a damping that learns from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.operators import Curvature, Identity
from metaimplicit.optim.base import SecondOrder
from metaimplicit.optim.checks import check_nonnegative, check_positive, raise_if
from metaimplicit.optim.closure import (
    Closure,
    ReplayedClosure,
    explain_freed_graph,
    explain_torch_errors,
)
from metaimplicit.optim.damping import (
    MeasuredLoss,
    levenberg_marquardt,
    predicted_reduction,
)
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.solvers import CG, Dense, Solver

# Up to here a factorisation is cheaper than the products of CG.
MAX_DENSE_PARAMETERS = 1024
# C at θ, which knows ∇L; L, a detached scalar; and what gives L with more digits.
Linearised = tuple[Curvature, Tensor, Callable[[], MeasuredLoss]]


class Damped(SecondOrder):
    """θ ← θ + δ with δ = −lr (C + λI)⁻¹∇L, where λ follows the rule of Levenberg and Marquardt.

    The model of the loss is m(δ) = L + ∇Lᵀδ + ½ δᵀCδ, without λ. With ρ = (L(θ) − L(θ + δ))/(m(0) −
    m(δ)), λ becomes 4λ if ρ < ¼ and ½λ if ρ > ¾ (Nocedal & Wright 2006, Alg. 4.1). If ρ ≤ 0, the
    step is taken back. L(θ + δ) costs one more evaluation of the closure.

    Args:
        model: The model whose parameters that require grad are moved.
        lr: The length of the step, > 0.
        damping: λ at the start, > 0.
        adapt_damping: Whether λ follows ρ. If False, λ is fixed, may be 0, and every step is taken.
        solver: What solves (C + λI) d = ∇L. If None, `Dense` for up to 1024 parameters, and CG with
            at most 50 products above.
        seed: The seed of random numbers, if the subclass draws some.

    Raises:
        ValueError: A number is out of range, or `solver` is no `Solver`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        damping: float,
        adapt_damping: bool,
        solver: Solver | None,
        seed: int | None = None,
    ) -> None:
        owner = type(self).__name__
        check_positive(owner, lr=lr)
        if adapt_damping:
            check_positive(owner, damping=damping)
        else:
            check_nonnegative(owner, damping=damping)
        if solver is not None and not isinstance(solver, Solver):
            raise ValueError(
                f"{owner} solver: got {solver!r}, expected one of metaimplicit.solvers, or None"
            )
        defaults = {"lr": lr, "damping": damping, "adapt_damping": adapt_damping}
        super().__init__(model, defaults, seed)
        self.solver = solver or self._default_solver()

    def _default_solver(self) -> Solver:
        n = sum(p.numel() for p in self._trainable.values())
        if n <= MAX_DENSE_PARAMETERS:
            return Dense()
        return CG(max_steps=50, tol=1e-3)

    @torch.inference_mode(False)
    @torch.no_grad()
    @explain_torch_errors
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step on one batch.

        Args:
            closure: It calls the model, but not `backward`. A step calls it more than once, so it
                must see the same batch every time.

        Returns:
            The loss before the step, a detached scalar. The gradient of that loss is in `.grad`,
            and ρ is in `ratio` if the damping adapts.

        Raises:
            FloatingPointError: The loss, its gradient or the step is not finite. No parameter was
                changed.
            ValueError: The closure does not return what it should, its result does not depend on
                the model, or the loss is not of the kind that the optimiser needs.
        """
        group = self.param_groups[0]
        closure = self._check_closure(closure)
        evaluate = ReplayedClosure(self._model, closure, self._device)
        with torch.enable_grad(), explain_freed_graph():
            operator, loss, measure = self._linearise(evaluate)
        g = flatten(operator.gradient).detach()
        raise_if(
            ~g.isfinite(), f"{self._owner}: the gradient is not finite; no parameter was changed"
        )
        for name, p in self._trainable.items():
            p.grad = operator.gradient[name].detach().squeeze(0).clone()

        delta = -group["lr"] * self._direction(operator, g, group["damping"])
        raise_if(
            ~delta.isfinite(),
            f"{self._owner}: the step is not finite; no parameter was changed; raise damping",
        )
        change = unflatten(delta, operator.params)
        if not group["adapt_damping"]:
            self._add(change)
            return loss

        predicted = predicted_reduction(operator, g, delta)
        # It holds a graph, which is not needed while the closure is evaluated again.
        del operator
        ratio = self._try_change(change, evaluate, measure(), predicted=predicted)
        group["damping"] = levenberg_marquardt(
            group["damping"],
            ratio,
            decrease=0.5,
            increase=4.0,
            floor=torch.finfo(self._dtype).eps * self.defaults["damping"],
        )
        return loss

    def _try_change(
        self,
        change: Params,
        evaluate: ReplayedClosure,
        loss: MeasuredLoss,
        *,
        predicted: Tensor,
    ) -> float:
        """Make the change, take it back unless the loss falls, and return ρ."""
        before = {name: p.clone() for name, p in self._trainable.items()}
        self._add(change)
        self.ratio = None
        try:
            after = self._loss_of(evaluate())
            self.ratio = loss.ratio(after, predicted, eps=torch.finfo(self._dtype).eps)
        finally:  # The closure may raise at the new parameters.
            if self.ratio is None or not self.ratio > 0:
                for name, p in self._trainable.items():
                    p.copy_(before[name])
        return self.ratio

    def _add(self, change: Params) -> None:
        for name, p in self._trainable.items():
            p.add_(change[name].squeeze(0))

    @abstractmethod
    def _linearise(self, evaluate: ReplayedClosure) -> Linearised:
        """The loss around θ."""

    @abstractmethod
    def _loss_of(self, result: Any) -> MeasuredLoss:
        """L from what the closure returned."""

    def _direction(self, operator: Curvature, g: Tensor, damping: float) -> Tensor:
        """(C + λI)⁻¹ g, `[1, n]`."""
        shifted = operator + Identity(operator, damping)
        return self.solver.solve(shifted, g).value
