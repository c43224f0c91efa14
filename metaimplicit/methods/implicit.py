"""Implicit differentiation of a stationary point."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaimplicit.inner import InnerLoop
from metaimplicit.methods.base import (
    UNSET,
    Adaptation,
    Dependencies,
    Gradients,
    Method,
    Report,
    data_at_solution,
    retry_under_vmap,
    run_inner,
    vector_jacobian_product,
)
from metaimplicit.operators import (
    GGN,
    Diagonal,
    Fisher,
    Hessian,
    Identity,
    KroneckerFactored,
    LinearOperator,
    Products,
    Sum,
    central_difference,
)
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.problem import Composite, Iterate, LiftedProblem, Proximal, resolve
from metaimplicit.solvers import ADVICE, CG, Solution, Solver, State

Curvature = (
    Literal["hessian", "gauss-newton", "kfac", "ekfac", "diagonal"]
    | Callable[..., GGN | KroneckerFactored | Diagonal]
)
_NAMED: dict[str, Callable[..., GGN | KroneckerFactored | Diagonal]] = {
    "gauss-newton": GGN,
    "kfac": partial(KroneckerFactored, others="zero"),
    "ekfac": partial(KroneckerFactored, others="zero", corrected=True),
    "diagonal": lambda outputs, loss, params: Diagonal(
        GGN(outputs, loss, params), semidefinite=True
    ),
}


@dataclass(frozen=True)
class Implicit(Method):
    """(dθ*/dφ)ᵀ v = −(∂²f/∂θ∂φ)ᵀ A⁻¹ v, by the implicit function theorem at ∂f/∂θ(θ*, φ) = 0.

    Exact if θ* is stationary, the solve exact and A = ∂²f/∂θ² + damping·I undamped and the true Hessian. Nothing of
    the inner loop is stored, so memory is flat in its steps (Rajeswaran et al. 2019; Lorraine et al. 2020).

    Args:
        solver: how A⁻¹v is computed.
        curvature: `"hessian"`; or, positive semi-definite and of a `Composite` inner loss, `"gauss-newton"`, `"kfac"`,
            `"ekfac"`, `"diagonal"` (of Gauss–Newton), or a class of such an operator with options,
            `partial(Fisher, expectation="empirical")`, `partial(KroneckerFactored, likelihood="gaussian")`. A penalty's own Hessian
            is always exact. None: the front door's choice, which is `"hessian"` for a `BilevelProblem` and
            `"gauss-newton"` for `MetaLearner`.
        damping: added to A, ≥ 0.
        preconditioner: `"kfac"`, `"ekfac"`, a `partial(KroneckerFactored, …)`, or `"diagonal"` (Jacobi's, of ten more products), for
            `CG`, inverted with σ + damping > 0.
        products: how products with the Hessian are taken, see `Hessian`; with `"finite-differences"` the mixed product
            is the difference of ∂f/∂φ at θ* ± hu as well, and the inner loss needs first derivatives only.
        batch: with a `Stream`, the data that A and the mixed derivative see.
        strict: raise FloatingPointError on negative curvature, breakdown or non-finite numbers, where the default
            records them in the report and warns once.
    """

    solver: Solver = field(default_factory=CG)
    curvature: Curvature | None = None
    damping: float = 0.0
    preconditioner: (
        Literal["kfac", "ekfac", "diagonal"] | Callable[..., KroneckerFactored] | None
    ) = None
    products: Products = "double-backward"
    batch: Any = field(default=UNSET, repr=False)
    strict: bool = False
    flag = "implicit"
    reach = frozenset({"loss"})
    remedy = (
        "a step size, or a starting point that the inner loss does not read, leaves the argmin where it is; use "
        "'unrolled', or let the inner loss depend on it (a proximal term for the initialisation)"
    )

    def __post_init__(self) -> None:
        if self.curvature not in (None, "hessian", *_NAMED) and not callable(self.curvature):
            known = ", ".join(["hessian", *_NAMED])
            raise ValueError(
                f"curvature: got {self.curvature!r}, expected one of {known}, or a class of operators"
            )
        if self.preconditioner not in (None, "diagonal") and not _is_kronecker(self.preconditioner):
            known = "'kfac', 'ekfac', 'diagonal' or a partial KroneckerFactored"
            raise ValueError(f"preconditioner: got {self.preconditioner!r}, expected {known}")
        if self.products not in get_args(Products):
            raise ValueError(
                f"products: got {self.products!r}, expected one of {', '.join(get_args(Products))}"
            )
        if self.products != "double-backward" and self.curvature not in (None, "hessian"):
            raise ValueError(
                f"products: got {self.products!r} with curvature {self.curvature!r}, expected 'hessian'"
            )
        if not self.damping >= 0:
            raise ValueError(f"damping: got {self.damping}, expected a number ≥ 0")

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        data_at_solution(problem, self.batch, "Implicit")
        if self._generalised and not isinstance(problem.problem.inner_loss, Composite):
            raise ValueError(
                f"curvature={self.name!r}: got an inner_loss that is a plain function, expected a Composite, whose "
                "outputs and loss are told apart; or use curvature='hessian'"
            )
        _, trajectory, reads = run_inner(problem, inner, meta, track=0, detach=True)
        report = Report(repr(self), trajectory.steps, trajectory.gradient_norm)
        return self.at(trajectory.end, problem, meta, report, reads)

    def at(
        self,
        end: Iterate,
        problem: LiftedProblem,
        meta: Params,
        report: Report,
        reads: Dependencies,
    ) -> Adaptation:
        """The way back from θ* = `end.params`, however they were found."""
        params = end.params

        def pullback(vectors: Params, state: State) -> tuple[Gradients, Report]:
            return retry_under_vmap(
                lambda p: self._pull(p, meta, params, vectors, report, state), problem
            )

        return Adaptation(params, report, reads, end, pullback)

    @property
    def name(self) -> str:
        """The curvature in a word."""
        if isinstance(self.curvature, str):
            return self.curvature
        return (
            "hessian"
            if self.curvature is None
            else getattr(self.curvature, "func", self.curvature).__name__.lower()
        )

    @property
    def _generalised(self) -> bool:
        return self.curvature not in (None, "hessian")

    def _kronecker(
        self, make: Any, problem: LiftedProblem, meta: Params, params: Params
    ) -> KroneckerFactored:
        data, f = data_at_solution(problem, self.batch, "Implicit"), problem.problem.inner_loss
        if not isinstance(f, Composite) or f.module is None:
            raise ValueError(
                "K-FAC: got an inner loss that hides its layers, expected Composite(…, module=model)"
            )
        if f.weights is not None:
            raise ValueError(
                "K-FAC: got an inner loss with weights, which it does not see; use 'gauss-newton'"
            )
        factors: KroneckerFactored = _made(make)(
            f.module,
            lambda function, p: problem.apply(
                lambda q, d: function(lambda r: f.outputs(r, meta, d), q), p, data
            ),
            lambda z: problem.output_loss(f, z, meta, data),
            params,
        )
        return factors

    def _pull(
        self,
        problem: LiftedProblem,
        meta: Params,
        params: Params,
        vectors: Params,
        report: Report,
        state: State,
    ) -> tuple[Gradients, Report]:
        operator, gradient, sigma, definite = self._linearise(problem, meta, params)
        if not sigma >= 0:
            raise ValueError(
                f"proximal strength: got {sigma} from meta, expected ≥ 0; learn its logarithm, say"
            )
        sigma += self.damping
        v, apply, made = flatten(vectors), None, [operator]
        if self.preconditioner is not None:
            if not sigma > 0:
                raise ValueError(
                    f"preconditioner: got σ + damping = {sigma}, expected > 0; add damping"
                )
            factors = (
                Diagonal(operator)
                if self.preconditioner == "diagonal"
                else self._kronecker(self.preconditioner, problem, meta, params)
            )
            made.append(factors)

            def apply(r: Tensor) -> Tensor:
                return factors.inverse(r, sigma)

        solution = self.solver.solve(
            operator + Identity(operator, sigma), v, state=state, preconditioner=apply
        )
        products = solution.products + sum(
            each.products for each in made if isinstance(each, Diagonal)
        )
        squared = operator.first if isinstance(operator, Sum) else operator
        if isinstance(squared, GGN) and bool((solution.rayleigh < 0.999 * sigma).any()):
            squared.check_convex()
        self._judge(solution)
        if self.products == "finite-differences":
            data = data_at_solution(problem, self.batch, "Implicit")
            slope = central_difference(
                lambda p: problem.inner(p, meta, data), params, solution.value
            )
            mixed = vector_jacobian_product(
                {"slope": slope}, meta, {"slope": -torch.ones_like(slope)}, retain_graph=False
            )
        else:
            mixed = vector_jacobian_product(
                gradient, meta, unflatten(-solution.value, params), retain_graph=False
            )
        bound = solution.residual * v.norm(dim=-1) / sigma if definite and sigma > 0 else None
        return mixed, replace(
            report,
            inner_gradient_norm=flatten(gradient).detach().norm(dim=-1),
            curvature=self.name,
            chosen=solution.chosen,
            products=products,
            residual=solution.residual,
            status=solution.status,
            rayleigh=solution.rayleigh,
            sigma=sigma,
            rho=self.solver.damping(sigma),
            error_bound=bound,
            state=solution.state,
        )

    def _linearise(
        self, problem: LiftedProblem, meta: Params, params: Params
    ) -> tuple[LinearOperator, Params, float, bool]:
        """The core of A at θ, ∂f/∂θ with its graph to `meta`, σ of the penalty, and whether the core is PSD."""
        data, f = data_at_solution(problem, self.batch, "Implicit"), problem.problem.inner_loss
        if not isinstance(f, Composite):
            whole = Hessian(_steady(lambda p: problem.inner(p, meta, data)), params, self.products)
            return whole, whole.gradient, 0.0, False

        outputs = _steady(lambda p: problem.outputs(f, p, meta, data))

        def loss(z: Tensor) -> Tensor:
            return problem.output_loss(f, z, meta, data)

        core: LinearOperator
        if self._generalised and not _is_kronecker(self.curvature):
            squared = _made(self.curvature)(outputs, loss, params)
            if f.weights is not None and isinstance(squared, Fisher):
                raise ValueError(
                    "Fisher: got an inner loss with weights, which it does not see; use 'gauss-newton'"
                )
            core, gradient = squared, squared.gradient
        else:
            hessian = Hessian(lambda p: loss(outputs(p)), params, self.products)
            core, gradient = hessian, hessian.gradient
            if self._generalised:
                core = self._kronecker(self.curvature, problem, meta, params)
        if f.penalty is None:
            return core, gradient, 0.0, self._generalised
        penalty = f.penalty
        bend = Hessian(lambda p: problem.penalty(penalty, p, meta), params)
        # both gradients are functions of their own copies of θ, held at the same point: their sum is ∂f/∂θ
        gradient = {name: g + bend.gradient[name] for name, g in gradient.items()}
        if isinstance(penalty, Proximal):
            return core, gradient, _float(resolve(penalty.strength, meta)), self._generalised
        return core + bend, gradient, 0.0, False

    def _judge(self, solution: Solution) -> None:
        present = [status for status in ADVICE if bool((solution.status == int(status)).any())]
        for status in present:
            message = f"{type(self.solver).__name__} ended with {status.name}: {ADVICE[status]}"
            if self.strict:
                raise FloatingPointError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _made(curvature: Any) -> Callable[..., Any]:
    return _NAMED[curvature] if isinstance(curvature, str) else curvature


def _is_kronecker(curvature: Any) -> bool:
    made = _NAMED.get(curvature, GGN) if isinstance(curvature, str) else curvature
    made = getattr(made, "func", made)
    return isinstance(made, type) and issubclass(made, KroneckerFactored)


def _steady(function: Callable[[Params], Tensor]) -> Callable[[Params], Tensor]:
    """`function`, but an error if it draws random numbers: A would be another at every evaluation."""

    def checked(params: Params) -> Tensor:
        device = next(iter(params.values())).device
        before = _random_state(device)
        result = function(params)
        if not torch.equal(before, _random_state(device)):
            raise ValueError(
                "inner loss: it draws random numbers (dropout?), so A is not that of the loop; switch the model to "
                "evaluation mode, or use 'unrolled'"
            )
        return result

    return checked


def _random_state(device: torch.device) -> Tensor:
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def _float(number: float | Tensor) -> float:
    return number.detach().item() if isinstance(number, Tensor) else float(number)
