"""Whether the losses of a batch stand in the order of its examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metaimplicit.tuning.example_losses import align
from metaimplicit.tuning.loss_checks import outputs_near, random_outputs_like

LossesOfOutputs = Callable[[Any], Tensor]  # of one task, outputs -> [m] or [m, *positions]


def is_out_of_order(losses: LossesOfOutputs, outputs: Any, *, count: int) -> bool:
    """Whether ℓᵢ belongs to another example than i.

    If ℓᵢ is a function of row i of the outputs z, ∂(Σ cᵢ ℓᵢ)/∂zᵢ = cᵢ ∂(Σ ℓᵢ)/∂zᵢ for any c. Where
    this fails, either another ℓⱼ depends on row i, or every loss compares rows with each other, as
    a contrastive one does. The second case shows by ∂(Σ ℓᵢ)/∂zᵢ, which depends on the other rows
    then. The order of such losses is not known, and is taken for right.

    Args:
        losses: ℓ.
        outputs: z, a pytree of tensors without transforms.
        count: The number of examples, m.

    Example:
        >>> z = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
        >>> is_out_of_order(lambda z: z.square(), z, count=2)
        False
        >>> is_out_of_order(lambda z: z.square().T, z, count=2)
        True
    """
    near = outputs_near(outputs)
    random = random_outputs_like(outputs)
    for point, other in ((near, random), (random, near)):
        try:
            if _has_other_rows(losses, point, count):
                return not _compares_rows(losses, point, other, count=count)
        except (RuntimeError, ValueError, IndexError):
            continue
    return False


def _has_other_rows(losses: LossesOfOutputs, outputs: Any, count: int) -> bool:
    """Whether ∂(Σ cᵢ ℓᵢ)/∂zᵢ ≠ cᵢ ∂(Σ ℓᵢ)/∂zᵢ for some i."""

    def weighted_sum(z: Any) -> Tensor:
        values = losses(z)
        return (align(_weights(values, count), values.dim()) * values).sum()

    plain = _slopes_of_rows(lambda z: losses(z).sum(), outputs, count)
    weighted = _slopes_of_rows(weighted_sum, outputs, count)
    return _differ(weighted, _weights(plain, count)[:, None] * plain)


def _compares_rows(losses: LossesOfOutputs, outputs: Any, other: Any, *, count: int) -> bool:
    """Whether ∂(Σ ℓᵢ)/∂z at even rows changes with the odd rows."""

    def replace_odd_rows(z: Tensor, new: Tensor) -> Tensor:
        if not _has_rows(z, count):
            return z
        is_odd = torch.arange(count, device=z.device) % 2 == 1
        return torch.where(align(is_odd, z.dim()), new, z)

    leaves, structure = tree_flatten(outputs)
    replaced = [
        replace_odd_rows(z, new) if isinstance(z, Tensor) else z
        for z, new in zip(leaves, tree_flatten(other)[0], strict=True)
    ]
    before = _slopes_of_rows(lambda z: losses(z).sum(), outputs, count)
    after = _slopes_of_rows(lambda z: losses(z).sum(), tree_unflatten(replaced, structure), count)
    return _differ(after[::2], before[::2])


def _slopes_of_rows(loss: LossesOfOutputs, outputs: Any, count: int) -> Tensor:
    """∂loss/∂z of the outputs that have a row for each example, `[m, n]`."""
    leaves, structure = tree_flatten(outputs)
    leaves = [z.detach().requires_grad_() if _has_rows(z, count) else z for z in leaves]
    rows = [z for z in leaves if _has_rows(z, count)]
    if not rows:
        raise ValueError("outputs: got none with a row for each example")
    with torch.enable_grad(), torch.autocast(rows[0].device.type, enabled=False):
        value = loss(tree_unflatten(leaves, structure))
        slopes = torch.autograd.grad(value, rows, materialize_grads=True)
    return torch.cat([slope.reshape(count, -1) for slope in slopes], 1)


def _has_rows(z: Any, count: int) -> bool:
    return isinstance(z, Tensor) and z.is_floating_point() and z.dim() > 0 and len(z) == count


def _weights(like: Tensor, count: int) -> Tensor:
    """c, different numbers between ½ and 3/2, `[m]`."""
    golden_ratio = (math.sqrt(5) - 1) / 2
    steps = torch.arange(count, dtype=torch.float64, device=like.device)
    return (0.5 + golden_ratio * steps % 1).to(like.dtype)


def _differ(slopes: Tensor, expected: Tensor) -> bool:
    """Whether they differ by more than √ε. Slopes that are not finite say nothing."""
    size = expected.norm().item()
    error = (slopes - expected).norm().item()
    tolerance = math.sqrt(torch.finfo(slopes.dtype).eps)
    return math.isfinite(size + error) and error > tolerance * size
