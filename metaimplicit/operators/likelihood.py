"""Likelihoods whose natural parameters are the outputs of a model, and their Fisher matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Likelihood = Literal["softmax", "gaussian", "sigmoid"]
Expectation = Literal["exact", "monte-carlo", "empirical"]


def check_fisher_options(owner: str, *, likelihood: str | None, expectation: str) -> None:
    """Raise ValueError if one of the options of a Fisher matrix is unknown.

    Args:
        owner: The class that has the options, for the message.
        likelihood: p(y|z), one of `Likelihood`, or None.
        expectation: How the expectation over y is taken, one of `Expectation`.

    Example:
        >>> check_fisher_options("KFAC", likelihood=None, expectation="exact")
    """
    if likelihood is not None:
        _check_word(owner, "likelihood", likelihood, known=get_args(Likelihood))
    _check_word(owner, "expectation", expectation, known=get_args(Expectation))


def _check_word(owner: str, argument: str, word: str, *, known: tuple[str, ...]) -> None:
    if word not in known:
        expected = ", ".join(known)
        raise ValueError(f"{owner} {argument}: got {word!r}, expected one of {expected}")


@dataclass(frozen=True)
class Family:
    """p(y|z) ∝ exp(yᵀz − a(z)): its mean μ and its Fisher matrix F = ∂μ/∂z depend on z alone.

    Args:
        name: `"softmax"` over the classes of an axis, or, output by output, `"sigmoid"`, the
            Bernoulli distribution of a logit, or `"gaussian"` with mean z and unit variance.
        axis: The axis of an example's outputs, counted from the end.

    Example:
        >>> Family("sigmoid").fisher_product(torch.tensor([0.5]), torch.ones(1))
        tensor([0.2500])
    """

    name: Likelihood
    axis: int = -1

    def mean(self, z: Tensor) -> Tensor:
        """μ(z), in the shape of z."""
        if self.name == "softmax":
            return z.softmax(self.axis)
        return z.sigmoid() if self.name == "sigmoid" else z

    def fisher_product(self, mean: Tensor, vector: Tensor) -> Tensor:
        """F v from μ, `[…, *z.shape] -> […, *z.shape]`."""
        if self.name == "gaussian":  # F = I
            return vector
        if self.name == "sigmoid":  # F = diag(μ (1 − μ))
            return mean * (1 - mean) * vector
        # F = diag(p) − p pᵀ
        weighted = mean * vector
        return weighted - mean * weighted.sum(self.axis, keepdim=True)

    def sum(self, x: Tensor) -> Tensor:
        """Sums over what one weight belongs to: the classes of a softmax, or one output."""
        return x.sum(self.axis, keepdim=True) if self.name == "softmax" else x


@dataclass(frozen=True)
class OutputLikelihood:
    """ℓ(z) = −Σᵢ wᵢ log p(yᵢ|zᵢ), up to a constant, at the outputs of a model.

    Args:
        family: p(y|z).
        mean: μ(z), `[tasks, …]`.
        weights: w, how often the loss counts each example (1/m in a mean over m examples), or each
            output. It broadcasts against z.

    Example:
        >>> z = torch.zeros(1, 1, 2)
        >>> likelihood = OutputLikelihood(Family("gaussian"), z, torch.ones(1, 1, 2))
        >>> likelihood.scores("exact").squeeze()
        tensor([[1., 0.],
                [0., 1.]])
        >>> likelihood.scores("monte-carlo").shape  # one draw
        torch.Size([1, 1, 1, 2])
    """

    family: Family
    mean: Tensor
    weights: Tensor

    def curvature_product(self, vector: Tensor) -> Tensor:
        """WF v, the product with ∂²ℓ/∂z², `[…, *z.shape] -> […, *z.shape]`."""
        return self.weights * self.family.fisher_product(self.mean, vector)

    def example_weights(self) -> Tensor:
        """The weight of each example among those of its task, of sum 1 or 0, `[tasks, m, …]`."""
        weights = self.weights.sum(self.family.axis)
        total = weights.sum(tuple(range(1, weights.dim())), keepdim=True)
        return weights / total.clamp(min=torch.finfo(total.dtype).tiny)

    def scores(
        self,
        expectation: Expectation,
        *,
        slope: Tensor | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Vectors s with Σ s sᵀ = w E[(∂ log p/∂z)(∂ log p/∂z)ᵀ] for each example.

        Args:
            expectation: E over y, as in `Fisher`.
            slope: ∂ℓ/∂z, in the shape of z, for `"empirical"`.
            samples: The number of draws for each example, for `"monte-carlo"`.
            generator: The generator of the draws, which are made on its device.

        Returns:
            `[count, *z.shape]`. The count is 1 with `"empirical"`, `samples` with `"monte-carlo"`,
            and the number of an example's outputs with `"exact"`.
        """
        if expectation == "empirical" and slope is not None:
            # The loss counts ∂ log p/∂z with w, and s sᵀ is to count it once.
            root = self.weights.sqrt()
            return torch.where(root > 0, slope / root, 0.0).unsqueeze(0)
        if expectation == "exact":
            return self.weights.sqrt() * self._all_scores()
        return (self.weights / samples).sqrt() * self._draw_scores(samples, generator)

    def _all_scores(self) -> Tensor:
        """Vectors s with Σ s sᵀ = F."""
        mean = self.mean
        axis = self.family.axis
        d = mean.shape[axis]
        unit = torch.eye(d, dtype=mean.dtype, device=mean.device)
        # e_y has its 1 at position y of the axis.
        unit = unit.reshape(d, *[1] * (mean.dim() + axis), d, *[1] * (-1 - axis))
        if self.family.name == "softmax":
            # −∂ log p/∂z = p − e_y, weighted by the square root of the probability of y.
            return mean.movedim(axis, 0).unsqueeze(axis).sqrt() * (mean - unit)
        if self.family.name == "sigmoid":
            return unit * (mean * (1 - mean)).sqrt()
        return unit.expand(d, *mean.shape)

    def _draw_scores(self, samples: int, generator: torch.Generator | None) -> Tensor:
        """μ − y for y drawn from p(y|z)."""
        mean = self.mean if generator is None else self.mean.to(generator.device)
        return self._scores_of_draws(mean, samples, generator).to(self.mean.device)

    def _scores_of_draws(
        self, mean: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """μ − y, `[samples, *μ.shape]`, on the device of the generator, where μ is."""
        shape = (samples, *mean.shape)
        if self.family.name == "gaussian":  # of unit variance, so that μ − y is standard normal
            return torch.randn(
                shape,
                generator=generator,
                dtype=mean.dtype,
                device=mean.device,
            )
        if self.family.name == "sigmoid":
            return mean - torch.bernoulli(mean.expand(shape), generator=generator)
        p = mean.movedim(self.family.axis, -1)
        draws = torch.multinomial(
            p.flatten(0, -2),
            samples,
            replacement=True,
            generator=generator,
        )
        labels = draws.T.reshape(samples, *p.shape[:-1])
        one_hot = torch.nn.functional.one_hot(labels, p.shape[-1]).to(p)
        return mean - one_hot.movedim(-1, self.family.axis)
