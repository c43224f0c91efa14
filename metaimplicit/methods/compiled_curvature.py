"""The inner problem linearised at θ*, by compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaimplicit.compiled import CannotCompileError, Compiler, in_one_layout
from metaimplicit.graph import find_dependencies
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.linearize import Linearization, known_multiple, linearize
from metaimplicit.operators import GGN, LinearOperator
from metaimplicit.params import Params, detached, flatten, joint_dtype, unflatten
from metaimplicit.problem import Composite


def compiled_linearization(
    compiler: Compiler,
    problem: LiftedProblem,
    params: Params,
    meta: Params,
    *,
    data: Any,
    curvature: str,
) -> Linearization:
    """The same as `linearize`, by compiled functions. Its checks are made at the first call.

    Args:
        compiler: It holds the functions between calls.
        problem: The problem, lifted over the task axis.
        params: θ*, `{name: [tasks, *shape]}`.
        meta: φ, leaves of autograd.
        data: What the inner loss sees.
        curvature: `"hessian"` or `"gauss-newton"`.

    Raises:
        CannotCompileError: Gauss–Newton takes another loss than the one given, or there is a
            penalty whose Hessian is no known multiple of the identity.
        ValueError: As for `linearize`.
    """

    def look() -> Linearization:
        return linearize(problem, params, meta, data, curvature=curvature)

    read, semidefinite = compiler.remember(("curvature", curvature), lambda: _check(look(), meta))
    f = problem.problem.inner_loss
    penalty = f.penalty if isinstance(f, Composite) else None
    sigma = 0.0 if penalty is None else known_multiple(penalty, meta)
    if sigma is None:
        raise CannotCompileError("the penalty is no multiple of ½‖θ‖²")
    constants = detached(meta)
    phi = {name: m for name, m in constants.items() if name in read}
    fixed = {name: m for name, m in constants.items() if name not in read}
    point = (in_one_layout(detached(params)), phi, fixed, data)

    def product(v: Tensor) -> Tensor:
        make = partial(_make_product, problem, curvature)
        name = "the product with the curvature"
        result: Tensor = compiler.call(
            name,
            curvature,
            make,
            *point,
            in_one_layout({"v": v})["v"],
        )
        return result

    def mixed_product(u: Tensor) -> tuple[Params, Params]:
        make = partial(_make_mixed_product, problem)
        result: tuple[Params, Params]
        result = compiler.call(
            "the mixed product",
            None,
            make,
            *point,
            in_one_layout({"u": u})["u"],
        )
        return result

    check = None if curvature == "hessian" else lambda: look().core
    core = CompiledOperator(
        product,
        params,
        semidefinite=semidefinite,
        check=check,
    )
    return Linearization(core, {}, sigma, None, mixed_product)


def _make_mixed_product(problem: LiftedProblem) -> Any:
    """−(∂²f/∂θ∂φ)ᵀ u and ∂f/∂θ."""
    problem = problem.without_data()

    def mixed(params: Params, phi: Params, fixed: Params, data: Any, u: Tensor) -> Any:
        def along_u(phi: Params) -> Any:
            def total(theta: Params) -> Tensor:
                return problem.inner(theta, {**fixed, **phi}, data).sum()

            gradient = torch.func.grad(total)(params)
            return -(flatten(gradient) * u).sum(), gradient

        return torch.func.grad(along_u, has_aux=True)(phi)

    return mixed


def _make_product(problem: LiftedProblem, curvature: str) -> Any:
    """The product with the Hessian or the Gauss–Newton matrix of the loss without its penalty."""
    problem = problem.without_data()
    f = problem.problem.inner_loss
    if curvature == "gauss-newton" and isinstance(f, Composite):
        return _make_gauss_newton(problem, f)

    def hessian(params: Params, phi: Params, fixed: Params, data: Any, v: Tensor) -> Any:
        meta = {**fixed, **phi}

        def total(theta: Params) -> Tensor:
            if isinstance(f, Composite):
                return problem.unpenalised(f, theta, meta, data).sum()
            return problem.inner(theta, meta, data).sum()

        # H v = (∂∇f/∂θ)ᵀ v, since H is symmetric.
        pull_back = torch.func.vjp(torch.func.grad(total), params)[1]
        return flatten(pull_back(unflatten(v, params))[0])

    return hessian


def _make_gauss_newton(problem: LiftedProblem, f: Composite) -> Any:
    """Jᵀ (∂²ℓ/∂z²) J v. No tangent is pushed, because torch does not compile that under vmap."""

    def product(params: Params, phi: Params, fixed: Params, data: Any, v: Tensor) -> Any:
        meta = {**fixed, **phi}

        def outputs(theta: Params) -> Tensor:
            return problem.outputs(f, theta, meta, data)

        def total(z: Tensor) -> Tensor:
            return problem.output_loss(f, z, meta, data).sum()

        z = outputs(params)
        pull_back = torch.func.vjp(outputs, params)[1]
        # r ↦ Jᵀr is linear, so its own transpose takes v to Jv.
        transpose = torch.func.vjp(lambda r: pull_back(r)[0], torch.zeros_like(z))[1]
        tangent = transpose(unflatten(v, params))[0]
        bent = torch.func.vjp(torch.func.grad(total), z)[1](tangent)[0]
        return flatten(pull_back(bent)[0])

    return product


class CompiledOperator(LinearOperator):
    """A symmetric matrix for each task, by a compiled product.

    Args:
        product: `[tasks, n] -> [tasks, n]`.
        params: The point θ, `{name: [tasks, *shape]}`.
        semidefinite: Whether the matrix is known to be positive semi-definite.
        check: The same operator, run eager, which knows what its loss has to be. None if it may be
            any.

    Example:
        >>> params = {"w": torch.ones(1, 2)}
        >>> operator = CompiledOperator(torch.neg, params, semidefinite=False)
        >>> operator.matmat(torch.ones(3, 1, 2)).shape
        torch.Size([3, 1, 2])
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        params: Params,
        *,
        semidefinite: bool,
        check: Callable[[], LinearOperator] | None = None,
    ) -> None:
        first = next(iter(params.values()))
        self.shape = (len(first), sum(p[0].numel() for p in params.values()))
        self.dtype = joint_dtype(params.values())
        self.device = first.device
        self.semidefinite = semidefinite
        self._product = product
        self._check = check

    def matvec(self, vector: Tensor) -> Tensor:
        """The product, compiled."""
        return self._product(vector)

    def check_convex(self) -> None:
        """Check the loss that the curvature is made of."""
        if self._check is not None:
            self._check().check_convex()


def _check(point: Linearization, meta: Params) -> tuple[set[str], bool]:
    """The entries of φ that ∂f/∂θ depends on, and whether A is known to be semi-definite."""
    if isinstance(point.core, GGN) and point.core.has_other_loss:
        raise CannotCompileError("Gauss–Newton takes the loss before the model's last function")
    phi = {name: m for name, m in meta.items() if m.requires_grad}
    read = find_dependencies(point.gradient.values(), phi)
    return read, point.core.semidefinite
