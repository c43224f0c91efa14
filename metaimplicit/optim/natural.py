"""Gauss–Newton and the natural gradient: curvature through the outputs, positive semi-definite."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from metaimplicit import operators
from metaimplicit.operators import Expectation, Fisher, Identity, Likelihood
from metaimplicit.optim.base import Loss, ReplayedClosure, check_likelihood, check_loss
from metaimplicit.optim.damped import Curvature, Damped
from metaimplicit.solvers import Solver


class _Generalised(Damped):
    """A curvature through the outputs: positive semi-definite."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float,
        damping: float,
        adapt_damping: bool,
        solver: Solver | None,
        **more: Any,
    ) -> None:
        check_loss(type(self).__name__, loss)
        super().__init__(
            model, lr=lr, damping=damping, adapt_damping=adapt_damping, solver=solver, **more
        )
        self.loss = loss

    def _linearise(self, evaluate: ReplayedClosure) -> tuple[operators.GGN, Tensor]:
        outputs, loss, seen = self._split(evaluate, self.loss)
        operator = self._curvature(outputs, loss)
        return operator, seen["loss"]

    @abstractmethod
    def _curvature(self, outputs: Any, loss: Any) -> operators.GGN: ...

    def _value(self, found: Any) -> Tensor:
        z, targets = self._pair(found)
        return self._scalar(self.loss(z, targets), "loss")


class GaussNewton(_Generalised):
    """θ ← θ − lr (G + λI)⁻¹∇L with G = Jᵀ (∂²ℓ/∂z²) J, z the outputs, J = ∂z/∂θ (Schraudolph 2002).

    λ follows ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), m(δ) = L + ∇Lᵀδ + ½ δᵀGδ: 4λ where ρ < ¼, ½λ where ρ > ¾; where ρ ≤ 0
    the step is taken back. For ½‖z − y‖² this is the method of Levenberg (1944) and Marquardt (1963).

    Args:
        model: whose parameters that require grad are moved.
        loss: `(outputs, targets) -> scalar`, the mean over examples of one convex in the outputs.
        lr: length of the step, > 0.
        damping: λ to start from; it is `param_groups[0]["damping"]`.
        adapt_damping: let λ follow ρ, at one evaluation more for each step; else λ ≥ 0 is fixed and every step is taken.
        solver: None for `Dense` up to 1024 parameters and CG of at most 50 products above.

    Raises:
        ValueError: a number out of range; on a step, a closure that is none of `closure() -> (outputs, targets)`, or a
            loss that is not scalar, or seen not to be convex.
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
            model, loss, lr=lr, damping=damping, adapt_damping=adapt_damping, solver=solver
        )

    def _curvature(self, outputs: Any, loss: Any) -> operators.GGN:
        return operators.GGN(outputs, loss, self._leaves())

    def _direction(self, operator: Curvature, g: Tensor, damping: float) -> Tensor:
        solution = self.solver.solve(operator + Identity(operator, damping), g)
        if isinstance(operator, operators.GGN) and bool(
            (solution.rayleigh < 0.999 * damping).any()
        ):
            try:
                operator.check_convex()
            except ValueError as error:
                raise ValueError(
                    "GaussNewton loss: got one not convex in the outputs; use Newton"
                ) from error
        return solution.value


class NaturalGradient(_Generalised):
    """θ ← θ − lr (F + λI)⁻¹∇L with F = E[∇log p ∇log pᵀ] of p(y|z), the Fisher matrix (Amari 1998; Martens 2020).

    At λ = 0 and a small lr the step is the same in any coordinates of the parameters. λ follows ρ = (L(θ) − L(θ + δ))/
    (m(0) − m(δ)), m(δ) = L + ∇Lᵀδ + ½ δᵀFδ: 4λ where ρ < ¼, ½λ where ρ > ¾; where ρ ≤ 0 the step is taken back.

    Args:
        model: whose parameters that require grad are moved.
        loss: `(outputs, targets) -> scalar`, the mean of −log p over examples: of outputs `[m, …, d]`, cross-entropy
            over the last axis, or for `"gaussian"` ½ Σ_d (z − y)², which is d/2 times `F.mse_loss`.
        lr: length of the step, > 0.
        damping: λ to start from; it is `param_groups[0]["damping"]`.
        adapt_damping: let λ follow ρ, at one evaluation more for each step; else λ ≥ 0 is fixed and every step is taken.
        likelihood: p(y|z), `"softmax"`, or `"gaussian"` of unit variance.
        expectation: over y, `"exact"`; `"monte-carlo"`, of one draw for each example; or `"empirical"`, the targets.
        solver: None for `Dense` up to 1024 parameters and CG of at most 50 products above.
        seed: of the draws.

    Raises:
        ValueError: a number out of range; on a step, a closure that is none of `closure() -> (outputs, targets)`, or a
            loss that is not scalar.
    """

    axes = 2

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        adapt_damping: bool = True,
        likelihood: Likelihood = "softmax",
        expectation: Expectation = "exact",
        solver: Solver | None = None,
        seed: int = 0,
    ) -> None:
        check_likelihood("NaturalGradient", loss, likelihood, expectation)
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

    def _curvature(self, outputs: Any, loss: Any) -> Fisher:
        return Fisher(
            outputs,
            loss,
            self._leaves(),
            likelihood=self.likelihood,
            expectation=self.expectation,
            generator=self._generator() if self.expectation == "monte-carlo" else None,
        )
