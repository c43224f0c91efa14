"""Newton's method as an inner loop: steps by conjugate gradients in a trust region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.inner.base import (
    InnerLoop,
    StepLoss,
    Trajectory,
    straight_through,
)
from metaimplicit.iterate import OptimizerState
from metaimplicit.operators import Hessian
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.solvers.arithmetic import norm
from metaimplicit.solvers.iteration import all_ended
from metaimplicit.solvers.trust_region import (
    TruncatedStep,
    reduction_ratio,
    truncated_cg,
)

ACCEPT = 1e-4  # a step is taken if its ratio of reductions exceeds this


@dataclass(frozen=True)
class NewtonCG(InnerLoop):
    """Newton's method in a trust region: θ_{t+1} = θ_t + s, s ≈ argmin m(s) over ‖s‖ ≤ Δ.

    The model is m(s) = gᵀs + ½ sᵀHs with the gradient g and the Hessian H of the inner loss at θ_t.
    It is the second-order inner loop of Hessian-free iMAML (Rajeswaran et al. 2019).

    s comes from truncated conjugate gradients (Steihaug 1983; Nocedal & Wright 2006, Alg. 7.2).
    They end at ‖g + Hs‖ ≤ max(η, 10ε)‖g‖, with ε the unit round-off, at the boundary, or at
    negative curvature, along which they go to the boundary. Every task has its own radius Δ. With

        ρ = (f(θ) − f(θ + s) + c)/(m(0) − m(s) + c),   c = 10ε|f(θ)|, the round-off of f,

    a step is taken if ρ > 10⁻⁴. Δ becomes ‖s‖/4 if ρ < ¼, and 2Δ if ρ > ¾ at the boundary (ibid.,
    Alg. 4.1). The tasks share every product, and no number.

    Its steps are not differentiable: it is for implicit methods. It takes second derivatives of f,
    however the method takes its products; where one is not finite, it counts as zero. It compares
    losses at different points, so with a `Stream` all steps see the data of step 0. Convergence is
    superlinear where f is smooth at θ*, η goes to 0, and `cg_steps` suffice for it. A network of
    ReLUs has its minima on kinks, beside which the gradient stays away from zero, after any number
    of steps. A step costs a gradient and its products, and another gradient if a task refuses it.

    Args:
        steps: Steps at most, ≥ 1, refused ones included.
        cg_steps: Products with the Hessian in each step at most, ≥ 1.
        radius: Δ at the start, > 0.
        forcing: η in [0, 1). If None, it is min(½, √‖g‖), for superlinear convergence (ibid.,
            Alg. 7.1).
        tol: Stop a task once ‖∂f/∂θ‖ ≤ tol. If None, tasks stop at a gradient of zero.
            `Trajectory.gradient_norm` is that at θ_T.

    Raises:
        ValueError: A number is out of range. On a run: the method differentiates the steps, or the
            parameters have several types.

    Example:
        >>> start = {"x": torch.tensor([[3.0]])}
        >>> loop = NewtonCG(steps=2, radius=10.0)
        >>> def loss(params, t):
        ...     return (params["x"] - 1).square().sum(1)
        >>> loop.run(loss, start, {}, differentiated_steps=0).params
        {'x': tensor([[1.]])}
    """

    steps: int = 10
    cg_steps: int = 10
    radius: float = 1.0
    forcing: float | None = None
    tol: float | None = 1e-6

    differentiable = False
    second_derivatives = True

    def __post_init__(self) -> None:
        self.check()
        check_count("NewtonCG cg_steps", self.cg_steps, unit=" product")
        if not self.radius > 0:
            raise ValueError(f"NewtonCG radius: got {self.radius}, expected a number > 0")
        if self.forcing is not None and not 0 <= self.forcing < 1:
            raise ValueError(
                f"NewtonCG forcing: got {self.forcing}, expected a relative residual in [0, 1), "
                "or None"
            )

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
        """Run the loop; see `InnerLoop.run`. `differentiated_steps` has to be 0."""
        if differentiated_steps:
            raise ValueError(
                "inner: got NewtonCG with a method that differentiates steps, expected an "
                "implicit method"
            )
        kinds = {p.dtype for p in start.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"NewtonCG: got parameters of {sorted(map(str, kinds))}, expected one type; "
                "convert them"
            )
        theta = flatten({name: p.detach() for name, p in start.items()})
        largest = torch.finfo(theta.dtype).max ** 0.25  # whose square is finite
        radius = torch.full_like(theta[:, :1], min(self.radius, largest))
        taken = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        iterates = [unflatten(theta, start)]
        hessian, value, gradient = _expand(loss, iterates[0])

        for t in range(self.steps):
            active = norm(gradient) > (self.tol or 0.0)  # False where it is NaN
            if all_ended(active, t):
                break
            taken += active.squeeze(-1)
            result = self._solve_model(hessian, gradient, radius, active=active)
            del hessian  # its graph, before the next is built
            trial = unflatten(theta + result.step, start)
            hessian, trial_value, trial_gradient = _expand(loss, trial)

            # There is no way on from a point whose gradient is not finite.
            finite = trial_gradient.isfinite().all(dim=-1, keepdim=True)
            trial_value = torch.where(finite, trial_value, torch.nan)
            eps = torch.finfo(theta.dtype).eps
            ratio = reduction_ratio(value, trial_value, result.reduction, eps=eps)
            moves = active & (ratio > ACCEPT)
            theta = torch.where(moves, theta + result.step, theta)
            gradient = torch.where(moves, trial_gradient, gradient)
            value = trial_value  # that of a task which refuses its trial is evaluated again below
            radius = _next_radius(radius, ratio, result, active=active)
            if keep_iterates:
                iterates.append(unflatten(theta, start))
            if t < self.steps - 1 and bool((active & ~moves).any()):
                del hessian
                hessian, value, gradient = _expand(loss, unflatten(theta, start))

        params = straight_through(unflatten(theta, start), start)
        final_norm = norm(gradient).squeeze(-1)
        kept = tuple(iterates) if keep_iterates else ()
        return Trajectory(params, taken, final_norm, iterates=kept)

    def _solve_model(
        self, hessian: Hessian, gradient: Tensor, radius: Tensor, *, active: Tensor
    ) -> TruncatedStep:
        """The Steihaug–Toint step of the active tasks."""
        length = norm(gradient)
        eta = length.sqrt().clamp(max=0.5) if self.forcing is None else self.forcing

        def product(v: Tensor) -> Tensor:
            return hessian.matvec(v).nan_to_num(0.0, 0.0, 0.0)

        return truncated_cg(
            product,
            -gradient,
            tol=eta * length,
            max_steps=self.cg_steps,
            radius=radius,
            active=active,
        )


def _next_radius(
    radius: Tensor,
    ratio: Tensor,
    result: TruncatedStep,
    *,
    active: Tensor,
) -> Tensor:
    """A quarter of the step if the model was poor, twice the radius if it held at the boundary."""
    poor = active & (ratio < 0.25)
    radius = torch.where(poor, norm(result.step) / 4, radius)
    return torch.where(result.at_boundary & (ratio > 0.75), 2 * radius, radius)


def _expand(
    loss: StepLoss,
    params: Params,
) -> tuple[Hessian, Tensor, Tensor]:
    """H, f `[tasks, 1]` and g `[tasks, n]` at a point."""
    values = []

    def recorded(at: Params) -> Tensor:
        losses = loss(at, 0)
        values.append(losses.detach().unsqueeze(-1))
        return losses

    with torch.enable_grad():
        hessian = Hessian(recorded, params)
    return hessian, values[0], flatten(hessian.gradient).detach()
