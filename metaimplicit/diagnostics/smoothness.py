"""Whether an inner loss is smooth where an inner loop ended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaimplicit.params import Params, flatten, leaves, unflatten

LENGTH = 1.0  # of the ray that is searched, relative to 1 + ‖θ‖
BISECTIONS = 22
LAST = 3  # bisections that divide the change of a smooth gradient by eight


def has_kink(loss: Callable[[Params], Tensor], params: Params) -> bool:
    """Whether ∂f/∂θ jumps near θ, on the way down.

    A ray from θ along −∂f/∂θ is bisected, always towards the half in which the gradient changes
    more. The change of a smooth gradient is halved by every bisection in the end, and that at a
    kink is not.

    Args:
        loss: f, `{name: [tasks, *shape]} -> [tasks]`.
        params: θ.

    Example:
        >>> def hinge(params):
        ...     return (1 - params["w"]).clamp(min=0).sum(1) + 0.1 * params["w"].square().sum(1)
        >>> has_kink(hinge, {"w": torch.tensor([[0.9999]])})
        True
        >>> has_kink(lambda params: params["w"].pow(4).sum(1), {"w": torch.tensor([[0.9999]])})
        False
    """
    theta = flatten(params).detach()

    def gradient_at(point: Tensor) -> Tensor:
        return _gradient(loss, unflatten(point, params))

    gradient = gradient_at(theta)
    size = gradient.norm(dim=-1, keepdim=True)
    length = LENGTH * (1 + theta.norm(dim=-1, keepdim=True))
    near = theta
    far = theta - length * gradient / torch.where(size > 0, size, 1.0)
    at_near = gradient
    at_far = gradient_at(far)
    changes = []
    for _ in range(BISECTIONS):
        changes.append((at_far - at_near).norm(dim=-1, keepdim=True))
        middle = (near + far) / 2
        at_middle = gradient_at(middle)
        first = (at_middle - at_near).norm(dim=-1, keepdim=True)
        second = (at_far - at_middle).norm(dim=-1, keepdim=True)
        near = torch.where(first < second, middle, near)
        at_near = torch.where(first < second, at_middle, at_near)
        far = torch.where(first < second, far, middle)
        at_far = torch.where(first < second, at_far, at_middle)
    jump = (at_far - at_near).norm(dim=-1, keepdim=True)
    return bool(((jump > 0.05 * size) & (jump > 0.25 * changes[-LAST])).any())


def _gradient(loss: Callable[[Params], Tensor], params: Params) -> Tensor:
    """∂f/∂θ of each task, `[tasks, n]`, without a graph. Where f does not depend on θ, it is 0."""
    point = leaves(params)
    total = loss(point).sum()
    gradients = torch.autograd.grad(
        total, list(point.values()), allow_unused=True, materialize_grads=True
    )
    return flatten(dict(zip(point, gradients, strict=True)))
