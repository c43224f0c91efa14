"""A loss as a function of the model's outputs: its curvature there, and the outputs that show it.

Everything here takes derivatives in the outputs alone, and never runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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
    try:
        with torch.no_grad():
            is_wide = loss(z.double()).dtype == torch.float64
    except RuntimeError:  # the loss holds tensors of another type
        return z
    return z.double() if is_wide else z


def random_outputs(z: Tensor, seed: int) -> Tensor:
    """Outputs of unit size, in the shape of z. A model's own may be so large that F is zero there.

    Where all of z is in [0, 1] it may consist of probabilities, and the draws are in [0, 1] too.

    Example:
        >>> bool((random_outputs(torch.full((1, 50), 0.5), seed=0) < 0).any())
        False
    """
    generator = torch.Generator().manual_seed(seed)
    may_be_probabilities = bool(((z >= 0) & (z <= 1)).all())
    draw = torch.rand if may_be_probabilities else torch.randn
    return draw(z.shape, generator=generator, dtype=z.dtype).to(z.device)


class Cut(NamedTuple):
    """A loss of the outputs where it has curvature.

    Args:
        loss: `[tasks, …] -> [tasks]`.
        is_linear: Whether even this loss is linear in the outputs, so that it has no curvature.
    """

    loss: OutputLoss
    is_linear: bool


def cut_before_log_softmax(loss: OutputLoss, z: Tensor, checked: Checked) -> Cut:
    """ℓ, or ℓ ∘ log-softmax if ℓ is linear in z and z are log-probabilities.

    A model and its loss can be cut in two at any place, and Gauss–Newton keeps the curvature that
    is behind the cut. If a model ends in log-softmax and its loss is linear (`nll_loss`), that is
    none. Since log-softmax leaves log-probabilities unchanged, ℓ ∘ log-softmax is the same function
    of θ, and its curvature in z is that of cross-entropy in the logits.

    Args:
        loss: ℓ, `[tasks, …] -> [tasks]`.
        z: The outputs of the model, `[tasks, …]`, without a graph.
        checked: What earlier checks of this loss have found. The cut is chosen once for outputs of
            one shape.

    Example:
        >>> log_p = torch.tensor([[[0.2, 0.8]]]).log()
        >>> cut = cut_before_log_softmax(lambda z: -z[:, 0, 0], log_p, {})
        >>> _, product = output_hessian_product(cut.loss, log_p, torch.tensor([[[1.0, 0.0]]]))
        >>> product.squeeze(), cut.is_linear  # p₁p₂ = 0.16
        (tensor([ 0.1600, -0.1600]), False)
    """
    key = ("class axis", z.shape, z.dtype)
    axis = checked.get(key)
    if key not in checked:
        if _is_linear(loss, z):
            axis = _class_axis(z, output_gradient(loss, z)[1].detach())
            if axis is None or _is_linear(lambda z: loss(z.log_softmax(axis)), z):
                return Cut(loss, is_linear=True)
        checked[key] = axis
    if axis is None:
        return Cut(loss, is_linear=False)
    return Cut(lambda z: loss(z.log_softmax(axis)), is_linear=False)


def _is_linear(loss: OutputLoss, z: Tensor) -> bool:
    """Whether a loss has no curvature, neither at z nor at random outputs."""
    z = widen(loss, z)
    roundoff = 100 * torch.finfo(z.dtype).eps
    for seed in range(2):
        vector = random_outputs(z, seed) + 1
        at = z if seed == 0 else random_outputs(z, seed)
        try:
            slope, product = output_hessian_product(loss, at, vector)
        except NoSecondDerivativeError:
            return False
        if not bool(product.norm() <= roundoff * slope.norm()):
            return False
    return True


def _class_axis(z: Tensor, slope: Tensor) -> int | None:
    """The one axis along which Σ exp z = 1 wherever the loss depends on z. It counts from the end.

    The axis of the examples, 1, comes last: five examples of five equal classes have Σ exp z = 1
    along it as well.
    """
    eps = torch.finfo(z.dtype).eps
    axes = []
    for axis in range(2, z.dim()):
        if _is_normalised(z, slope, axis, eps):
            axes.append(axis - z.dim())
    if not axes and z.dim() > 1 and _is_normalised(z, slope, 1, eps):
        axes.append(1 - z.dim())
    return axes[0] if len(axes) == 1 else None


def _is_normalised(z: Tensor, slope: Tensor, axis: int, eps: float) -> bool:
    # Rounding z by ε|z| changes log Σ exp z by ε Σ p|log p| at most, which is ε log d.
    roundoff = 10 * eps * (1 + torch.tensor(float(z.shape[axis])).log().item())
    is_one = z.logsumexp(axis).abs() <= roundoff
    is_unread = (slope == 0).all(axis)
    return bool((is_one | is_unread).all())
