"""Whether one loss is another: their values and slopes at the outputs of the model and others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metaimplicit.operators.output_loss import random_outputs
from metaimplicit.task_axis import map_tensors

OutputLoss = Callable[[Any], Tensor]  # of one task, outputs -> scalar


class Difference(NamedTuple):
    """How far two losses differ, relative to the second.

    Attributes:
        of_values: |V − f| / |f|.
        of_slopes: ‖∂V/∂z − ∂f/∂z‖ / ‖∂f/∂z‖ in the outputs z, NaN if it is not known.
    """

    of_values: float
    of_slopes: float

    def __str__(self) -> str:
        percent = f"at some outputs they differ by {100 * self.of_values:.3g} %"
        if math.isnan(self.of_slopes):
            return percent
        return f"{percent}, and their slopes in the outputs by {100 * self.of_slopes:.3g} %"


def find_difference(loss: OutputLoss, other: OutputLoss, outputs: Any) -> Difference | None:
    """Where two losses of the outputs differ, or None if they agree to √ε.

    They are compared at the outputs of the model, moved by up to a thousandth because losses have
    kinks at zero, and at random outputs of unit size. Outputs where one of them is not finite, or
    raises an error, say nothing.

    Args:
        loss: V.
        other: f.
        outputs: A pytree of tensors, without transforms.

    Example:
        >>> z = torch.tensor([1.0, -2.0])
        >>> find_difference(lambda z: z.square().sum(), lambda z: 2 * z.square().mean(), z)
        >>> find_difference(torch.sum, lambda z: 2 * z.abs().mean(), z).of_slopes > 0.5
        True
    """
    for point in (outputs_near(outputs), random_outputs_like(outputs)):
        try:
            difference = _difference(_value_and_slope(loss, point), _value_and_slope(other, point))
        except (RuntimeError, ValueError, IndexError):
            continue
        if difference is not None:
            return difference
    return None


def outputs_near(outputs: Any) -> Any:
    """The outputs, moved by up to a thousandth.

    Example:
        >>> outputs_near(torch.tensor([1.0, 2.0]))
        tensor([1.0000, 1.9980])
    """

    def move(z: Tensor) -> Tensor:
        if not z.is_floating_point():
            return z
        z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
        share = torch.linspace(
            0,
            1,
            z.numel(),
            dtype=z.dtype,
            device=z.device,
        ).view_as(z)
        return z * (1 - 1e-3 * share)

    return map_tensors(move, outputs)


def random_outputs_like(outputs: Any) -> Any:
    """Random outputs of unit size. Those between 0 and 1, as probabilities are, stay there.

    Example:
        >>> random_outputs_like(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def draw(z: Tensor) -> Tensor:
        if not z.is_floating_point():
            return z
        z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
        return random_outputs(z, seed=0)

    return map_tensors(draw, outputs)


class _Evidence(NamedTuple):
    value: Tensor
    slope: Tensor


def _value_and_slope(loss: OutputLoss, outputs: Any) -> _Evidence:
    leaves, structure = tree_flatten(outputs)
    leaves = [x.requires_grad_() if _is_float(x) else x for x in leaves]
    variables = [x for x in leaves if _is_float(x)]
    devices = {x.device.type for x in variables}
    with torch.enable_grad(), torch.autocast(devices.pop(), enabled=False):
        value = loss(tree_unflatten(leaves, structure))
        slopes = [torch.zeros_like(x) for x in variables]
        if value.requires_grad:
            slopes = list(torch.autograd.grad(value, variables, materialize_grads=True))
    return _Evidence(value.detach(), torch.cat([slope.flatten() for slope in slopes]))


def _difference(first: _Evidence, second: _Evidence) -> Difference | None:
    """How far the evidence differs. None if it agrees, or is not finite."""
    size = second.value.abs().item()
    steepness = second.slope.norm().item()
    if not math.isfinite(size + steepness + first.value.item() + first.slope.norm().item()):
        return None
    tolerance = math.sqrt(max(torch.finfo(x.dtype).eps for x in (second.value, second.slope)))
    of_values = (first.value - second.value).abs().item()
    of_slopes = (first.slope - second.slope).norm().item()
    # The terms of a value may cancel. Those of a slope belong to one output each.
    if of_values <= tolerance * (size + steepness) and of_slopes <= tolerance * steepness:
        return None
    return Difference(relative_error(of_values, size), relative_error(of_slopes, steepness))


def relative_error(error: float, size: float) -> float:
    """The error as a part of the size, which is infinite if only the size is 0.

    Example:
        >>> relative_error(1.0, 4.0), relative_error(0.0, 0.0)
        (0.25, 0.0)
    """
    return error / size if size > 0 else math.inf if error > 0 else 0.0


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
