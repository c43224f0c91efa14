"""The Fisher matrix of a model whose outputs are the parameters of a distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.operators.curvature import LossParts
from metaimplicit.operators.cut import Cut
from metaimplicit.operators.gauss_newton import GGN
from metaimplicit.operators.likelihood import Expectation, Likelihood, check_fisher_options
from metaimplicit.operators.likelihood_inference import infer_likelihood
from metaimplicit.operators.output_loss import Checked, OutputLoss
from metaimplicit.params import Params


class Fisher(GGN):
    """F = Σᵢ wᵢ E[(∂ log p(y|zᵢ)/∂θ)(∂ log p(y|zᵢ)/∂θ)ᵀ] = Jᵀ F_z J for ℓ = −Σᵢ wᵢ log p(yᵢ|zᵢ).

    The weights wᵢ are those of the loss: 1/m in a mean over m examples, and 0 for an example that
    the loss ignores. They and p(y|z) are inferred from the loss, see `infer_likelihood`.

    With the exact expectation it is the Gauss–Newton matrix of the loss (Martens 2020, §9), and the
    Hessian of the symmetrised KL divergence at zero displacement.

    Args:
        outputs: z, `{name: [tasks, *shape]} -> [tasks, …, d]`, task by task. Every axis between the
            first and the last is an axis of examples. The classes of a softmax may be on any axis
            after the examples'.
        loss: `[tasks, …, d] -> [tasks]`, −log p(y|z) of the examples in any weighted sum.
        params: The point θ, `{name: [tasks, *shape]}`.
        likelihood: p(y|z): `"softmax"` over the classes, `"gaussian"` with mean z and unit
            variance, or `"sigmoid"`, where each output is the logit of a Bernoulli distribution.
            If None, the one that the loss has.
        expectation: E over y. `"exact"` is computed in closed form. `"monte-carlo"` takes `samples`
            draws from p(y|z), the same in every product. `"empirical"` takes the targets of the
            data (which is no expectation: Kunstner et al. 2019). It needs no likelihood: for a loss
            that has none of them, wᵢ = 1/n for each of the n examples that it reads, and a warning
            says so.
        samples: Draws for each example, ≥ 1, with `"monte-carlo"`.
        generator: A generator of the draws, which are made on its device. If None, torch's default.
        checked: What earlier checks of this loss have found. If None, they are made again.

    Raises:
        ValueError: The loss is −log p of no such likelihood. An unknown `likelihood` or
            `expectation`, `samples` below 1, or outputs with fewer than three axes.

    Example:
        >>> params = {"z": torch.zeros(1, 1, 2)}  # one task, one example, two classes
        >>> fisher = Fisher(lambda p: p["z"], lambda z: z.logsumexp(-1).mean(1), params)
        >>> fisher.matvec(torch.tensor([[1.0, 0.0]]))  # F_z = diag(p) − p pᵀ, p = (½, ½)
        tensor([[ 0.2500, -0.2500]])
    """

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(
        self,
        outputs: Callable[[Params], Tensor],
        loss: OutputLoss,
        params: Params,
        *,
        likelihood: Likelihood | None = None,
        expectation: Expectation = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
        checked: Checked | None = None,
    ) -> None:
        check_fisher_options("Fisher", likelihood=likelihood, expectation=expectation)
        check_count("Fisher samples", samples)
        checked = {} if checked is None else checked
        super().__init__(outputs, loss, params, checked=checked)

        z = self._outputs.detach()
        if z.dim() < 3:
            raise ValueError(
                f"Fisher outputs: got shape {tuple(z.shape)}, expected [tasks, examples, …, d]"
            )
        self._likelihood = infer_likelihood(
            self._loss,
            z,
            owner="Fisher",
            likelihood=likelihood,
            checked=checked,
            otherwise="mean" if expectation == "empirical" else "raise",
        )
        self._scores: Tensor | None = None
        if expectation != "exact":
            self._scores = self._likelihood.scores(
                expectation,
                slope=self._slope.detach(),
                samples=samples,
                generator=generator,
            )

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Fisher:
        """The Fisher matrix of a loss; `options` are the keyword arguments of the constructor."""
        return cls(
            parts.outputs,
            parts.loss,
            parts.params,
            checked=parts.checked,
            **options,
        )

    def check_convex(self, steps: int = 20) -> None:
        """Do nothing: F is positive semi-definite, because no weight is negative."""

    def _choose(self, cut: Cut) -> OutputLoss:
        """The loss behind the cut. Another cut has another likelihood."""
        if cut.left_out is not None:
            cut.left_out.warn("Fisher")
        return cut.loss

    def _warn_of_zero(self) -> None:
        """Do nothing: F does not come from ∂²ℓ/∂z²."""

    def _output_hessian_product(
        self,
        tangent: Tensor,
        batched: bool,
    ) -> Tensor:
        if self._scores is None:
            return self._likelihood.curvature_product(tangent)
        # F_z = Σ s sᵀ
        axis = self._likelihood.family.axis
        terms = [score * (score * tangent).sum(axis, keepdim=True) for score in self._scores]
        return torch.stack(terms).sum(0)
