"""The equation, once:  dg/dφ = ∂g/∂φ + (dθ*/dφ)ᵀ ∂g/∂θ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop, KnownSolution, make_inner
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import Gradients, Method, Report, make_method
from metaimplicit.methods.pullback import attach_pullback
from metaimplicit.params import Params, detached, leaves
from metaimplicit.problem import BilevelProblem, Composite, Loss
from metaimplicit.solvers import SolverState
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import AutoVectorize, lift


@dataclass(frozen=True)
class Hypergradient:
    """What `hypergradient` returns.

    Attributes:
        outer_loss: mean_tasks g(θ*(φ), φ), a scalar.
        losses: g of each task, `[tasks]`.
        grads: d outer_loss/dφ, with the names and shapes of `meta`.
        params: θ*, `{name: [tasks, *shape]}`. Unless `batched`, they have no task axis.
        report: Residuals, statuses, counts, and the inner gradient norm.
        end: Where the inner loop ended, for the `start` of another call.
        aux: What the outer loss returned beside its scalar, detached. None without it.
    """

    outer_loss: Tensor
    losses: Tensor
    grads: Params
    params: Params
    report: Report
    end: Iterate
    aux: Any = None


@explain_unsupported()
def hypergradient(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop,
    method: str | Method,
    batched: bool = False,
    vectorize: AutoVectorize = "auto",
    chunk_size: int | None = None,
    state: SolverState | None = None,
    start: Iterate | None = None,
) -> Hypergradient:
    """The gradient of mean_tasks g(θ*(φ), φ) with respect to every floating-point entry of φ.

    Args:
        problem: Initialisation, inner loss and outer loss, each written for one task.
        meta: φ, `{name: tensor}`. The tensors are not changed, nor is their `.grad`.
        data: Any pytree of tensors, or a `Stream` of such. If `batched`, each tensor carries the
            task axis first.
        inner: The inner loop that approximates θ*, or its flag.
        method: How the derivative of θ* is computed, or the flag of that method.
        batched: Whether `data` is a batch of tasks. If not, there is one task.
        vectorize: `"vmap"` over the tasks, or `"loop"`: one call per task under one graph. With
            `"auto"`, vmap unless it differs from a loop or is impossible. The two are compared at
            the first batch of a shape and at a few later ones, and the report names the reason.
        chunk_size: The number of tasks that are vmapped at a time, to bound memory. If None, all.
        state: `report.state` of the last call, where an implicit method's solver starts (Arbel &
            Mairal 2022). It helps if φ moved little and the data are the same.
        start: `end` of the last call, where the inner loop continues, optimiser state included. It
            is a constant: φ has no gradient through it. If None, the loop starts at `init`.

    Returns:
        The gradients with losses, θ* and report. An entry of φ that is not floating-point, or that
        nothing reads, has a gradient of zero.

    Raises:
        ValueError: The method cannot give the gradient of an entry of φ. A loss is not a scalar per
            task. A loss depends on a tensor that requires grad and is not in `meta`. An option is
            out of range.
        UnsupportedOperationError: torch cannot differentiate or vmap an operation.
        FloatingPointError: A strict implicit method could not solve its system.

    Example:
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square(),
        ...     outer_loss=lambda params, meta, data: params["w"].square(),
        ... )
        >>> result = hypergradient(
        ...     problem, {"target": torch.tensor(3.0)}, data=None, inner="newton-cg", method="dense"
        ... )
        >>> result.params, result.grads  # θ* = target, so dg/dφ = 2 target
        ({'w': tensor(3.)}, {'target': tensor(6.)})
    """
    inner = make_inner(inner)
    method = make_method(method)
    method.check_inner(inner)
    phi = meta_leaves(meta)
    lifted = lift(
        method.outer_problem(problem),
        phi,
        data,
        inner=inner,
        method=method,
        batched=batched,
        vectorize=vectorize,
        owner=problem,
        chunk_size=chunk_size,
        start=start,
    )
    with torch.enable_grad():
        adaptation = method.adapt(lifted, inner, phi)
        outer = outer_gradients(lifted, adaptation.params, phi, data=lifted.at(inner.steps))
        indirect, report = adaptation.pull_back(outer.of_params, phi, state)

    for name, m in phi.items():
        if m.requires_grad and indirect[name] is None:
            has_direct = outer.of_meta[name] is not None
            method.check_reach(name, adaptation.dependencies, has_direct=has_direct)

    # dg/dφ = ∂g/∂φ + (dθ*/dφ)ᵀ ∂g/∂θ.
    grads = {name: _add(outer.of_meta[name], indirect[name], like=m) for name, m in phi.items()}
    params = detached(adaptation.params)
    return Hypergradient(
        outer_loss=outer.losses.mean(),
        losses=outer.losses,
        grads=grads,
        params=params if batched else _squeeze(params),
        # A loop that drifts may be far from its end although g hardly shows it.
        report=replace(report, tasks_by=lifted.tasks_by).judged_by(
            outer.losses, tolerance=1e-6 if inner.drift else 1e-3
        ),
        end=adaptation.end,
        aux=_detach(outer.aux, batched),
    )


@dataclass(frozen=True)
class OuterGradients:
    """The outer loss at θ*, and its partial derivatives.

    Attributes:
        losses: g of each task, `[tasks]`, detached.
        aux: What the outer loss returned beside its scalar.
        of_params: v = ∂(mean_tasks g)/∂θ, `{name: [tasks, *shape]}`.
        of_meta: ∂(mean_tasks g)/∂φ at fixed θ. None where g does not depend on the entry.
    """

    losses: Tensor
    aux: Any
    of_params: Params
    of_meta: Gradients


def outer_gradients(
    problem: LiftedProblem, params: Params, meta: Params, *, data: Any
) -> OuterGradients:
    """The outer loss and its partial derivatives in θ and φ.

    Args:
        problem: The lifted problem.
        params: θ*, `{name: [tasks, *shape]}`. Their graph is ignored.
        meta: φ, leaves of autograd.
        data: What the outer loss sees.

    Raises:
        ValueError: The outer loss is not a scalar per task, or depends on a tensor that requires
            grad and is not in `meta`.
    """
    theta = leaves(params)
    losses, aux = problem.outer(theta, meta, data)
    functions = [problem.problem.outer_loss]
    find_dependencies([losses], meta, params=theta.values(), functions=functions)

    phi = {name: m for name, m in meta.items() if m.requires_grad}
    targets = [*theta.values(), *phi.values()]
    gradients: list[Tensor | None] = [None] * len(targets)
    if losses.requires_grad:
        gradients = list(torch.autograd.grad(losses.mean(), targets, allow_unused=True))

    of_params = {}
    for (name, p), g in zip(theta.items(), gradients[: len(theta)], strict=True):
        of_params[name] = torch.zeros_like(p) if g is None else g
    of_meta: Gradients = dict.fromkeys(meta)
    of_meta |= dict(zip(phi, gradients[len(theta) :], strict=True))
    return OuterGradients(losses.detach(), aux, of_params, of_meta)


@explain_unsupported()
def argmin(
    inner_loss: Loss | Composite,
    init: Callable[[Params, Any], Params],
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop | None = None,
    method: str | Method,
    solution: Params | None = None,
    batched: bool = False,
    vectorize: AutoVectorize = "auto",
    chunk_size: int | None = None,
) -> Params:
    """θ*(φ) = argmin_θ f(θ, φ) as a differentiable function of φ.

    Compose it with any torch code and call `.backward()`. With `unrolled`, the result can be
    differentiated any number of times, with an implicit method once. A minimum that was found
    elsewhere, by scipy, say, is differentiated if it is passed as the `solution`.

    Args:
        inner_loss: f, of one task: `(params, meta, data) -> scalar`, a function or a `Composite`.
        init: `(meta, data) -> params` of one task, where the inner loop starts.
        meta: φ, `{name: tensor}`. Gradients flow to the tensors that require grad.
        data: As for `hypergradient`.
        inner: The inner loop that approximates θ*, or its flag. If None, there is a `solution`.
        method: How the derivative of θ* is computed, or the flag of that method.
        solution: θ*, `{name: [*shape]}` (`[tasks, *shape]` if `batched`), where ∂f/∂θ = 0. The
            method has to be an implicit one. If None, the inner loop finds it.
        batched: As for `hypergradient`.
        vectorize: As for `hypergradient`.
        chunk_size: As for `hypergradient`.

    Returns:
        θ*, `{name: [tasks, *shape]}`. Unless `batched`, they have no task axis.

    Raises:
        ValueError: As in `hypergradient`, or the method is "reptile" or "f2sa", which do not
            differentiate θ*. A gradient that the method cannot give may raise in backward only.
        RuntimeError: In backward: a second derivative of an implicit method, SAMA or forward mode,
            or a tensor of `meta` that was changed in place.

    Example:
        >>> target = torch.tensor(3.0, requires_grad=True)
        >>> params = argmin(
        ...     lambda params, meta, data: (params["w"] - meta["target"]).square(),
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     meta={"target": target},
        ...     data=None,
        ...     inner="newton-cg",
        ...     method="dense",
        ... )
        >>> params["w"].square().backward()
        >>> target.grad
        tensor(6.)
    """
    if (inner is None) == (solution is None):
        raise ValueError("argmin: expected either an inner loop or a solution")
    if solution is not None:
        inner = KnownSolution(solution if batched else _unsqueeze(solution))
    inner = make_inner(inner or "")
    method = make_method(method)
    if method.argmin_objection:
        raise ValueError(
            f"argmin method: got {method.flag!r}, which is {method.argmin_objection}; "
            "use 'unrolled' or an implicit method"
        )
    method.check_inner(inner)
    problem = BilevelProblem(init, inner_loss, outer_loss=lambda *_: None)
    phi = meta_leaves(meta)
    lifted = lift(
        problem,
        phi,
        data,
        inner=inner,
        method=method,
        batched=batched,
        vectorize=vectorize,
        owner=inner_loss,
        chunk_size=chunk_size,
    )
    for name, m in phi.items():
        m.requires_grad_(meta[name].requires_grad)
    with torch.enable_grad():
        # A pullback differentiates with respect to its own leaves, since entries of `meta` may
        # depend on one another.
        adaptation = method.adapt(lifted, inner, meta if method.carries_graph else phi)

    if adaptation.pullback is not None:
        params = attach_pullback(adaptation, method, meta)
    elif torch.is_grad_enabled():
        params = adaptation.params
        for name in set(meta) - find_dependencies(params.values(), meta):
            if meta[name].requires_grad:
                method.check_reach(name, adaptation.dependencies)
    else:
        params = detached(adaptation.params)
    return params if batched else _squeeze(params)


def meta_leaves(meta: Params) -> Params:
    """φ without its graph, as leaves of autograd. Floating-point entries require grad.

    Raises:
        ValueError: `meta` is empty, or holds anything but real tensors.
    """
    is_dict = isinstance(meta, Mapping)
    if not is_dict or not meta or not all(isinstance(m, Tensor) for m in meta.values()):
        got = f"{type(meta).__name__} {list(meta)}" if is_dict else type(meta).__name__
        raise ValueError(f"meta: got {got}, expected a non-empty dict of tensors by name")
    for name, m in meta.items():
        if m.is_complex():
            raise ValueError(
                f"meta[{name!r}]: got {m.dtype}, expected real numbers; use torch.view_as_real"
            )
    return {name: m.detach().requires_grad_(m.is_floating_point()) for name, m in meta.items()}


def _add(direct: Tensor | None, indirect: Tensor | None, *, like: Tensor) -> Tensor:
    """The sum of two gradients, of which None is zero."""
    if direct is None:
        return torch.zeros_like(like) if indirect is None else indirect.detach()
    return direct.detach() if indirect is None else (direct + indirect).detach()


def _unsqueeze(params: Params) -> Params:
    """The parameters of one task with a task axis."""
    return {name: p.unsqueeze(0) for name, p in params.items()}


def _squeeze(params: Params) -> Params:
    """The parameters of the only task, without the task axis."""
    return {name: p.squeeze(0) for name, p in params.items()}


def _detach(aux: Any, batched: bool) -> Any:
    """`aux` without its graph and, unless `batched`, without its task axis."""

    def detached(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach() if batched else leaf.squeeze(0).detach()

    return tree_map(detached, aux)
