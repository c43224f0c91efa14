"""Newton's method, where the Hessian may be indefinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.operators import Curvature, Hessian, Identity, LinearOperator
from metaimplicit.optim.checks import check_dependence, check_finite, check_scalar
from metaimplicit.optim.closure import ReplayedClosure
from metaimplicit.optim.damped import Damped
from metaimplicit.params import Params
from metaimplicit.solvers import CG, Dense, Solver


class Newton(Damped):
    """θ ← θ − lr H⁻¹∇L with H = ∂²L/∂θ², modified so that the step is one of descent where H is indefinite.

    With `Dense`, the default for n ≤ 1024: H = QΛQᵀ has its eigenvalues replaced by max(|Λ|, λ) (Nocedal & Wright 2006,
    §3.4; with |Λ| saddle points repel, Dauphin et al. 2014), and nothing moves along one that is zero, to working
    precision, with λ. With `CG`, the default above: (H + λI)⁻¹∇L by its iteration from zero, up to the first direction
    of negative curvature (Newton-CG, ibid. Alg. 7.1). Where that is ∇L itself, or what another solver finds does not
    descend: ∇L ‖∇L‖²/|∇Lᵀ(H + λI)∇L|.

    λ follows ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), m the model of second order: 4λ where ρ < ¼, ½λ where ρ > ¾; where
    ρ ≤ 0 the step is taken back.

    Args:
        model: whose parameters that require grad are moved.
        lr: length of the step, > 0.
        damping: λ to start from; it is `param_groups[0]["damping"]`.
        adapt_damping: let λ follow ρ, at one evaluation more for each step; else λ ≥ 0 is fixed and every step is taken, and
            with λ = 0 one solves a convex quadratic.
        solver: None, by the number of parameters.

    Raises:
        ValueError: a number out of range; on a step, a closure that is none of `closure() -> scalar loss`.
    """

    closure_signature = "closure() -> scalar loss, as in step(lambda: loss(model(x), y))"

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        adapt_damping: bool = True,
        solver: Solver | None = None,
    ) -> None:
        super().__init__(model, lr=lr, damping=damping, adapt_damping=adapt_damping, solver=solver)

    def _linearise(self, evaluate: ReplayedClosure) -> tuple[Hessian, Tensor]:
        seen: list[Tensor] = []

        def loss(params: Params) -> Tensor:
            value = self._loss_of(evaluate({name: p.squeeze(0) for name, p in params.items()}))
            check_finite(self._owner, value)
            check_dependence(value, self._trainable, source="closure")
            seen.append(value.detach())
            return value.unsqueeze(0)

        return Hessian(loss, self._task_params()), seen[0]

    def _loss_of(self, result: Any) -> Tensor:
        return check_scalar(result, "closure")

    def _direction(self, operator: Curvature, g: Tensor, damping: float) -> Tensor:
        if isinstance(self.solver, Dense):
            return _modified(self.solver.matrix(operator)[0], g[0], damping).unsqueeze(0)
        shifted = operator + Identity(operator, damping)
        if isinstance(self.solver, CG):
            return _truncated(shifted, g, self.solver.max_steps, self.solver.tol)
        direction = self.solver.solve(shifted, g).value
        return _steepest(g, shifted.matvec(g)) if bool((direction * g).sum() <= 0) else direction


def _modified(matrix: Tensor, g: Tensor, damping: float) -> Tensor:
    """Q max(|Λ|, λ)⁻¹ Qᵀ g."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    size = values.abs().clamp(min=damping)
    kept = size > len(g) * torch.finfo(g.dtype).eps * size.max()
    inverse = torch.where(kept, 1 / torch.where(kept, size, 1.0), 0.0)
    direction: Tensor = vectors @ (inverse * (vectors.mT @ g))
    return direction


def _truncated(operator: LinearOperator, g: Tensor, steps: int, tol: float) -> Tensor:
    """Conjugate gradients on A d = g from zero, up to a direction with pᵀAp ≤ 0: every iterate has dᵀg > 0."""
    d, r, p = torch.zeros_like(g), g, g
    square = first = g.square().sum()
    for step in range(steps):
        if not bool(square > tol**2 * first):
            break
        ap = operator.matvec(p)
        curvature = (p * ap).sum()
        if not bool(curvature > 0):
            return d if step else _steepest(g, ap)
        d, r = d + square / curvature * p, r - square / curvature * ap
        before, square = square, r.square().sum()
        p = r + square / before * p
    return d


def _steepest(g: Tensor, ag: Tensor) -> Tensor:
    """g ‖g‖²/|gᵀAg|, the step of the curvature along g, whatever its sign."""
    square = g.square().sum()
    step: Tensor = torch.where(square > 0, square / (g * ag).sum().abs(), 0.0) * g
    return step
