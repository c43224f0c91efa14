"""Newton's method for functions whose Hessian may be indefinite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.operators import Curvature, Hessian, Identity, LinearOperator
from metaimplicit.optim.checks import check_dependence, check_finite, check_scalar
from metaimplicit.optim.closure import ReplayedClosure
from metaimplicit.optim.damped import Damped, Linearised
from metaimplicit.optim.damping import MeasuredLoss
from metaimplicit.params import Params
from metaimplicit.solvers import CG, Dense, Solver
from metaimplicit.solvers.arithmetic import dot, norm, reciprocal
from metaimplicit.solvers.trust_region import truncated_cg


class Newton(Damped):
    """θ ← θ − lr H⁻¹∇L with H = ∂²L/∂θ², modified to descend where H is indefinite.

    - With `Dense`, the default for n ≤ 1024, H = QΛQᵀ has its eigenvalues replaced by max(|Λ|, λ)
      (Nocedal & Wright 2006, §3.4). With |Λ|, saddle points repel (Dauphin et al. 2014). Nothing
      moves along an eigenvector whose eigenvalue, with λ, is zero to working precision.
    - With `CG`, the default above, the step is (H + λI)⁻¹∇L by its iteration from zero, up to the
      first direction of negative curvature (Newton-CG, ibid. Alg. 7.1).
    - With another solver, the step is what it finds for (H + λI)⁻¹∇L, if that descends.

    Where ∇L itself has negative curvature, or the step does not descend, it is
    ∇L ‖∇L‖²/|∇Lᵀ(H + λI)∇L|.

    λ follows ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), where m is the model of second order: it becomes
    4λ if ρ < ¼ and λ/2 if ρ > ¾. If ρ ≤ 0, the step is taken back.

    Args:
        model: The model, whose parameters that require grad are moved.
        lr: The length of the step, > 0.
        damping: λ at the start, > 0 (≥ 0 without `adapt_damping`). Its present value is
            `param_groups[0]["damping"]`.
        adapt_damping: Whether λ follows ρ, which costs one evaluation more for each step. If False,
            λ is fixed, every step is taken, and with λ = 0 one step solves a convex quadratic.
        solver: How the system is solved. If None, the number of parameters decides.

    Raises:
        ValueError: A number is out of range. On a step: the closure is not
            `closure() -> scalar loss`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = Newton(model, damping=0.0, adapt_damping=False)
        >>> loss = optimizer.step(lambda: (model.weight - 3.0).square().sum())
        >>> round(model.weight.item(), 4)
        3.0
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
        super().__init__(
            model,
            lr=lr,
            damping=damping,
            adapt_damping=adapt_damping,
            solver=solver,
        )

    def _linearise(self, evaluate: ReplayedClosure) -> Linearised:
        seen: list[Tensor] = []

        def loss(params: Params) -> Tensor:
            result = evaluate({name: p.squeeze(0) for name, p in params.items()})
            value = check_scalar(result, "closure")
            check_finite(self._owner, value)
            check_dependence(value, self._trainable, source="closure")
            seen.append(value.detach())
            return value.unsqueeze(0)

        hessian = Hessian(loss, self._task_params())
        return hessian, seen[0], lambda: MeasuredLoss.of_scalar(seen[0])

    def _loss_of(self, result: Any) -> MeasuredLoss:
        return MeasuredLoss.of_scalar(check_scalar(result, "closure"))

    def _direction(
        self,
        operator: Curvature,
        g: Tensor,
        damping: float,
    ) -> Tensor:
        if isinstance(self.solver, Dense):
            matrix = self.solver.matrix(operator)[0]
            return _modified_newton(matrix, g[0], damping).unsqueeze(0)
        shifted = operator + Identity(operator, damping)
        if isinstance(self.solver, CG):
            return _truncated_newton(shifted, g, self.solver)
        direction = self.solver.solve(shifted, g).value
        if bool(dot(direction, g) <= 0):
            return _cauchy_step(g, curvature=dot(g, shifted.matvec(g)))
        return direction


def _modified_newton(
    matrix: Tensor,
    g: Tensor,
    damping: float,
) -> Tensor:
    """The direction Q max(|Λ|, λ)⁻¹ Qᵀg for H = QΛQᵀ, `[n]`. Zero eigenvalues move nothing."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    size = values.abs().clamp(min=damping)
    nonzero = size > len(g) * torch.finfo(g.dtype).eps * size.max()
    direction: Tensor = vectors @ (reciprocal(size, where=nonzero) * (vectors.mT @ g))
    return direction


def _truncated_newton(
    operator: LinearOperator,
    g: Tensor,
    solver: CG,
) -> Tensor:
    """A⁻¹g by conjugate gradients from zero, up to the first direction of negative curvature."""
    tol = solver.tol * norm(g)
    result = truncated_cg(operator.matvec, g, tol=tol, max_steps=solver.max_steps)
    first_is_negative = ~result.step.any() & ~(result.curvature > 0)
    if bool(first_is_negative):
        return _cauchy_step(g, result.curvature)
    return result.step


def _cauchy_step(g: Tensor, curvature: Tensor) -> Tensor:
    """The step g ‖g‖²/|gᵀAg|, given the curvature gᵀAg. It descends for either sign of that."""
    square = dot(g, g)
    return torch.where(square > 0, square / curvature.abs(), 0.0) * g
