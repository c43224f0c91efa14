"""Gauss–Newton and the natural gradient: positive semi-definite curvature through the outputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from metaimplicit.operators import (
    GGN,
    Curvature,
    Expectation,
    Fisher,
    Identity,
    Likelihood,
)
from metaimplicit.operators.likelihood import check_fisher_options
from metaimplicit.optim.base import BatchLoss, Loss
from metaimplicit.optim.checks import check_loss
from metaimplicit.optim.closure import ReplayedClosure
from metaimplicit.optim.damped import Damped, Linearised
from metaimplicit.optim.damping import MeasuredLoss
from metaimplicit.solvers import Solver


class _GeneralisedGaussNewton(Damped):
    """A damped step with C = Jᵀ C_z J, where J = ∂z/∂θ and C_z is a curvature in the outputs z."""

    def __init__(self, model: nn.Module, loss: Loss, **options: Any) -> None:
        check_loss(type(self).__name__, loss)
        super().__init__(model, **options)
        self.loss = loss

    def _linearise(self, evaluate: ReplayedClosure) -> Linearised:
        batch = BatchLoss(self, evaluate, self.loss)
        operator = self._make_curvature(batch)
        return operator, batch.value, batch.measure

    @abstractmethod
    def _make_curvature(self, batch: BatchLoss) -> Curvature: ...

    def _loss_of(self, result: Any) -> MeasuredLoss:
        return MeasuredLoss.of_outputs(self.loss, *self._unpack(result))


class GaussNewton(_GeneralisedGaussNewton):
    """θ ← θ − lr (G + λI)⁻¹∇L with G = Jᵀ (∂²ℓ/∂z²) J and J = ∂z/∂θ (Schraudolph 2002).

    z are the outputs of the model and ℓ is the loss as a function of them. For ½‖z − y‖² this is
    the method of Levenberg (1944) and Marquardt (1963).

    The model of the loss is m(δ) = L + ∇Lᵀδ + ½ δᵀGδ. With ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), λ
    becomes 4λ if ρ < ¼ and ½λ if ρ > ¾. If ρ ≤ 0, the step is taken back.

    Args:
        model: The model whose parameters that require grad are moved.
        loss: `(outputs, targets) -> scalar`, the mean over examples of a loss that is convex in the
            outputs.
        lr: The length of the step, > 0.
        damping: λ at the start, > 0. The present one is `param_groups[0]["damping"]`.
        adapt_damping: Whether λ follows ρ, which costs one more evaluation of the closure. If
            False, λ is fixed, may be 0, and every step is taken.
        solver: What solves with G + λI. If None, `Dense` for up to 1024 parameters, and CG with at
            most 50 products above.

    Raises:
        ValueError: A number is out of range, the loss is no function, or the model has no
            parameters, or some of several types or in half precision.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> model = nn.Linear(1, 1)
        >>> optimizer = GaussNewton(model, nn.functional.mse_loss, damping=1e-6)
        >>> for _ in range(2):
        ...     loss = optimizer.step(lambda: (model(x), 3 * x))
        >>> abs(model.weight.item() - 3) < 1e-3
        True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        adapt_damping: bool = True,
        solver: Solver | None = None,
    ) -> None:
        super().__init__(
            model,
            loss,
            lr=lr,
            damping=damping,
            adapt_damping=adapt_damping,
            solver=solver,
        )

    def _make_curvature(self, batch: BatchLoss) -> Curvature:
        return GGN(
            batch.outputs,
            batch.loss,
            self._task_params(),
            checked=self._checked,
        )

    def _direction(self, operator: Curvature, g: Tensor, damping: float) -> Tensor:
        solution = self.solver.solve(operator + Identity(operator, damping), g)
        # λ is the smallest eigenvalue that G + λI can have if the loss is convex.
        if bool((solution.rayleigh < 0.999 * damping).any()):
            try:
                operator.check_convex()
            except ValueError as error:
                raise ValueError(
                    "GaussNewton loss: got one that is not convex in the outputs; use Newton"
                ) from error
        return solution.value


class NaturalGradient(_GeneralisedGaussNewton):
    """θ ← θ − lr (F + λI)⁻¹∇L with the Fisher matrix F = E[∇log p ∇log pᵀ] of p(y|z).

    z are the outputs of the model (Amari 1998; Martens 2020). With λ = 0 and a small lr, the step
    is the same in all coordinates of the parameters.

    The model of the loss is m(δ) = L + ∇Lᵀδ + ½ δᵀFδ. With ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), λ
    becomes 4λ if ρ < ¼ and ½λ if ρ > ¾. If ρ ≤ 0, the step is taken back.

    Args:
        model: The model whose parameters that require grad are moved. Its outputs are `[m, …, d]`.
        loss: `(outputs, targets) -> scalar`, −log p of the examples in any weighted sum: the forms
            of cross-entropy, squared error, and binary cross-entropy of logits. F counts examples
            as the loss does.
        lr: The length of the step, > 0.
        damping: λ at the start. The present one is `param_groups[0]["damping"]`.
        adapt_damping: Whether λ follows ρ, which costs one more evaluation of the closure. If
            False, λ ≥ 0 is fixed and every step is taken.
        likelihood: p(y|z): `"softmax"`, `"gaussian"` with unit variance, or `"sigmoid"`. If None,
            the one that the loss has.
        expectation: The expectation over y: `"exact"`; `"monte-carlo"`, with one draw for each
            example; or `"empirical"`, with the targets in the place of y.
        solver: What solves with F + λI. If None, `Dense` for up to 1024 parameters, and CG with at
            most 50 products above.
        seed: The seed of the draws.

    Raises:
        ValueError: A number is out of range, or the model has no parameters, or some of several
            types or in half precision. On a step: the loss is −log p of no such likelihood.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.tensor([[-1.0], [1.0], [2.0]])
        >>> y = torch.tensor([0, 1, 0])
        >>> model = nn.Linear(1, 2)
        >>> optimizer = NaturalGradient(model, nn.functional.cross_entropy)
        >>> losses = [optimizer.step(lambda: (model(x), y)).item() for _ in range(2)]
        >>> losses[1] < losses[0]
        True
    """

    min_output_dims = 2

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        adapt_damping: bool = True,
        likelihood: Likelihood | None = None,
        expectation: Expectation = "exact",
        solver: Solver | None = None,
        seed: int = 0,
    ) -> None:
        check_fisher_options(
            "NaturalGradient",
            likelihood=likelihood,
            expectation=expectation,
        )
        super().__init__(
            model,
            loss,
            lr=lr,
            damping=damping,
            adapt_damping=adapt_damping,
            solver=solver,
            seed=seed,
        )
        self.likelihood = likelihood
        self.expectation: Expectation = expectation

    def _make_curvature(self, batch: BatchLoss) -> Curvature:
        samples = self.expectation == "monte-carlo"
        generator = self._make_generator() if samples else None
        return Fisher(
            batch.outputs,
            batch.loss,
            self._task_params(),
            likelihood=self.likelihood,
            expectation=self.expectation,
            generator=generator,
            checked=self._checked,
        )
