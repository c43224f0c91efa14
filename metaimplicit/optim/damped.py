"""One step by a curvature of the whole model, and a damping that learns from it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.operators import GGN, Hessian, Identity
from metaimplicit.optim.base import (
    Closure,
    ReplayedClosure,
    SecondOrder,
    check_numbers,
    levenberg_marquardt,
    raise_if,
    ratio,
)
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.solvers import CG, Dense, Solver

DENSE = 1024  # parameters up to which a factorisation costs less than the products of an iteration
Curvature = Hessian | GGN


class Damped(SecondOrder):
    """θ ← θ + δ, δ = −lr (C + λI)⁻¹∇L, with λ after Levenberg and Marquardt.

    With the model m(δ) = L + ∇Lᵀδ + ½ δᵀCδ, free of λ, and ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), λ becomes 4λ where
    ρ < ¼ and ½λ where ρ > ¾ (the rule of trust regions, Nocedal & Wright 2006, Alg. 4.1); where ρ ≤ 0 the step is
    taken back. L(θ + δ) is one more evaluation of the closure, with the buffers and random numbers of the first.
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
        check_numbers(owner, above=0, lr=lr)
        check_numbers(owner, above=0 if adapt_damping else -1, damping=damping)
        if solver is not None and not isinstance(solver, Solver):
            raise ValueError(
                f"{owner} solver: got {solver!r}, expected one of metaimplicit.solvers, or None"
            )
        super().__init__(
            model, {"lr": lr, "damping": damping, "adapt_damping": adapt_damping}, seed
        )
        n = sum(p.numel() for p in self._own.values())
        self.solver = solver or (Dense() if n <= DENSE else CG(max_steps=50, tol=1e-3))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step, on one batch.

        Args:
            closure: calls the model, and no backward; several times a step, so of the same batch each time.

        Returns:
            The loss before the step, a detached scalar. Its gradient there is left in `.grad`, and ρ in `ratio`.

        Raises:
            FloatingPointError: the loss, its gradient or the step is not finite; no parameter has moved.
        """
        group, evaluate = (
            self.param_groups[0],
            ReplayedClosure(self._model, self._closure(closure), self._device),
        )
        with torch.enable_grad():
            try:
                operator, loss = self._linearise(evaluate)
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                raise ValueError(
                    "closure: it has used its graph up; call no backward() there, step does"
                ) from error
        g = flatten(operator.gradient).detach()
        raise_if(
            ~g.isfinite(), f"{type(self).__name__}: the gradient is not finite; nothing was moved"
        )
        for name, p in self._own.items():
            p.grad = operator.gradient[name].detach().squeeze(0)
        delta = -group["lr"] * self._direction(operator, g, group["damping"])
        raise_if(
            ~delta.isfinite(),
            f"{type(self).__name__}: the step is not finite; nothing was moved; raise damping",
        )
        parts = unflatten(delta, operator.params)
        if not group["adapt_damping"]:
            self._move(parts)
            return loss
        predicted = -((g + 0.5 * operator.matvec(delta)) * delta).sum()
        del operator  # and its graph
        kept = {name: p.clone() for name, p in self._own.items()}
        self._move(parts)
        self.ratio = None
        try:
            self.ratio = ratio(
                torch.stack([loss, self._value(evaluate()), predicted]),
                torch.finfo(self._dtype).eps,
            )
        finally:  # a closure may raise_if the trial point
            if self.ratio is None or not self.ratio > 0:
                for name, p in self._own.items():
                    p.copy_(kept[name])
        floor = torch.finfo(self._dtype).eps * self.defaults["damping"]
        group["damping"] = levenberg_marquardt(
            group["damping"], self.ratio, easier=0.5, harder=4.0, floor=floor
        )
        return loss

    def _move(self, parts: Params) -> None:
        for name, p in self._own.items():
            p.add_(parts[name].squeeze(0))

    @abstractmethod
    def _linearise(self, evaluate: ReplayedClosure) -> tuple[Curvature, Tensor]:
        """C at θ, which knows ∇L, and L."""

    @abstractmethod
    def _value(self, found: Any) -> Tensor:
        """L of what the closure returned."""

    def _direction(self, operator: Curvature, g: Tensor, damping: float) -> Tensor:
        return self.solver.solve(operator + Identity(operator, damping), g).value
