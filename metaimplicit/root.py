"""The derivative of a root of any system of equations, wherever the root comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.data import outside_inference_mode
from metaimplicit.graph import find_dependencies, is_differentiated
from metaimplicit.hypergradient import meta_leaves
from metaimplicit.inner.known import KnownSolution, read_solution
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Adaptation, FixedPoint, Gradients, Report
from metaimplicit.methods.adjoint import TransposedJacobian, check_solver
from metaimplicit.methods.base import Dependencies
from metaimplicit.methods.linearize import reject_random_numbers
from metaimplicit.methods.pullback import attach_pullback
from metaimplicit.methods.report import relative_leftover
from metaimplicit.methods.shared import warn_or_raise
from metaimplicit.params import Params, flatten, floating_entry, leaves
from metaimplicit.problem import BilevelProblem
from metaimplicit.solvers import GMRES, Solver, SolverState
from metaimplicit.unsupported import explain_unsupported

DEFAULT_SOLVER = GMRES(max_steps=50)


@explain_unsupported()
@outside_inference_mode()
def root(
    residual: Callable[[Params, Params, Any], Params],
    solution: Params,
    meta: Params,
    data: Any = None,
    *,
    solver: Solver = DEFAULT_SOLVER,
    batched: bool = False,
    vectorize: Vectorize = "vmap",
    chunk_size: int | None = None,
) -> Params:
    """θ*(φ) with F(θ*, φ) = 0 as a differentiable function of φ.

    The values are those of `solution`, from a solver of any kind. The derivative is that of the
    implicit function theorem,

        (dθ*/dφ)ᵀ v = −(∂F/∂φ)ᵀ λ    with    (∂F/∂θ)ᵀ λ = v,

    which need not be symmetric. It is exact if F vanishes at the solution, ∂F/∂θ is regular, and
    the solve is exact.

    Args:
        residual: F, `(params, meta, data) -> {name: tensor}`, of one task. Its names and shapes are
            those of the solution.
        solution: θ*, `{name: [*shape]}` (`[tasks, *shape]` if `batched`): tensors, or arrays of
            numpy.
        meta: φ, `{name: tensor}`. Gradients flow to the tensors that require grad.
        data: Any pytree of tensors. If `batched`, each tensor carries the task axis first.
            Gradients flow to those that require grad.
        solver: `GMRES`, `Neumann` or `Richardson`. It warns if it fails.
        batched: Whether `data` is a batch of tasks. If not, there is one task.
        vectorize: `"vmap"` over the tasks, or `"loop"`: one call per task.
        chunk_size: As for `hypergradient`.

    Returns:
        θ*, `{name: [*shape]}`, or `[tasks, *shape]` if `batched`. It is differentiable once.

    Raises:
        ValueError: The names or shapes of F differ from those of the solution, the solution is not
            made of real and finite numbers, or the solver needs a symmetric matrix. F depends on a
            tensor that requires grad and is not in `meta`, or draws random numbers.

    Warns:
        RuntimeWarning: In backward: F does not vanish at the solution, or the linear system was not
            solved.

    Example:
        θ* = √φ is a root of θ² − φ.

        >>> phi = torch.tensor(9.0, requires_grad=True)
        >>> found = root(
        ...     lambda params, meta, data: {"x": params["x"].square() - meta["phi"]},
        ...     solution={"x": torch.tensor(3.0)},
        ...     meta={"phi": phi},
        ... )
        >>> found["x"].backward()
        >>> round(phi.grad.item(), 4)  # 1/(2√φ)
        0.1667
    """
    check_solver("root", solver)
    phi = meta_leaves(meta)
    known = read_solution(solution, like=floating_entry(phi))
    theta = known if batched else {name: p[None] for name, p in known.items()}
    problem = BilevelProblem(
        init=lambda meta, data: known, inner_loss=_no_loss, outer_loss=_no_loss
    )
    lifted = LiftedProblem(
        problem,
        data,
        batched=batched,
        vectorize=vectorize,
        chunk_size=chunk_size,
    )
    for name, m in phi.items():
        m.requires_grad_(is_differentiated(meta[name]))

    # Tensors of the data that require grad are entries of φ beside those of `meta`.
    sources = {**meta, **lifted.entries.tensors}
    variables = {**phi, **leaves(lifted.entries.tensors)}
    seen_meta, seen_data = lifted.arguments(variables, lifted.data)

    def evaluate(params: Params) -> Params:
        with torch.enable_grad():
            values: Params = lifted.apply(lambda p, d: residual(p, seen_meta, d), params, seen_data)
        return values

    point = leaves(theta)
    values = reject_random_numbers(evaluate, name="residual")(point)
    _check_residual(values, point)
    find_dependencies(values.values(), variables, params=point.values(), functions=[residual])

    def pullback(vectors: Params, state: SolverState) -> tuple[Gradients, Report]:
        fresh = leaves(theta)
        functions = evaluate(fresh)
        jacobian = TransposedJacobian([functions[name] for name in fresh], list(fresh.values()))
        v = flatten(vectors)
        adjoint = solver.solve(jacobian, v, state=state)
        warn_or_raise(solver, adjoint, strict=False)
        leftover = relative_leftover(
            adjoint.value, jacobian.join(jacobian.functions), v=v, params=theta
        )
        return jacobian.pull_back(-adjoint.value, variables), replace(
            report,
            products=adjoint.products,
            residual=adjoint.residual,
            status=adjoint.status,
            relative_leftover=leftover,
        )

    norm = flatten({name: value.detach() for name, value in values.items()}).norm(dim=-1)
    report = Report(repr(solver), torch.zeros_like(norm, dtype=torch.int64), norm)
    dependencies = Dependencies(KnownSolution(theta))
    adaptation = Adaptation(theta, report, dependencies, Iterate(theta), pullback)
    params = attach_pullback(adaptation, FixedPoint(solver), sources, data=lifted.data, name="root")
    return params if batched else {name: p.squeeze(0) for name, p in params.items()}


def _no_loss(*_: Any) -> Tensor:
    raise ValueError("root: it has no loss")


def _check_residual(values: Any, point: Params) -> None:
    """Raise ValueError unless a task has as many equations as unknowns, under the same names."""

    def describe(x: Any) -> Any:
        return list(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__

    got: Any = type(values).__name__
    if isinstance(values, dict):
        got = {name: describe(x) for name, x in values.items()}
    expected = {name: describe(x) for name, x in point.items()}
    if got != expected:
        raise ValueError(
            f"residual: got {got}, expected a dict of tensors with the names and shapes of the "
            f"solution, {expected}"
        )
