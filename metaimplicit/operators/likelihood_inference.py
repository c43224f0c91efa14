"""The likelihood behind a loss: −Σᵢ wᵢ log p(yᵢ|zᵢ), with p and w inferred from its curvature."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from metaimplicit.operators.likelihood import (
    Family,
    Likelihood,
    OutputLikelihood,
)
from metaimplicit.operators.output_loss import (
    Checked,
    NoSecondDerivativeError,
    OutputLoss,
    output_gradient,
    output_hessian_product,
    random_outputs,
    widen,
)

Otherwise = Literal["raise", "mean", "diagonal"]


def infer_likelihood(
    loss: OutputLoss,
    z: Tensor,
    *,
    owner: str,
    likelihood: Likelihood | None,
    checked: Checked,
    otherwise: Otherwise = "raise",
) -> OutputLikelihood:
    """The likelihood whose −log p a loss is, with the weight that it gives each example.

    The Hessian of such a loss is ∂²ℓ/∂z² = diag(wᵢ F(zᵢ)) at any z. This is verified along random
    directions, at two random z of unit size and at the model's outputs. So the weights are those
    of the loss, whatever they come from: a mean or a sum over examples, labels that are ignored,
    weights of classes or examples, masks.

    Args:
        loss: ℓ, `[tasks, …] -> [tasks]`.
        z: The outputs of the model, `[tasks, m, …]`, without a graph.
        owner: The class that needs the likelihood, for an error's message.
        likelihood: The family that the loss has to have. If None, any will do.
        checked: What earlier checks of this loss have found. The family that it had for outputs of
            this shape is tried first, at fewer points. A loss may change, as one with a learnt
            temperature does, so it is verified every time, and so are the weights.
        otherwise: What happens if no family fits. With `"raise"` that is an error. With `"mean"`
            each of the n examples that the loss reads counts 1/n, and a warning says so. With
            `"diagonal"` a Gaussian takes the diagonal of ∂²ℓ/∂z² for its weights.

    Raises:
        ValueError: No family fits, or a weight is negative, and `otherwise` is `"raise"`.

    Example:
        >>> z = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])  # one task, two examples
        >>> found = infer_likelihood(
        ...     lambda z: z.square().mean((1, 2)), z, owner="Fisher", likelihood=None, checked={}
        ... )
        >>> found.family.name, found.weights.tolist()
        ('gaussian', [[[0.5, 0.5], [0.5, 0.5]]])
    """
    key = (likelihood, z.shape, z.dtype)
    family = checked.get(key)
    if family is not None:
        family = _find_family(loss, z, [family], draws=1)
    if family is None:
        family = _find_family(loss, z, _candidates(likelihood, z.dim()), draws=2)
    if family is None and not _is_finite(loss, z):
        # Nothing is to be learnt from a loss that is not finite, and its gradient is not, either.
        return OutputLikelihood(Family("gaussian"), z, torch.full_like(z, torch.nan))
    checked[key] = family
    if family is not None:
        return OutputLikelihood(family, family.mean(z), _weights(family, loss, z))
    if otherwise == "mean":
        return OutputLikelihood(Family("gaussian"), z, _equal_weights(loss, z, owner))
    if otherwise == "diagonal":
        signs = random_outputs(z, seed=0).sign()
        _, product = output_hessian_product(loss, z, signs)
        return OutputLikelihood(Family("gaussian"), z, (signs * product).clamp(min=0))
    name = f"no {', '.join(get_args(Likelihood))}" if likelihood is None else f"no {likelihood}"
    raise ValueError(
        f"{owner}: got a loss that is −log p of {name} likelihood, not even with weights ≥ 0 of "
        "the examples; use Gauss–Newton: curvature='gauss-newton', or optim.GaussNewton"
    )


def _equal_weights(loss: OutputLoss, z: Tensor, owner: str) -> Tensor:
    """1/n for each of the n examples of a task that a loss reads, and 0 for the others."""
    is_read = torch.zeros_like(z[..., 0], dtype=torch.bool)
    for at in (z, random_outputs(z, 1), random_outputs(z, 2)):
        is_read |= (output_gradient(loss, at)[1] != 0).any(-1)
    counted = is_read.to(z)
    n = counted.flatten(1).sum(1).clamp(min=1)
    warnings.warn(
        f"{owner} expectation: got 'empirical' for a loss that is −log p of no likelihood, so it "
        "does not tell the weights of its examples; they count as in a mean over those that the "
        "loss reads. If it is a sum or has other weights, use Gauss–Newton",
        RuntimeWarning,
        stacklevel=2,
    )
    weights = counted / n.reshape(-1, *[1] * (counted.dim() - 1))
    return weights.unsqueeze(-1).expand_as(z)


def _weights(family: Family, loss: OutputLoss, z: Tensor) -> Tensor:
    """W from ∂²ℓ/∂z² = wF, at outputs where F is far from zero."""
    if family.name == "gaussian":  # F = I everywhere
        return output_hessian_product(loss, z, torch.ones_like(z))[1]
    zeros = torch.zeros_like(z)
    if family.name == "sigmoid":  # F(0) = ¼
        return 4 * output_hessian_product(loss, zeros, torch.ones_like(z))[1]
    # vᵀF(0)v is the variance of v over d equal classes: (d² − 1)/12 for v = 0 … d − 1.
    d = z.shape[family.axis]
    steps = torch.arange(d, dtype=z.dtype, device=z.device)
    v = steps.reshape(d, *[1] * (-1 - family.axis)).expand_as(z)
    product = output_hessian_product(loss, zeros, v)[1]
    return family.sum(v * product) / max((d * d - 1) / 12, 0.25)


class _Evidence(NamedTuple):
    """What a loss does at some outputs.

    Args:
        z: The outputs.
        vector: v.
        slope: ∂ℓ/∂z.
        product: (∂²ℓ/∂z²) v.
        slack: By how much the product may differ from wF v, as a part of w‖v‖.
    """

    z: Tensor
    vector: Tensor
    slope: Tensor
    product: Tensor
    slack: float


def _candidates(likelihood: Likelihood | None, dims: int) -> list[Family]:
    """The families that a loss of outputs with so many axes may have."""
    names = get_args(Likelihood) if likelihood is None else (likelihood,)
    families = [Family(name) for name in names]
    if "softmax" in names:  # The classes may be on any axis after that of the examples.
        families += [Family("softmax", axis) for axis in range(2 - dims, -1)]
    return families


def _find_family(
    loss: OutputLoss, z: Tensor, families: Sequence[Family], *, draws: int
) -> Family | None:
    """The first family whose Fisher matrices F fit the loss: ∂²ℓ/∂zᵢ² = wᵢ F(zᵢ) with wᵢ ≥ 0.

    This is looked at along one random direction at each of `draws` random z of unit size, where
    round-off is all that may differ, and at the model's outputs z. It is None if no family fits,
    as for every loss without second derivatives, or with infinite ones at a random z.
    """
    z = widen(loss, z)
    with torch.no_grad():
        eps = max(torch.finfo(x.dtype).eps for x in (z, loss(z)))
    tol = eps**0.5
    points = [(random_outputs(z, 1 + draw), 100 * eps) for draw in range(draws)]
    # A model's outputs may be far from zero, where torch's softplus leaves out terms up to e⁻²⁰.
    points.append((z, tol))
    evidence = []
    try:
        for seed, (at, slack) in enumerate(points):
            v = random_outputs(z, 3 + seed)
            evidence.append(
                _Evidence(
                    at,
                    v,
                    *output_hessian_product(loss, at, v),
                    slack,
                )
            )
    except NoSecondDerivativeError:
        return None
    if not all(bool(seen.product.isfinite().all()) for seen in evidence[:draws]):
        return None  # The loss is no function of logits or means, which may be any numbers.

    for family in families:
        weights = _weights(family, loss, evidence[0].z)
        if all(_explains(family, weights, seen, tol) for seen in evidence):
            return family
    return None


def _explains(family: Family, weights: Tensor, seen: _Evidence, tol: float) -> bool:
    """Whether ∂²ℓ/∂z² = wF at some outputs, as far as one product can tell."""

    def norm(x: Tensor) -> Tensor:
        return family.sum(x.square()).sqrt()

    # Where the loss has no curvature it has to be constant: it ignores the example. A negative
    # weight is refused by the same rule.
    largest = weights.max()
    stray = (weights <= tol * largest) & (norm(seen.slope) > tol * seen.slope.abs().max())
    if bool(stray.any()):
        return False

    expected = weights * family.fisher_product(family.mean(seen.z), seen.vector)
    error = norm(seen.product - expected)
    fits = error <= tol * norm(expected) + seen.slack * largest * norm(seen.vector)
    # Outputs at which the loss is not finite say nothing.
    is_unknown = ~norm(seen.slope).isfinite()
    return bool((fits | is_unknown).all())


def _is_finite(loss: OutputLoss, z: Tensor) -> bool:
    """Whether the slope of a loss is finite."""
    return bool(output_gradient(loss, z)[1].isfinite().all())
