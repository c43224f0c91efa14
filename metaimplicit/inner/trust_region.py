"""A second-order inner loop without a Hessian: Newton's steps by conjugate gradients in a trust region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory, straight_through
from metaimplicit.iterate import OptimizerState
from metaimplicit.operators import Hessian, LinearOperator
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.solvers.base import dot

ACCEPT = 1e-4  # the least ratio of decreases at which a step is taken


@dataclass(frozen=True)
class NewtonCG(InnerLoop):
    """θ_{t+1} = θ_t + s, s ≈ argmin m(s) = gᵀs + ½ sᵀHs over ‖s‖ ≤ Δ, g and H those of the inner loss at θ_t: the
    second-order inner loop of Hessian-free iMAML (Rajeswaran et al. 2019).

    s comes from truncated conjugate gradients (Steihaug 1983; Nocedal & Wright 2006, Alg. 7.2), which end at
    ‖g + Hs‖ ≤ max(η, 10ε)‖g‖, ε the unit round-off, at the boundary, or at negative curvature, along which they go to
    the boundary. Every task has its own radius Δ: with ρ = (f(θ) − f(θ + s) + c)/(m(0) − m(s) + c), c = 10ε|f(θ)| the
    round-off of f, a step is taken if ρ > 10⁻⁴; Δ ← ‖s‖/4 if ρ < ¼, and Δ ← 2Δ if ρ > ¾ at the boundary (ibid.,
    Alg. 4.1). The tasks share every product and no number.

    Its steps are not differentiable: for implicit methods. It takes second derivatives of f, however the method takes
    its products; where one is not finite, m is linear. It compares losses at different points, so with a `Stream` all
    steps see the data of step 0. Convergence is superlinear where f is smooth at θ*, η goes to 0 and `cg_steps`
    suffice for it; a network of ReLUs has its minima on kinks, beside which the gradient stays away from zero, however
    many the steps. A step costs a gradient and its products, and another gradient if any task refuses it.

    Args:
        steps: steps at most, ≥ 1, refused ones included.
        cg_steps: products with the Hessian in each at most, ≥ 1.
        radius: Δ_0 > 0.
        forcing: η in [0, 1); None, min(½, √‖g‖), for superlinear convergence (ibid., Alg. 7.1).
        tol: stop a task once ‖∂f/∂θ‖ ≤ tol; None, never. `Trajectory.gradient_norm` is that at θ_T.
    """

    steps: int = 10
    cg_steps: int = 10
    radius: float = 1.0
    forcing: float | None = None
    tol: float | None = 1e-6

    differentiable = False

    def __post_init__(self) -> None:
        self.check()
        if self.cg_steps < 1:
            raise ValueError(f"NewtonCG cg_steps: got {self.cg_steps}, expected at least 1 product")
        if not self.radius > 0:
            raise ValueError(f"NewtonCG radius: got {self.radius}, expected a number > 0")
        if self.forcing is not None and not 0 <= self.forcing < 1:
            raise ValueError(
                f"NewtonCG forcing: got {self.forcing}, expected a relative residual in [0, 1), or None"
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
        if differentiated_steps:
            raise ValueError(
                "inner: got NewtonCG with a method that differentiates steps, expected an implicit method"
            )
        if len(kinds := {p.dtype for p in start.values()}) > 1:
            raise ValueError(
                f"NewtonCG: got parameters of {sorted(map(str, kinds))}, expected one type; convert them"
            )
        theta = flatten({name: p.detach() for name, p in start.items()})
        radius = torch.full_like(
            theta[:, :1], min(self.radius, torch.finfo(theta.dtype).max ** 0.25)
        )
        taken = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        iterates = [unflatten(theta, start)]
        check_every = 8 if theta.is_cuda else 1
        hessian, value, gradient = _expand(loss, iterates[0])
        norm = gradient.norm(dim=-1, keepdim=True)
        for t in range(self.steps):
            active = norm > (self.tol or 0.0)  # not where it is NaN
            if t % check_every == 0 and not active.any():
                break
            taken += active.squeeze(-1)
            eta = norm.sqrt().clamp(max=0.5) if self.forcing is None else self.forcing
            step, decrease, bound = steihaug(
                hessian, gradient, radius, eta * norm, active, self.cg_steps
            )
            del hessian  # its graph, before the next one is made
            hessian, lower, slope = _expand(loss, unflatten(theta + step, start))
            finite = lower.isfinite() & slope.isfinite().all(dim=-1, keepdim=True)
            lower = torch.where(finite, lower, torch.nan)  # refused: from there is no way on
            # of losses that differ by their round-off alone the ratio says nothing (Conn, Gould & Toint 2000, §17.4.2)
            blur = 10 * torch.finfo(theta.dtype).eps * value.abs()
            ratio = (value - lower + blur) / (decrease + blur)
            moved = active & (ratio > ACCEPT)
            theta, gradient = (
                torch.where(moved, theta + step, theta),
                torch.where(moved, slope, gradient),
            )
            value = lower  # where a task refused, all are made anew below
            norm = gradient.norm(dim=-1, keepdim=True)
            poor = active & ~(ratio >= 0.25)  # NaN, too
            radius = torch.where(poor, step.norm(dim=-1, keepdim=True) / 4, radius)
            radius = torch.where(bound & (ratio > 0.75), 2 * radius, radius)
            iterates = [*iterates, unflatten(theta, start)] if keep_iterates else iterates
            if t < self.steps - 1 and bool((active & ~moved).any()):
                del hessian
                hessian, value, gradient = _expand(loss, unflatten(theta, start))
        params = straight_through(unflatten(theta, start), start)
        return Trajectory(params, taken, norm.squeeze(-1), tuple(iterates) if keep_iterates else ())


def steihaug(
    operator: LinearOperator,
    gradient: Tensor,
    radius: Tensor,
    tol: Tensor,
    active: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Steihaug–Toint step of each active task, zero for the others.

    Args:
        operator: H, shape `(tasks, n)`.
        gradient: g, `[tasks, n]`.
        radius: Δ, `[tasks, 1]`.
        tol: the norm of g + Hs at which a task ends, `[tasks, 1]`.
        active: `[tasks, 1]`.
        steps: products at most.

    Returns:
        s `[tasks, n]`; m(0) − m(s) and whether ‖s‖ = Δ, `[tasks, 1]`.
    """
    s, r = torch.zeros_like(gradient), gradient
    d, rr, bound = -r, dot(r, r), torch.zeros_like(active)
    # below its own round-off a residual's directions and curvatures are noise
    tol = torch.maximum(tol, 10 * torch.finfo(r.dtype).eps * rr.sqrt())
    check_every = 8 if gradient.is_cuda else 1
    for j in range(steps):
        if j > 0 and j % check_every == 0 and not active.any():
            break
        hd = operator.matvec(d).nan_to_num(0.0, 0.0, 0.0)
        curvature, dd, sd = dot(d, hd), dot(d, d), dot(s, d)
        # ‖s + τd‖ = Δ at the τ ≥ 0 of dᵀd τ² + 2sᵀd τ = Δ² − sᵀs, written without the difference of its roots
        room = (radius.square() - dot(s, s)).clamp(min=0.0)
        edge = room / (sd + (sd.square() + dd * room).sqrt())
        alpha = rr / curvature
        out = ~(curvature > 0) | ~(alpha < edge)  # as ‖s + τd‖ grows with τ
        length = torch.where(out, edge, alpha)
        s = torch.where(active, s + length * d, s)
        r = torch.where(active, r + length * hd, r)  # g + Hs, at the boundary too
        bound = bound | (active & out)
        rr_next = dot(r, r)
        active = active & ~out & (rr_next.sqrt() > tol)
        d = torch.where(active, rr_next / rr * d - r, d)
        rr = rr_next
    return s, -0.5 * dot(s, gradient + r), bound  # gᵀs + ½ sᵀHs with Hs = r − g


def _expand(loss: StepLoss, params: Params) -> tuple[Hessian, Tensor, Tensor]:
    """H, f `[tasks, 1]` and g `[tasks, n]` at a point."""
    values = []

    def recorded(at: Params) -> Tensor:
        losses = loss(at, 0)
        values.append(losses.detach().unsqueeze(-1))
        return losses

    with torch.enable_grad():
        hessian = Hessian(recorded, params)
    return hessian, values[0], flatten(hessian.gradient).detach()
