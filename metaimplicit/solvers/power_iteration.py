"""The norm of a symmetric operator, by power iterations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.arithmetic import divisor, norm


def power_iteration(
    product: Callable[[Tensor], Tensor], v: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Estimate ‖A‖ from below, for each task.

    Args:
        product: v ↦ Av, `[tasks, n] -> [tasks, n]`.
        v: The start, of norm one, `[tasks, n]`.
        steps: The number of products.

    Returns:
        ‖Av‖ for the last v but one, `[tasks, 1]`, and the last v, of norm one (or zero where the
        product is zero), `[tasks, n]`.

    Example:
        >>> v = torch.tensor([[0.6, 0.8]])
        >>> norm, v = power_iteration(lambda v: v * torch.tensor([1.0, 3.0]), v, steps=20)
        >>> norm
        tensor([[3.]])
    """
    length = torch.ones_like(v[:, :1])
    for _ in range(steps):
        v = product(v)
        length = norm(v)
        v = v / divisor(length)
    return length, v


def largest_eigenvalue(
    operator: LinearOperator, v: Tensor, steps: int, *, random_part: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Estimate λ_max of a positive definite operator from below, for each task.

    Args:
        operator: A, shape `(tasks, n)`.
        v: Where the iteration starts, of norm one or zero, `[tasks, n]`: a right-hand side, or the
            vector that an earlier call returned.
        steps: Power iterations, one product each.
        random_part: How much of a fixed random direction is added to v, since v alone may have no
            part in the largest eigenvector. It takes the sign of its product with v.

    Returns:
        The estimate ‖Av‖, `[tasks, 1]`, and the last v, `[tasks, n]`.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> v = torch.tensor([[1.0, 0.0]])
        >>> estimate, _ = largest_eigenvalue(Identity(v, scale=3.0), v, steps=2)
        >>> round(estimate.item(), 4)
        3.0
    """
    direction = fixed_direction(v)
    sign = torch.where(v @ direction < 0, -random_part, random_part).unsqueeze(-1).to(v)
    v = v + sign * direction

    def product(u: Tensor) -> Tensor:
        # A later call starts from the result, and would not recover from a NaN in it.
        return operator.matvec(u).nan_to_num(0.0, 0.0, 0.0)

    return power_iteration(product, v / norm(v), steps)


def fixed_direction(like: Tensor) -> Tensor:
    """A random vector of norm one, `[n]`, the same in every call.

    Args:
        like: A `[tasks, n]` tensor of the type and device wanted.

    Example:
        >>> round(fixed_direction(torch.zeros(1, 100)).norm().item(), 4)
        1.0
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape[1], generator=generator, device="cpu").to(like)
    unit: Tensor = v / v.norm()
    return unit
