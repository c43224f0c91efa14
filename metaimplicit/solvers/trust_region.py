"""Steps of a model that is trusted within a radius, and the ratio that says how far to trust it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.solvers.arithmetic import divisor, dot, norm
from metaimplicit.solvers.conjugate_gradients import CGIteration
from metaimplicit.solvers.iteration import all_ended


@dataclass(frozen=True)
class TruncatedStep:
    """The result of `truncated_cg`.

    Attributes:
        step: s, `[tasks, n]`. It is 0 for tasks that were not active.
        reduction: m(0) − m(s), `[tasks, 1]`.
        at_boundary: Whether ‖s‖ = Δ, `[tasks, 1]`.
        curvature: pᵀAp of the last direction p, `[tasks, 1]`. A task whose curvature is not
            positive ended there. It is 1 for tasks that took no product.
    """

    step: Tensor
    reduction: Tensor
    at_boundary: Tensor
    curvature: Tensor


def truncated_cg(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: Tensor,
    max_steps: int,
    radius: Tensor | None = None,
    active: Tensor | None = None,
) -> TruncatedStep:
    """Minimise m(s) = ½ sᵀAs − bᵀs over ‖s‖ ≤ Δ by conjugate gradients from zero.

    A need not be positive definite. A task ends when ‖b − As‖ meets its tolerance, where the
    iterate leaves the region, or at a direction of negative curvature. In the last two cases it
    goes along that direction to the boundary (Steihaug 1983; Nocedal & Wright 2006, Alg. 7.2).
    Without a radius, a task stays before the first direction of negative curvature (ibid.,
    Alg. 7.1). Every iterate satisfies bᵀs > 0.

    Args:
        product: v ↦ Av, `[tasks, n] -> [tasks, n]`.
        b: `[tasks, n]`. Of a function with gradient g, b = −g.
        tol: The norm of b − As at which a task has converged, `[tasks, 1]`. It counts as at least
            10ε‖b‖, with ε the unit round-off.
        max_steps: Products at most.
        radius: Δ, finite, `[tasks, 1]`. If None, there is no bound.
        active: The tasks that take a step, `[tasks, 1]`, bool. If None, all do.

    Example:
        >>> b = torch.tensor([[3.0, 4.0]])
        >>> result = truncated_cg(
        ...     lambda v: -v, b, tol=torch.zeros(1, 1), max_steps=5, radius=torch.ones(1, 1)
        ... )
        >>> result.step, result.at_boundary
        (tensor([[0.6000, 0.8000]]), tensor([[True]]))
    """
    cg = CGIteration(torch.zeros_like(b), b)
    if active is None:
        active = torch.ones_like(cg.rz, dtype=torch.bool)
    # Below its own round-off, a residual's directions and curvatures are noise.
    tol = torch.maximum(tol, 10 * torch.finfo(b.dtype).eps * norm(b))
    active = active & (norm(b) > tol)
    at_boundary = torch.zeros_like(active)
    curvature = torch.ones_like(cg.rz)

    for step in range(max_steps):
        if all_ended(active, step):
            break
        ap = product(cg.p)
        curvature = torch.where(active, dot(cg.p, ap), curvature)
        length = cg.exact_length(curvature)
        if radius is None:
            active = active & (curvature > 0)
            cg.step(ap, length, where=active)
        else:
            # ‖s + αp‖ grows with α, so the iterate leaves the region if α exceeds that of the edge.
            edge = _length_to_boundary(cg.x, cg.p, radius)
            leaves = ~(curvature > 0) | ~(length < edge)
            cg.step(ap, torch.where(leaves, edge, length), where=active)
            at_boundary = at_boundary | (active & leaves)
            active = active & ~leaves
        active = active & (cg.rz.sqrt() > tol)

    # With r = b − As, m(0) − m(s) = bᵀs − ½ sᵀAs = ½ sᵀ(b + r).
    reduction = 0.5 * dot(cg.x, b + cg.r)
    return TruncatedStep(
        cg.x,
        reduction,
        at_boundary=at_boundary,
        curvature=curvature,
    )


def _length_to_boundary(s: Tensor, p: Tensor, radius: Tensor) -> Tensor:
    """The τ ≥ 0 with ‖s + τp‖ = Δ, `[tasks, 1]`."""
    # It is the root of pᵀp τ² + 2sᵀp τ = Δ² − sᵀs, written without the difference of two numbers.
    room = (radius.square() - dot(s, s)).clamp(min=0.0)
    sp = dot(s, p)
    return room / (sp + (sp.square() + dot(p, p) * room).sqrt())


def reduction_ratio(
    before: Tensor,
    after: Tensor,
    predicted: Tensor,
    eps: float,
    *,
    roundoff: Tensor | float = 0.0,
) -> Tensor:
    """ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), the reduction of the loss over that of its model m.

    Both reductions are widened by 10 ε|L(θ)|, what round-off may make of them, so that ρ → 1 at a
    minimum (Conn, Gould & Toint 2000, §17.4.2). ρ is −∞ where the model does not fall, or
    where a loss is not finite. It is ½ where the losses are equal and round-off hides the reduction
    that the model predicts.

    Args:
        before: L(θ), of any shape.
        after: L(θ + δ), of the same shape.
        predicted: m(0) − m(δ), of the same shape.
        eps: ε, the unit round-off of the numbers that the losses were computed in.
        roundoff: What round-off may make of a loss that is small beside the numbers that it is the
            difference of, as a cross-entropy is beside its logits.

    Example:
        >>> reduction_ratio(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(2.0), eps=0.0)
        tensor(0.5000)
    """
    slack = 10 * eps * before.abs()
    actual = before - after + slack
    expected = predicted + slack
    ratio = torch.where(expected > 0, actual / divisor(expected), 1.0)
    hidden = (before == after) & (predicted >= 0) & (predicted <= roundoff)
    ratio = torch.where(hidden, ratio.clamp(min=0.5), ratio)
    invalid = ~(actual.isfinite() & expected.isfinite()) | (expected < 0)
    increases = (expected == 0) & (actual < 0)
    return torch.where(invalid | increases, -torch.inf, ratio)
