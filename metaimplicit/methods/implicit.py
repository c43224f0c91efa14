"""Implicit differentiation of a stationary point."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import (
    UNSET,
    Adaptation,
    Dependencies,
    Gradients,
    Method,
    Rereads,
    Stationarity,
)
from metaimplicit.methods.curvature_system import CurvatureSystem
from metaimplicit.methods.linearize import inner_gradient, require_outputs
from metaimplicit.methods.microbatches import check_curvature, check_size, in_microbatches
from metaimplicit.methods.replay import run_by_steps
from metaimplicit.methods.report import Report, relative_leftover
from metaimplicit.methods.shared import (
    data_at_solution,
    retry_under_vmap,
    run_inner,
    warn_if_inaccurate,
)
from metaimplicit.operators import (
    CurvatureClass,
    Hessian,
    Invertible,
    Products,
    as_flag,
    check_preconditioner,
    find_curvature,
)
from metaimplicit.options import option
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.problem import BilevelProblem, Decay
from metaimplicit.solvers import CG, Solution, Solver, SolverState

Curvature = str | CurvatureClass  # a key of `CURVATURES`, or a class


@dataclass(frozen=True)
class Implicit(Method):
    """(dθ*/dφ)ᵀ v = −(∂²f/∂θ∂φ)ᵀ A⁻¹ v, by the implicit function theorem at ∂f/∂θ(θ*, φ) = 0.

    It is exact if θ* is stationary, the solve is exact, and A is the Hessian ∂²f/∂θ² without
    damping. Nothing of the inner loop is stored, so memory is flat in its steps (Rajeswaran et
    al. 2019; Lorraine et al. 2020). Weight decay of the inner optimiser (L2) belongs to f. That of
    AdamW does not: the loop still ends where ∂f/∂θ = 0, if it ends.

    Args:
        solver: Computes A⁻¹v.
        curvature: What A is made of: `"hessian"`, or, positive semi-definite and for a `Composite`
            inner loss, `"gauss-newton"`, `"kfac"`, `"ekfac"` or `"diagonal"` (that of
            Gauss–Newton). Or a class of curvature with options:
            `partial(Fisher, expectation="empirical")`. The Hessian of a penalty is always exact.
            If None, the caller chooses: `"hessian"` for a `BilevelProblem`, `"gauss-newton"` for
            `MetaLearner`.
        damping: Added to A, ≥ 0.
        preconditioner: For `CG`: `"kfac"`, `"ekfac"`, `"diagonal"` (Jacobi, ten more products),
            or a `partial(KroneckerFactored, …)`. It is inverted with σ + damping > 0.
        products: How products with the Hessian are taken; see `Hessian`. With
            `"finite-differences"` the mixed product is the difference of ∂f/∂φ at θ* ± hu as well,
            so the inner loss needs first derivatives only.
        batch: With a `Stream`, the data that A and the mixed derivative see.
        strict: Raise FloatingPointError on negative curvature, breakdown or non-finite numbers.
            If False, the report records them and a warning is given.
        check_curvature: Whether the report says how far A is from the Hessian, at the cost of one
            more gradient and one product; see `Report.hessian_residual`.
        microbatch: Evaluate the losses on at most this many examples at a time, for one problem
            (not `batched`) and A of the Hessian or Gauss–Newton; see `in_microbatches` for the
            losses that allow it. All results are those of the whole batch, to round-off. Memory
            holds the activations of one slice, and a product takes about twice as long, since it
            evaluates the loss again. If None, all examples are evaluated at once.

    Raises:
        ValueError: A number is out of range, the solver is none, the curvature or preconditioner is
            unknown, or `products` are asked for a curvature other than the Hessian. On solving: the
            loss lacks a part that the curvature needs, draws random numbers, or is not convex where
            the curvature assumes it; the `batch` does not suit the data; or the losses or the data
            allow no `microbatch`.
        FloatingPointError: On solving, if `strict`.

    Example:
        >>> from metaimplicit.solvers import CG
        >>> Implicit(CG(max_steps=20), damping=0.1).damping
        0.1
    """

    solver: Solver = field(default_factory=CG)
    curvature: Curvature | None = None
    damping: float = 0.0
    preconditioner: Curvature | None = None
    products: Products = "double-backward"
    batch: Any = field(default=UNSET, repr=False)
    strict: bool = False
    check_curvature: bool = False
    microbatch: int | None = option(None, flag=None)
    flag = "implicit"
    reach = frozenset({"loss"})
    differentiates_argmin = True
    remedy = (
        "a step size, or a starting point that the inner loss does not read, does not "
        "move the argmin; use 'unrolled', or let the inner loss depend on it (a proximal "
        "term for the initialisation)"
    )

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise ValueError(f"solver: got {self.solver!r}, expected a solver, such as CG()")
        find_curvature(self.curvature or "hessian")
        if self.curvature is not None:
            object.__setattr__(self, "curvature", as_flag(self.curvature))
        if self.preconditioner is not None:
            check_preconditioner(self.preconditioner)
        if self.products not in get_args(Products):
            known = ", ".join(get_args(Products))
            raise ValueError(f"products: got {self.products!r}, expected one of {known}")
        if self.products != "double-backward" and self.curvature not in (None, "hessian"):
            raise ValueError(
                f"products: got {self.products!r} with curvature {self.curvature!r}, "
                "expected 'hessian'"
            )
        if not self.damping >= 0:
            raise ValueError(f"damping: got {self.damping}, expected a number ≥ 0")
        if self.microbatch is not None:
            check_curvature(self.curvature or "hessian", self.products, self.preconditioner)
        check_size(self.microbatch)

    @property
    def curvature_name(self) -> str:
        """The flag of the curvature. A `partial` or another class has its name, in lower case."""
        if isinstance(self.curvature, str):
            return self.curvature
        if self.curvature is None:
            return "hessian"
        return find_curvature(self.curvature)[0].__name__.lower()

    @property
    def is_hessian(self) -> bool:
        """Whether A is made of the Hessian itself."""
        return find_curvature(self.curvature or "hessian")[0] is Hessian

    @property
    def second_derivatives(self) -> bool:
        """Whether A is more than differences of gradients."""
        return self.products != "finite-differences" or self.preconditioner is not None

    @property
    def rereads(self) -> Rereads:
        """The last batch, if differences of gradients are taken on it."""
        return "last" if self.products == "finite-differences" else "none"

    @property
    def forward_mode(self) -> bool:
        """Whether the inner loss has the second derivatives that this takes."""
        return self.products != "finite-differences"

    def prepare(self, problem: BilevelProblem, *, batched: bool) -> BilevelProblem:
        """The problem with its losses in microbatches, if there is a size."""
        return in_microbatches(problem, self.microbatch, batched=batched)

    def compile_objection(self, inner: InnerLoop) -> str:
        """Why its products are not compiled. Empty if they are.

        Only those of the Hessian and of Gauss–Newton are, and only if the loop leaves no curvature.
        """
        if self.microbatch is not None:
            return "microbatches are not compiled"
        if self.curvature not in (None, "hessian", "gauss-newton"):
            return f"the curvature {self.curvature_name!r} has no compiled products"
        if self.products != "double-backward":
            return f"products={self.products!r} are not compiled"
        if self.preconditioner is not None:
            return "a preconditioner looks into the loss"
        return f"{type(inner).__name__} leaves its own curvature" if inner.exact else ""

    def with_default_curvature(self, curvature: Curvature) -> Implicit:
        """The method with this curvature if it leaves the curvature open.

        Products other than double-backward are an option of the Hessian, so they ask for it.
        """
        if self.curvature is not None or self.products != "double-backward":
            return self
        return replace(self, curvature=curvature)

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop without a graph. The curvature is taken where it ends."""
        data_at_solution(problem, self.batch, "Implicit")
        require_outputs(problem, self.curvature or "hessian")
        if inner.implicit_objection:
            raise ValueError(
                f"{self.flag}: got {type(inner).__name__}, {inner.implicit_objection}; use "
                "'fixed-point' or 'unrolled'"
            )
        if self.microbatch is not None and inner.exact:
            raise ValueError(
                f"microbatch: got {type(inner).__name__}, which solves with all examples at once, "
                "expected an inner loop of steps"
            )
        if problem.compiler is not None and not inner.compile_objection:
            run = run_by_steps(problem, inner, meta)
        else:
            run = run_inner(problem, inner, meta, differentiated_steps=0, detach=True)
        trajectory = run.trajectory
        report = Report(repr(self), trajectory.steps, trajectory.gradient_norm, drift=inner.drift)
        return self.at_solution(
            trajectory.end,
            problem,
            meta,
            report=report,
            dependencies=run.dependencies,
            hessian=trajectory.curvature,
        )

    def at_solution(
        self,
        end: Iterate,
        problem: LiftedProblem,
        meta: Params,
        *,
        report: Report,
        dependencies: Dependencies,
        hessian: Invertible | None = None,
    ) -> Adaptation:
        """The adaptation whose θ* is `end.params`, however it was computed.

        Args:
            end: θ*, and the optimiser's state.
            problem: The lifted problem.
            meta: φ, leaves of autograd.
            report: That of the inner loop. The pullback completes it.
            dependencies: What θ* depends on.
            hessian: ∂²f/∂θ² less its known multiple of the identity, if the inner loop left it.
        """
        system = self._system(hessian)

        def pullback(vectors: Params, state: SolverState) -> tuple[Gradients, Report]:
            def attempt(lifted: LiftedProblem) -> tuple[Gradients, Report]:
                return self._pull_back(
                    lifted,
                    end.params,
                    meta,
                    system=system,
                    decay=dependencies.decay(end.params, meta),
                    vectors=vectors,
                    report=report,
                    state=state,
                )

            return retry_under_vmap(attempt, problem)

        stationarity = None
        if self.forward_mode:
            stationarity = self._stationarity(
                system,
                end.params,
                problem,
                meta,
                dependencies=dependencies,
                report=report,
            )
        return Adaptation(end.params, report, dependencies, end, pullback, stationarity)

    def _stationarity(
        self,
        system: CurvatureSystem,
        params: Params,
        problem: LiftedProblem,
        meta: Params,
        *,
        dependencies: Dependencies,
        report: Report,
    ) -> Stationarity:
        """What derivatives of θ* = `params` need beside the pullback."""
        data = data_at_solution(problem, self.batch, "Implicit")

        def residual(theta: Params, phi: Params) -> Params:
            at = meta | phi
            decay = dependencies.decay(theta, at)
            return inner_gradient(problem, theta, at, data, decay=decay)

        def solve(vectors: Params) -> Params:
            def attempt(lifted: LiftedProblem) -> tuple[Solution, Tensor, Tensor]:
                decay = dependencies.decay(params, meta)
                point, v, _ = system.pose(lifted, params, meta, data, vectors=vectors, decay=decay)
                solution, _ = system.solve(point, v, SolverState())
                return solution, flatten(point.gradient).detach(), v

            with torch.enable_grad():
                solution, gradient, v = retry_under_vmap(attempt, problem)
            completed = replace(
                report,
                residual=solution.residual,
                status=solution.status,
                relative_leftover=relative_leftover(solution.value, gradient, v=v, params=params),
            )
            warn_if_inaccurate("argmin", completed.judged())
            return unflatten(solution.value, params)

        # What a loop knows is its Hessian, which Gauss–Newton is for its linear model.
        is_exact = (self.is_hessian or system.known is not None) and self.damping == 0
        return Stationarity(residual, solve, is_exact)

    def _system(self, hessian: Invertible | None) -> CurvatureSystem:
        """The system at θ*, with the Hessian that the loop left if that is what A is made of."""
        # The model of such a loop is linear, so that Gauss–Newton is the Hessian.
        hessian_is_a = self.curvature in (None, "hessian", "gauss-newton")
        takes_it = hessian_is_a and self.products == "double-backward"
        return CurvatureSystem(
            self.solver,
            self.curvature or "hessian",
            damping=self.damping,
            preconditioner=self.preconditioner,
            products=self.products,
            strict=self.strict,
            known=hessian if takes_it else None,
        )

    def _pull_back(
        self,
        problem: LiftedProblem,
        params: Params,
        meta: Params,
        *,
        system: CurvatureSystem,
        decay: Decay | None,
        vectors: Params,
        report: Report,
        state: SolverState,
    ) -> tuple[Gradients, Report]:
        data = data_at_solution(problem, self.batch, "Implicit")
        point, v, mixed_product = system.pose(
            problem, params, meta, data, vectors=vectors, decay=decay
        )
        sigma = point.sigma + self.damping
        solution, products = system.solve(point, v, state)
        hessian_residual = None
        if self.check_curvature:
            exact = replace(system, curvature="hessian", known=None)
            at_hessian = exact.linearize(problem, params, meta, data, decay=decay)
            hessian_residual = at_hessian.residual(solution.value, v)
        mixed, gradient = mixed_product(solution.value)
        return mixed, replace(
            report,
            inner_gradient_norm=gradient.norm(dim=-1),
            curvature=self.curvature_name,
            chosen=solution.chosen,
            products=products,
            residual=solution.residual,
            hessian_residual=hessian_residual,
            status=solution.status,
            rayleigh=solution.rayleigh,
            sigma=sigma,
            rho=self.solver.damping(sigma),
            error_bound=point.error_bound(solution.residual * v.norm(dim=-1), sigma),
            leftover=-problem.tasks * (solution.value * gradient).sum(-1),
            relative_leftover=relative_leftover(solution.value, gradient, v=v, params=params),
            state=solution.state,
        )
