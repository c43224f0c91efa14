"""The linear system of an implicit method at θ*."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaimplicit.compiled import CannotCompileError
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Gradients, vector_jacobian_product
from metaimplicit.methods.compiled_curvature import compiled_linearization
from metaimplicit.methods.linearize import Linearization, linearize, without_unread
from metaimplicit.methods.shared import mixed_difference, warn_or_raise
from metaimplicit.operators import (
    CurvatureClass,
    Identity,
    Invertible,
    Products,
    find_curvature,
)
from metaimplicit.params import Params, flatten, unflatten
from metaimplicit.problem import Decay
from metaimplicit.solvers import Solution, Solver, SolverState

MixedProduct = Callable[..., tuple[Gradients, Tensor]]  # of u; see `CurvatureSystem.mixed_product`


@dataclass(frozen=True)
class CurvatureSystem:
    """A u = v with A = core + σI: how an implicit method builds and solves it.

    Attributes:
        solver: Computes A⁻¹v.
        curvature: What A is made of, the key of a curvature or a class.
        damping: Added to A.
        preconditioner: For solvers that take one, likewise a key or a class. None without one.
        products: How products with the Hessian are taken.
        strict: Whether a failed solve raises FloatingPointError.
        known: ∂²f/∂θ² less its known multiple of the identity, if the inner loop left it.
    """

    solver: Solver
    curvature: str | CurvatureClass
    damping: float
    preconditioner: str | CurvatureClass | None
    products: Products
    strict: bool
    known: Invertible | None = None

    def linearize(
        self,
        problem: LiftedProblem,
        params: Params,
        meta: Params,
        data: Any,
        *,
        decay: Decay | None,
    ) -> Linearization:
        """The inner problem at θ = `params`; see `linearize`.

        Raises:
            CannotCompileError: The problem is to be compiled, and cannot.
        """
        if problem.compiler is not None:
            if decay is not None:
                raise CannotCompileError("the inner loop has weight decay")
            return compiled_linearization(
                problem.compiler,
                problem,
                params,
                meta,
                data=data,
                curvature=str(self.curvature),
            )
        options: dict[str, Any] = {}
        if self.products != "double-backward":
            options["products"] = self.products
        if self.products == "finite-differences":
            problem = problem.with_weights_at(params)
        curvature = self.curvature if self.known is None else "hessian"
        point = linearize(
            problem,
            params,
            meta,
            data,
            curvature=curvature,
            decay=decay,
            **options,
        )
        return point if self.known is None else replace(point, core=self.known)

    def pose(
        self,
        problem: LiftedProblem,
        params: Params,
        meta: Params,
        data: Any,
        *,
        vectors: Params,
        decay: Decay | None,
    ) -> tuple[Linearization, Tensor, MixedProduct]:
        """The point of `linearize`, the right-hand side v, and `mixed_product` at the point.

        Args:
            problem: The lifted problem.
            params: θ, `{name: [tasks, *shape]}`.
            meta: φ, leaves of autograd.
            data: What the inner loss sees.
            vectors: ∂g/∂θ by parameter, of which v `[tasks, n]` has what the inner loss reads.
            decay: The weight decay of the inner loop.
        """
        point = self.linearize(problem, params, meta, data, decay=decay)
        mixed_product = partial(
            self.mixed_product,
            point,
            problem=problem,
            params=params,
            meta=meta,
            data=data,
            decay=decay,
        )
        v = flatten(vectors)
        if not point.sigma > 0:  # else a penalty reads them all
            # A compiled point has no gradient yet, so that every entry is in doubt.
            gradient = flatten(point.gradient).detach() if point.gradient else torch.zeros_like(v)
            retained = partial(mixed_product, retain_graph=True)
            v = without_unread(v, gradient, point.core, retained)
        return point, v, mixed_product

    def solve(self, point: Linearization, v: Tensor, state: SolverState) -> tuple[Solution, int]:
        """The solution u = A⁻¹v, `[tasks, n]`, and the products that it took in all.

        Raises:
            ValueError: The loss is not convex where the curvature assumes it, or a preconditioner
                has no damping.
            FloatingPointError: The solve failed, and it is `strict`.
        """
        sigma = point.sigma + self.damping
        preconditioner = self._make_preconditioner(point, sigma)
        inverse = None
        if preconditioner is not None:
            inverse = partial(preconditioner.inverse, shift=sigma)
        shifted = point.core + Identity(point.core, sigma)
        solution = self.solver.solve(
            shifted,
            v,
            state=state,
            preconditioner=inverse,
        )
        if bool((solution.rayleigh < 0.999 * sigma).any()):
            point.core.check_convex()
        warn_or_raise(self.solver, solution, strict=self.strict)

        products = solution.products + point.core.setup_products
        if preconditioner is not None:
            products += preconditioner.setup_products
        return solution, products

    def mixed_product(
        self,
        point: Linearization,
        u: Tensor,
        *,
        problem: LiftedProblem,
        params: Params,
        meta: Params,
        data: Any,
        decay: Decay | None,
        retain_graph: bool = False,
    ) -> tuple[Gradients, Tensor]:
        """(dθ*/dφ)ᵀ v = −(∂²f/∂θ∂φ)ᵀ u, and ∂f/∂θ, `[tasks, n]`.

        It frees the graph of the point, unless that is retained.
        """
        if point.compiled_mixed_product is not None:
            of_phi, of_theta = point.compiled_mixed_product(u)
            return {**dict.fromkeys(meta), **of_phi}, flatten(of_theta)
        gradient = flatten(point.gradient).detach()
        if self.products != "finite-differences":
            mixed = vector_jacobian_product(
                point.gradient,
                meta,
                unflatten(-u, params),
                retain_graph=retain_graph,
            )
            return mixed, gradient

        around = problem.with_weights_at(params)

        def penalized_loss(p: Params) -> Tensor:
            loss = around.inner(p, meta, data)
            return loss if decay is None else loss + problem.penalty(decay, p, meta)

        mixed = mixed_difference(penalized_loss, params, -u, meta)
        return mixed, gradient

    def _make_preconditioner(self, point: Linearization, sigma: float) -> Invertible | None:
        if self.preconditioner is None:
            return None
        if point.parts is None or not sigma > 0:
            raise ValueError(
                f"preconditioner: got σ + damping = {sigma}, expected > 0; add damping"
            )
        kind, options = find_curvature(self.preconditioner)
        return kind.preconditioner(point.core, point.parts, **options)
