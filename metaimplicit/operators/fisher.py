"""The Fisher matrix of a model whose outputs are the parameters of a distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaimplicit.operators.curvature import LossParts
from metaimplicit.operators.gauss_newton import GGN
from metaimplicit.params import Params

Likelihood = Literal["softmax", "gaussian"]
Expectation = Literal["exact", "monte-carlo", "empirical"]


class Fisher(GGN):
    """F = (1/m) Σᵢ E[(∂ log p(y|zᵢ)/∂θ)(∂ log p(y|zᵢ)/∂θ)ᵀ] = Jᵀ F_z J, over m examples.

    With the exact expectation it is the Gauss–Newton matrix of the mean negative log-likelihood
    (Martens 2020, §9), and the Hessian of the symmetrised KL divergence at zero displacement.

    Args:
        outputs: z, `{name: [tasks, *shape]} -> [tasks, …, d]`, task by task. Every axis between the
            first and the last is an axis of examples.
        loss: `[tasks, …, d] -> [tasks]`, the mean over examples of one loss each. The empirical
            Fisher matrix consists of their gradients.
        params: The point θ, `{name: [tasks, *shape]}`.
        likelihood: p(y|z): `"softmax"` over the last axis, or `"gaussian"` with mean z and unit
            variance.
        expectation: E over y. `"exact"` is computed in closed form. `"monte-carlo"` takes `samples`
            draws from p(y|z), the same in every product. `"empirical"` takes the targets of the
            data (which is no expectation: Kunstner et al. 2019).
        samples: Draws for each example, ≥ 1, with `"monte-carlo"`.
        generator: A generator of the draws, on the device of the outputs. If None, torch's default.

    Raises:
        ValueError: An unknown `likelihood` or `expectation`, `samples` below 1, or outputs with
            fewer than three axes.

    Example:
        >>> params = {"z": torch.zeros(1, 1, 2)}  # one task, one example, two classes
        >>> fisher = Fisher(lambda p: p["z"], lambda z: z.logsumexp(-1).mean(1), params)
        >>> fisher.matvec(torch.tensor([[1.0, 0.0]]))  # F_z = diag(p) − p pᵀ, p = (½, ½)
        tensor([[ 0.2500, -0.2500]])
    """

    def __init__(
        self,
        outputs: Callable[[Params], Tensor],
        loss: Callable[[Tensor], Tensor],
        params: Params,
        *,
        likelihood: Likelihood = "softmax",
        expectation: Expectation = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_word("likelihood", likelihood, get_args(Likelihood))
        _check_word("expectation", expectation, get_args(Expectation))
        if samples < 1:
            raise ValueError(f"Fisher samples: got {samples}, expected at least 1")
        super().__init__(outputs, loss, params)

        z = self._outputs.detach()
        if z.dim() < 3:
            raise ValueError(
                f"Fisher outputs: got shape {tuple(z.shape)}, expected [tasks, examples, …, d]"
            )
        self.likelihood = likelihood
        self._examples = z[0, ..., 0].numel()
        self._probabilities = z.softmax(-1)
        self._scores: Tensor | None = None
        if expectation != "exact":
            self._scores = output_scores(
                z,
                self._slope.detach(),
                likelihood=likelihood,
                expectation=expectation,
                samples=samples,
                generator=generator,
            )

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Fisher:
        """The Fisher matrix of a loss; `options` are the keyword arguments of the constructor."""
        if parts.weighted:
            raise ValueError(
                "Fisher: got an inner loss with weights, which it does not see; use 'gauss-newton'"
            )
        return cls(parts.outputs, parts.loss, parts.params, **options)

    def check_convex(self, steps: int = 20) -> None:
        """Do nothing: F is positive semi-definite for any loss."""

    def _output_hessian_product(
        self,
        tangent: Tensor,
        batched: bool,
    ) -> Tensor:
        if self._scores is not None:  # F_z = Σ s sᵀ
            terms = [score * (score * tangent).sum(-1, keepdim=True) for score in self._scores]
            return torch.stack(terms).sum(0) / self._examples
        if self.likelihood == "gaussian":  # F_z = I
            return tangent / self._examples
        # F_z = diag(p) − p pᵀ
        p = self._probabilities
        weighted = p * tangent
        return (weighted - p * weighted.sum(-1, keepdim=True)) / self._examples


def output_scores(
    z: Tensor,
    slope: Tensor,
    likelihood: Likelihood,
    expectation: Expectation,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Vectors s with Σ s sᵀ = E[(∂ log p/∂z)(∂ log p/∂z)ᵀ] for each example, `[count, *z.shape]`.

    The count is 1 with `"empirical"`, `samples` with `"monte-carlo"`, and d with `"exact"`.

    Args:
        z: Outputs, `[tasks, …, d]`.
        slope: The gradient of the mean loss over examples in z, in the shape of z. It is read with
            `"empirical"` alone.
        likelihood: As in `Fisher`.
        expectation: As in `Fisher`.
        samples: As in `Fisher`.
        generator: As in `Fisher`.

    Example:
        >>> z = torch.zeros(1, 1, 2)
        >>> output_scores(z, z, likelihood="gaussian", expectation="exact").squeeze()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if expectation == "empirical":
        return slope.unsqueeze(0) * z[0, ..., 0].numel()
    if likelihood == "gaussian":
        return _gaussian_scores(z, expectation, samples, generator=generator)
    return _softmax_scores(z, expectation, samples, generator=generator)


def _gaussian_scores(
    z: Tensor, expectation: Expectation, samples: int, *, generator: torch.Generator | None
) -> Tensor:
    """−∂ log p/∂z = z − y is a standard normal vector, and the identity is its second moment."""
    if expectation == "monte-carlo":
        noise = torch.randn(samples, *z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return noise * torch.tensor(samples**-0.5).to(noise)
    d = z.shape[-1]
    unit = torch.eye(d, dtype=z.dtype, device=z.device)
    return unit.reshape(d, *[1] * (z.dim() - 1), d).expand(d, *z.shape)


def _softmax_scores(
    z: Tensor, expectation: Expectation, samples: int, *, generator: torch.Generator | None
) -> Tensor:
    """−∂ log p/∂z = p − e_y, weighted by the square root of the probability of y."""
    d = z.shape[-1]
    p = z.softmax(-1)
    if expectation == "exact":
        classes = torch.arange(d, device=z.device).reshape(d, *[1] * (z.dim() - 1))
        labels = classes.expand(d, *z.shape[:-1])
        weight = p.movedim(-1, 0).sqrt().unsqueeze(-1)
    else:
        draws = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
        labels = draws.T.reshape(samples, *z.shape[:-1])
        weight = torch.tensor(samples**-0.5).to(z)
    scores: Tensor = weight * (p - torch.nn.functional.one_hot(labels, d).to(z))
    return scores


def _check_word(argument: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        expected = ", ".join(known)
        raise ValueError(f"Fisher {argument}: got {word!r}, expected one of {expected}")
