"""A loss as a function of the model's outputs: its curvature there, and the outputs that show it.

Everything here takes derivatives in the outputs alone, and never runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OutputLoss = Callable[[Tensor], Tensor]  # ℓ(z), [tasks, …] -> [tasks]
Checked = dict[Any, Any]  # what earlier checks of a loss have found, by the shape of the outputs


class NoSecondDerivativeError(ValueError):
    """A loss has no second derivative in the outputs, as torch's margin losses have none."""


def output_gradient(loss: OutputLoss, z: Tensor) -> tuple[Tensor, Tensor]:
    """Z as a leaf, and ∂ℓ/∂z there with its graph, both `[tasks, …]`.

    Example:
        >>> z, slope = output_gradient(lambda z: z.pow(3).sum(1), torch.tensor([[1.0, 2.0]]))
        >>> slope.detach()
        tensor([[ 3., 12.]])
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(z).sum(), z, create_graph=True)
    return z, slope


def output_hessian_product(loss: OutputLoss, z: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """∂ℓ/∂z and (∂²ℓ/∂z²) v, without a graph, both in the shape of z.

    Args:
        loss: ℓ, `[tasks, …] -> [tasks]`.
        z: The outputs at which the derivatives are taken, `[tasks, …]`.
        vector: v, in the shape of z.

    Raises:
        NoSecondDerivativeError: The loss has no second derivative.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]])
        >>> output_hessian_product(lambda z: z.pow(3).sum(1), z, torch.ones(1, 2))
        (tensor([[ 3., 12.]]), tensor([[ 6., 12.]]))
    """
    z, slope = output_gradient(loss, z)
    product = None
    if slope.requires_grad:
        try:
            (product,) = torch.autograd.grad(slope, z, vector, allow_unused=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise NoSecondDerivativeError(
                f"loss: it has no second derivative in the outputs ({error}); write it with other "
                "operations, or use 'first-order'"
            ) from error
    return slope.detach(), torch.zeros_like(slope) if product is None else product


def widen(loss: OutputLoss, z: Tensor) -> Tensor:
    """The outputs in float64 if the loss computes in float64 then. Otherwise they stay as they are.

    Example:
        >>> widen(lambda z: z.sum(1), torch.zeros(1, 2)).dtype
        torch.float64
    """
    z = z.detach()
    wide = z.to(torch.promote_types(z.dtype, torch.float64)).requires_grad_()
    try:
        with torch.enable_grad():
            values = loss(wide)
            if values.requires_grad:  # some losses take two types, but have no derivative then
                torch.autograd.grad(values.sum(), wide)
    except RuntimeError:  # the loss holds tensors of another type
        return z
    return wide.detach() if values.dtype == torch.float64 else z


def random_outputs(z: Tensor, seed: int) -> Tensor:
    """Outputs of unit size, in the shape of z. A model's own may be so large that F is zero there.

    Where all of z is in [0, 1] it may consist of probabilities, and the draws are in [0, 1] too.

    Example:
        >>> bool((random_outputs(torch.full((1, 50), 0.5), seed=0) < 0).any())
        False
        >>> bool((random_outputs(torch.full((1, 50), 1.5), seed=0) < 0).any())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    may_be_probabilities = not z.is_complex() and bool(((z >= 0) & (z <= 1)).all())
    draw = torch.rand if may_be_probabilities else torch.randn
    return draw(
        z.shape,
        generator=generator,
        dtype=z.dtype,
        device="cpu",
    ).to(z.device)
