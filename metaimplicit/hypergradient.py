"""The equation, once:  dg/dφ = ∂g/∂φ + (dθ*/dφ)ᵀ ∂g/∂θ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map

from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import (
    Adaptation,
    Gradients,
    Method,
    Report,
    Reptile,
    ValueFunction,
    make_method,
)
from metaimplicit.params import Params, leaves
from metaimplicit.problem import BilevelProblem, Composite, Loss
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class Hypergradient:
    """What `hypergradient` returns.

    Attributes:
        outer_loss: mean over tasks of g(θ*(φ), φ), a scalar.
        losses: g for each task, `[tasks]`.
        grads: d outer_loss/dφ, named and shaped as `meta`.
        params: θ*, `{name: [tasks, *shape]}`; without the task axis unless `batched`.
        report: residuals, statuses, counts, the inner gradient norm.
        end: where the inner loop ended, for the `start` of another call.
        aux: what the outer loss returned beside its scalar, detached.
    """

    outer_loss: Tensor
    losses: Tensor
    grads: Params
    params: Params
    report: Report
    end: Iterate
    aux: Any = None


def hypergradient(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop,
    method: str | Method,
    batched: bool = False,
    vectorize: Vectorize = "vmap",
    chunk_size: int | None = None,
    state: SolverState | None = None,
    start: Iterate | None = None,
) -> Hypergradient:
    """The gradient of mean_tasks g(θ*(φ), φ) with respect to every floating-point entry of φ = `meta`.

    Args:
        problem: init, inner and outer loss, each written for one problem.
        meta: φ, `{name: tensor}`; not changed, and no graph of theirs is touched.
        data: any pytree of tensors, or a `Stream` of them; with `batched` each carries the task axis first.
        inner: the inner loop that approximates θ*, or its flag with all defaults.
        method: how the derivative is taken, a `Method` or its flag.
        batched: whether `data` is a batch of tasks.
        vectorize: `"vmap"` over tasks, or a `"loop"` under one graph.
        chunk_size: tasks vmapped at a time, to bound memory.
        state: `report.state` of the call before, from where an implicit method's solver goes on (Arbel & Mairal 2022);
            of use where `meta` moves little and the data are the same.
        start: `end` of the call before, from where the inner loop goes on, its optimiser's state included, rather than
            from init; `meta` is then no cause of it.

    Raises:
        ValueError: a gradient the method cannot give; a loss that is not a scalar per task; a tensor that requires
            grad and reaches a loss otherwise than through `meta`; any option out of its range.
        FloatingPointError: from a strict implicit method.
    """
    inner, method = make_inner(inner), make_method(method)
    lifted = LiftedProblem(
        problem, data, batched=batched, vectorize=vectorize, chunk_size=chunk_size, start=start
    )
    with torch.enable_grad():
        phi = _meta_leaves(meta)
        adaptation = method.adapt(lifted, inner, phi)
        losses, aux, of_theta, direct = outer_gradients(
            lifted, adaptation.params, phi, lifted.at(inner.steps)
        )
        indirect, report = adaptation.pull_back(of_theta, phi, state)
    total = {name: _add_gradients(direct.get(name), indirect[name], m) for name, m in phi.items()}
    for name, m in phi.items():
        if m.requires_grad and indirect[name] is None:
            _check_reachable(name, method, inner, adaptation, direct=direct.get(name) is not None)
    return Hypergradient(
        outer_loss=losses.mean(),
        losses=losses,
        grads=total,
        params={
            n: p.detach() if batched else p.detach().squeeze(0)
            for n, p in adaptation.params.items()
        },
        report=report,
        end=adaptation.end,
        aux=_detach(aux, batched),
    )


def outer_gradients(
    problem: LiftedProblem, params: Params, phi: Params, data: Any
) -> tuple[Tensor, Any, Params, Gradients]:
    """g for each task, its aux, and the gradients of its mean: in θ, v of the pullback, and in φ with θ held, ∂g/∂φ."""
    theta = leaves(params)
    losses, aux = problem.outer(theta, phi, data)
    find_dependencies([losses], phi, theta.values(), [problem.problem.outer_loss])
    names = [name for name, m in phi.items() if m.requires_grad]
    sources, outer = [*theta.values(), *(phi[name] for name in names)], losses.mean()
    grads = (
        torch.autograd.grad(outer, sources, allow_unused=True)
        if outer.requires_grad
        else [None] * len(sources)
    )
    of_theta = {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(theta.items(), grads, strict=False)
    }
    return losses.detach(), aux, of_theta, dict(zip(names, grads[len(theta) :], strict=True))


def argmin(
    inner_loss: Loss | Composite,
    init: Callable[[Params, Any], Params],
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop,
    method: str | Method,
    batched: bool = False,
    vectorize: Vectorize = "vmap",
    chunk_size: int | None = None,
) -> Params:
    """θ*(φ) = argmin_θ f(θ, φ) as a function that autograd knows: compose it with any torch code and `.backward()`.

    Args are those of `hypergradient`; gradients flow to the tensors of `meta` that require them. With `unrolled` the
    result is differentiable at will, with an implicit method once.

    Returns:
        `{name: [*shape]}`, or `[tasks, *shape]` if `batched`.

    Raises:
        ValueError: as `hypergradient`, or method "reptile", which is no derivative.
        RuntimeError: on a second backward through an implicit method.
    """
    inner, method = make_inner(inner), make_method(method)
    if isinstance(method, (Reptile, ValueFunction)):
        what = (
            "no derivative"
            if isinstance(method, Reptile)
            else "no derivative without its outer loss"
        )
        raise ValueError(
            f"argmin method: got {method.flag!r}, which is {what}; use 'unrolled' or an implicit method"
        )
    problem = BilevelProblem(init, inner_loss, lambda *_: None)
    lifted = LiftedProblem(
        problem, data, batched=batched, vectorize=vectorize, chunk_size=chunk_size
    )
    phi = {
        name: m.requires_grad_(meta[name].requires_grad) for name, m in _meta_leaves(meta).items()
    }
    # a pullback differentiates leaves of its own: entries of `meta` may depend on one another
    with torch.enable_grad():
        adaptation = method.adapt(lifted, inner, meta if method.graph else phi)
    params = adaptation.params
    if adaptation.pullback is not None:
        names = [name for name, m in meta.items() if m.requires_grad]
        values = _Pullback.apply(adaptation, method, inner, names, *(meta[name] for name in names))
        params = dict(zip(params, values, strict=True))
    elif not torch.is_grad_enabled():
        params = {name: p.detach() for name, p in params.items()}
    else:
        for name in set(meta) - find_dependencies(params.values(), meta, [], None):
            if meta[name].requires_grad:
                _check_reachable(name, method, inner, adaptation)
    return params if batched else {name: p.squeeze(0) for name, p in params.items()}


class _Pullback(torch.autograd.Function):
    """θ*(φ), whose derivative is the adaptation's pullback."""

    @staticmethod
    def forward(
        ctx: Any,
        adaptation: Adaptation,
        method: Method,
        inner: InnerLoop,
        names: list[str],
        *meta: Tensor,
    ) -> Any:
        ctx.adaptation, ctx.method, ctx.inner, ctx.names = adaptation, method, inner, names
        ctx.save_for_backward(*meta)
        return tuple(p.clone() for p in adaptation.params.values())

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        meta, twice = (
            ctx.saved_tensors,
            torch.is_grad_enabled(),
        )  # an error where one was changed in place
        with torch.enable_grad():
            v = dict(
                zip(ctx.adaptation.params, (vector.detach() for vector in vectors), strict=True)
            )
            gradients, _ = ctx.adaptation.pull_back(v, {})
        for name in ctx.names:
            if gradients[name] is None:
                _check_reachable(name, ctx.method, ctx.inner, ctx.adaptation)
        found = [gradients[name] for name in ctx.names]
        if twice:
            found = [None if g is None else _Once.apply(g, *meta, *vectors) for g in found]
        return None, None, None, None, *found


class _Once(torch.autograd.Function):
    """The identity, but an error to differentiate."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, *_: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> Any:
        raise RuntimeError(
            "argmin is differentiable once under an implicit method; for more, use method='unrolled'"
        )


def _meta_leaves(meta: Params) -> Params:
    if not meta or not all(isinstance(m, Tensor) for m in meta.values()):
        raise ValueError(
            f"meta: got {type(meta).__name__} {list(meta)}, expected a non-empty dict of tensors"
        )
    if wrong := [name for name, m in meta.items() if m.is_complex()]:
        raise ValueError(
            f"meta[{wrong[0]!r}]: got {meta[wrong[0]].dtype}, expected real numbers; use torch.view_as_real"
        )
    return {n: m.detach().requires_grad_(m.is_floating_point()) for n, m in meta.items()}


def _check_reachable(
    name: str, method: Method, inner: InnerLoop, adaptation: Adaptation, direct: bool = False
) -> None:
    """A gradient of None is zero where the method reaches all that reads the entry; else it just cannot give it.

    First-order is content with the `direct` gradient of what its two losses share.
    """
    reads, reach = adaptation.reads, method.reach
    if (
        (name in reads.start and "start" not in reach)
        or (inner.reads(name) and "loop" not in reach)
        or (name in reads.loss and "loss" not in reach and not direct)
    ):
        raise ValueError(
            f"{method.flag} cannot give the gradient of meta[{name!r}]: {method.remedy}"
        )


def _add_gradients(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    if a is None and b is None:
        return torch.zeros_like(like)
    return (b if a is None else a if b is None else a + b).detach()  # type: ignore[union-attr]


def _detach(aux: Any, batched: bool) -> Any:
    return tree_map(
        lambda x: (x if batched else x.squeeze(0)).detach() if isinstance(x, Tensor) else x, aux
    )
