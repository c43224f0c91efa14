"""Where a model and its loss are cut in two, and what Gauss–Newton leaves out there."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from metaimplicit.operators.links import Link, find_link
from metaimplicit.operators.output_loss import (
    Checked,
    NoSecondDerivativeError,
    OutputLoss,
    output_gradient,
    output_hessian_product,
    random_outputs,
    widen,
)

NEGLIGIBLE = 0.01  # the share of the curvature that may be left out without a word


class LeftOut(NamedTuple):
    """The curvature of a link n in z = n(s), which Gauss–Newton with the cut at z leaves out.

    Args:
        link: What n is, for messages.
        share: The left out curvature Σ r ∂²n/∂s² beside that of ℓ ∘ n in s, along one direction.
        loss: ℓ ∘ n, which is ℓ for the outputs at hand.
        is_semidefinite: Whether the left out curvature is positive semi-definite.
    """

    link: str
    share: float
    loss: OutputLoss
    is_semidefinite: bool

    def warn(self, owner: str) -> None:
        """Warn that the curvature of a loss is not that in the logits."""
        warnings.warn(
            f"{owner}: the outputs are those of a {self.link}, whose curvature is left out (about "
            f"{100 * self.share:.0f} % of that in the logits); return the logits and let the loss "
            "apply that function, or use curvature='hessian' (optim.Newton). "
            "Implicit(check_curvature=True) reports the distance to the Hessian",
            RuntimeWarning,
            stacklevel=2,
        )


class Cut(NamedTuple):
    """A loss of the outputs where it has curvature.

    Args:
        loss: `[tasks, …] -> [tasks]`.
        is_linear: Whether even this loss is linear in the outputs, so that it has no curvature.
        left_out: The curvature of the model's last function, if it is not negligible.
    """

    loss: OutputLoss
    is_linear: bool = False
    left_out: LeftOut | None = None


def cut_before_log_softmax(loss: OutputLoss, z: Tensor, checked: Checked) -> Cut:
    """ℓ, or ℓ ∘ log-softmax if ℓ is linear in z and z are log-probabilities.

    A model and its loss can be cut in two at any place, and Gauss–Newton keeps the curvature that
    is behind the cut. If a model ends in log-softmax and its loss is linear (`nll_loss`), that is
    none. Since log-softmax leaves log-probabilities unchanged, ℓ ∘ log-softmax is the same function
    of θ, and its curvature in z is that of cross-entropy in the logits.

    Any other loss of log-probabilities or probabilities has curvature in z, but the curvature of
    the model's last function is missing in it. The cut says how much that is.

    Args:
        loss: ℓ, `[tasks, …] -> [tasks]`.
        z: The outputs of the model, `[tasks, …]`, without a graph.
        checked: What earlier checks of this loss have found. For outputs of one shape it is noted
            once that they are no probabilities, or how a linear loss is cut. A loss of
            probabilities that is not linear is looked at every time, because it may change.

    Example:
        >>> log_p = torch.tensor([[[0.2, 0.8]]]).log()
        >>> cut = cut_before_log_softmax(lambda z: -z[:, 0, 0], log_p, {})
        >>> _, product = output_hessian_product(cut.loss, log_p, torch.tensor([[[1.0, 0.0]]]))
        >>> product.squeeze(), cut.is_linear  # p₁p₂ = 0.16
        (tensor([ 0.1600, -0.1600]), False)
    """
    key = ("cut", z.shape, z.dtype)
    if key in checked:
        return Cut(loss if checked[key] is None else _compose(loss, checked[key]))

    is_linear = _is_linear(loss, z)
    slope = output_gradient(loss, z)[1].detach()
    link = find_link(loss, z, slope)
    if is_linear:
        if link is None or link.kind != "log-softmax" or _is_linear(_compose(loss, link), z):
            return Cut(loss, is_linear=True)
        checked[key] = link
        return Cut(_compose(loss, link))
    if link is not None:
        return Cut(loss, left_out=_find_left_out(loss, z, slope, link))
    if bool((slope != 0).any()):  # A loss that reads nothing tells nothing.
        checked[key] = None
    return Cut(loss)


def _compose(loss: OutputLoss, link: Link) -> OutputLoss:
    return lambda s: loss(link.apply(s))


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


def _find_left_out(loss: OutputLoss, z: Tensor, slope: Tensor, link: Link) -> LeftOut | None:
    """Σ r ∂²n/∂s² at z = n(s) with r = ∂ℓ/∂z, which is the Hessian of rᵀn(s) for a constant r."""

    def linear_part(s: Tensor) -> Tensor:
        terms = torch.where(slope == 0, 0.0, slope * link.apply(s))
        return terms.flatten(1).sum(1)

    composed = _compose(loss, link)
    s = link.invert(z)
    vector = random_outputs(s, seed=0)
    try:
        _, whole = output_hessian_product(composed, s, vector)
    except NoSecondDerivativeError:
        return None
    _, left_out = output_hessian_product(linear_part, s, vector)
    share = float(left_out.norm() / whole.norm())
    if not share > NEGLIGIBLE:  # It is NaN if the loss is not finite.
        return None
    return LeftOut(link.kind, share, composed, link.adds_curvature(slope))
