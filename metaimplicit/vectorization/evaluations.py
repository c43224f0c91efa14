"""What vmap and a loop are compared by: values and derivatives of both losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params

# Groups of tensors by what they are, such as "∂f/∂θ". Each tensor leads with an axis of rows: the
# tasks, or one row for all of them.
Groups = dict[str, Params]
Evaluation = Callable[[LiftedProblem, Params, Params], Groups]  # of (problem, θ, φ)


def evaluations(*, last_step: int, second_derivatives: bool) -> list[Evaluation]:
    """What has to agree: θ₀, f, g and their first derivatives, and those of ∂f/∂θ.

    Args:
        last_step: T, the step whose data the outer loss sees.
        second_derivatives: Whether ∂f/∂θ is differentiated.
    """
    outer_loss = partial(_of_outer_loss, last_step=last_step)
    compared: list[Evaluation] = [_of_start, of_inner_loss, outer_loss]
    return [*compared, _of_inner_gradient] if second_derivatives else compared


def without_repeats(compared: list[Evaluation]) -> list[Evaluation]:
    """The same without the inner loss if its gradient, which evaluates it too, is among them."""
    if _of_inner_gradient in compared:
        return [evaluate for evaluate in compared if evaluate is not of_inner_loss]
    return compared


def _of_start(problem: LiftedProblem, _: Params, meta: Params) -> Groups:
    """θ₀ and its derivative in φ."""
    start = problem.init(meta)
    return {"θ₀": start} | _gradients("θ₀", weighted_sum(start.values()), {}, meta)


def of_inner_loss(problem: LiftedProblem, theta: Params, meta: Params) -> Groups:
    """F and its derivatives in θ and φ."""
    losses = problem.inner(theta, meta, problem.at(0))
    return {"f": {"": losses}} | _gradients("f", losses.sum(), theta, meta)


def _of_outer_loss(
    problem: LiftedProblem, theta: Params, meta: Params, *, last_step: int
) -> Groups:
    losses, _ = problem.outer(theta, meta, problem.at(last_step))
    return {"g": {"": losses}} | _gradients("g", losses.sum(), theta, meta)


def _of_inner_gradient(problem: LiftedProblem, theta: Params, meta: Params) -> Groups:
    """What `of_inner_loss` has, and the derivatives of ⟨∂f/∂θ, v⟩ for one v."""
    losses = problem.inner(theta, meta, problem.at(0))
    first = _gradients("f", losses.sum(), theta, meta, create_graph=True)
    groups = {"f": {"": losses}} | first
    if not first:  # f is a constant
        return groups
    slope = weighted_sum(first["∂f/∂θ"].values())
    return groups | _gradients("(∂f/∂θ)", slope, theta, meta)


def _gradients(
    name: str, total: Tensor, theta: Params, meta: Params, *, create_graph: bool = False
) -> Groups:
    """The derivatives of a scalar in θ and φ."""
    phi = {key: m for key, m in meta.items() if m.requires_grad}
    if not total.requires_grad:
        return {}
    targets = [*theta.values(), *phi.values()]
    gradients = torch.autograd.grad(total, targets, create_graph=create_graph, allow_unused=True)
    of_theta = zip(theta, gradients[: len(theta)], strict=True)
    of_phi = zip(phi, gradients[len(theta) :], strict=True)
    return {
        f"∂{name}/∂θ": {key: g for key, g in of_theta if g is not None},
        f"∂{name}/∂φ": {key: g.to_dense().unsqueeze(0) for key, g in of_phi if g is not None},
    }


def weighted_sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of all numbers, each with a weight of its own, so that no two cancel by symmetry.

    Example:
        >>> weighted_sum([torch.ones(2), torch.zeros(3)])
        tensor(0.1242)
    """
    sums = [(x * varied_numbers(x)).sum() for x in tensors]
    return torch.stack(sums).sum()


def varied_numbers(like: Tensor) -> Tensor:
    """Numbers between −1 and 1 without a pattern, in the shape of a tensor.

    Example:
        >>> varied_numbers(torch.zeros(3))
        tensor([ 0.5403, -0.4161,  0.2837])
    """
    count = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return torch.cos(1 + count.square()).to(like).reshape(like.shape)
