"""The equation, once:  dg/dφ = ∂g/∂φ + (dθ*/dφ)ᵀ ∂g/∂θ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.compilation import run_compiled
from metaimplicit.compiled import Compile
from metaimplicit.data import PREFIX
from metaimplicit.features import Features
from metaimplicit.gradients import warn_if_useless
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.mended import is_transforming
from metaimplicit.methods import Adaptation, Gradients, Method, Report, make_method
from metaimplicit.methods.base import Dependencies
from metaimplicit.outer import OuterGradients, outer_gradients
from metaimplicit.params import Params, detached, leaves
from metaimplicit.problem import BilevelProblem, check_problem
from metaimplicit.solvers import SolverState
from metaimplicit.tensors import recordable
from metaimplicit.unchanged import notice_changed_data
from metaimplicit.unsupported import UnsupportedOperationError, explain_unsupported
from metaimplicit.vectorization import AutoVectorize, lift
from metaimplicit.wrappers import reject_distributed_calls


@dataclass(frozen=True)
class Hypergradient:
    """What `hypergradient` returns.

    Attributes:
        outer_loss: mean_tasks g(θ*(φ), φ), a scalar.
        losses: g of each task, `[tasks]`.
        grads: d outer_loss/dφ, with the names and shapes of `meta`.
        params: θ*, `{name: [tasks, *shape]}`. Unless `batched`, they have no task axis.
        report: Residuals, statuses, counts, and the inner gradient norm.
        end: Where the inner loop ended, for the `start` of another call. It shares the memory of
            `params`.
        aux: What the outer loss returned beside its scalar, detached. None without it.
        data_grads: d outer_loss/d data for the tensors of `data` that require grad: a pytree like
            `data`, None in the places of all else. None for a `Stream`.
    """

    outer_loss: Tensor
    losses: Tensor
    grads: Params
    params: Params
    report: Report
    end: Iterate
    aux: Any = None
    data_grads: Any = None


@explain_unsupported()
@reject_distributed_calls()
@torch.inference_mode(False)
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
    compile: Compile = False,
) -> Hypergradient:
    """The gradient of mean_tasks g(θ*(φ), φ) with respect to every floating-point entry of φ.

    Tensors of `data` that require grad have one as well. With the features c of the problem, which
    are evaluated once and held constant on the way to θ*,

        dg/dφ = ∂g/∂φ + (dθ*/dφ)ᵀ ∂g/∂θ + (∂c/∂φ)ᵀ [∂g/∂c + (dθ*/dc)ᵀ ∂g/∂θ].

    Args:
        problem: Initialisation, inner loss and outer loss, each written for one task.
        meta: φ, `{name: tensor}`. The tensors are not changed, nor is their `.grad`.
        data: Any pytree of tensors, or a `Stream` of such. If `batched`, each tensor carries the
            task axis first. Tensors that require grad have a gradient, except in a `Stream`.
        inner: The inner loop that approximates θ*, or its flag.
        method: How the derivative of θ* is computed, or the flag of that method.
        batched: Whether `data` is a batch of tasks. If not, there is one task.
        vectorize: `"vmap"` over the tasks, or `"loop"`: one call per task under one graph. With
            `"auto"`, vmap unless it differs from a loop or is impossible. The two are compared at
            the first batch of a shape and at a few later ones, and the report names the reason.
            With `"vmap"`, a warning says so if they differ.
        chunk_size: The number of tasks that are vmapped at a time, to bound memory. If None, all.
        state: `report.state` of the last call, where an implicit method's solver starts (Arbel &
            Mairal 2022). It helps if φ moved little and the data are the same.
        start: `end` of the last call, where the inner loop continues, optimiser state included. It
            is a constant: φ has no gradient through it. If None, the loop starts at `init`. For
            another optimiser, `end.for_optimizer` leaves the state out.
        compile: Whether the inner step, its pull, the products of an implicit method and the outer
            loss are compiled (`torch.compile`). They are compiled at the first call with a problem
            and an inner loop, for its shapes and any number of steps, and looped over in Python.
            This pays where launches dominate, as in small networks. Where it is impossible, a
            warning says why, and they run eager. `"auto"` does not require a C++ compiler.

    Returns:
        The gradients with losses, θ* and report. An entry of φ that is not floating-point, or that
        nothing reads, has a gradient of zero.

    Raises:
        ValueError: The method cannot give the gradient of an entry of φ. A loss is not a scalar per
            task. A loss depends on a tensor that requires grad and is not in `meta`. An option is
            out of range. `compile` is True, and there is no C++ compiler.
        UnsupportedOperationError: torch cannot differentiate or vmap an operation.
        FloatingPointError: A strict implicit method could not solve its system.

    Warns:
        RuntimeWarning: The gradient is not finite, or too large to mean anything. A function cannot
            be compiled, or is compiled again for other shapes.

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
    check_problem(problem)
    inner = make_inner(inner)
    method = make_method(method)
    method.check_inner(inner)
    phi = meta_leaves(meta)
    features = Features.evaluate(problem, phi, data)
    lifted = lift(
        replace(method.prepare(problem, batched=batched), features=None),
        phi,
        features.values,
        inner=inner,
        method=method,
        batched=batched,
        vectorize=vectorize,
        owner=problem,
        chunk_size=chunk_size,
        start=start,
    )
    if start is not None and start.for_optimizer(inner.optimizer_name) is not start:
        raise ValueError(
            f"start: got the end of steps of {start.optimizer}, expected steps of "
            f"{inner.optimizer_name}; start.for_optimizer({inner.optimizer_name!r}) leaves its "
            "state out"
        )
    # The tensors of c = features(φ, data) that depend on φ or on data are held constant.
    parts = lifted.entries.tensors
    variables = {**phi, **leaves(parts)}

    def attempt(lifted: LiftedProblem) -> tuple[Adaptation, OuterGradients, Gradients, Report]:
        adaptation = method.adapt(lifted, inner, variables)
        outer = outer_gradients(lifted, adaptation.params, variables, data=lifted.at(inner.steps))
        indirect, report = adaptation.pull_back(outer.of_params, variables, state)
        return adaptation, outer, indirect, report

    with torch.enable_grad(), notice_changed_data("data", features.values):
        adaptation, outer, indirect, report = run_compiled(
            attempt,
            lifted,
            compile=compile,
            inner=inner,
            method=method,
            meta=phi,
            owner=problem,
        )
    _check_reach(
        method,
        adaptation.dependencies,
        features.find_sources(parts),
        direct=outer.of_meta,
        indirect={name: indirect[name] for name, m in variables.items() if m.requires_grad},
    )

    # At constant c: dg/dφ = ∂g/∂φ + (dθ*/dφ)ᵀ ∂g/∂θ, and likewise dg/dc.
    partial = {name: _add(outer.of_meta[name], indirect[name]) for name in variables}

    # In all, dg/dφ + (∂c/∂φ)ᵀ dg/dc.
    through_features = features.pull_back(parts, partial)
    grads = {}
    for name, source in features.sources.items():
        total = _add(partial[name] if name in phi else None, through_features[name])
        # A copy, because autograd may give one tensor for several entries, or an expanded one.
        grads[name] = torch.zeros_like(source) if total is None else total.detach().clone()

    warn_if_useless(grads, report)

    params = detached(adaptation.params)
    return Hypergradient(
        outer_loss=outer.losses.mean(),
        losses=outer.losses,
        grads={name: grads[name] for name in phi},
        params=params if batched else _squeeze(params),
        report=replace(report, tasks_by=lifted.tasks_by).judged(outer.losses),
        end=replace(adaptation.end, optimizer=inner.optimizer_name),
        aux=_detach(outer.aux, batched),
        data_grads=features.entries.arrange(grads),
    )


def meta_leaves(meta: Params) -> Params:
    """φ without its graph, as leaves of autograd. Floating-point entries require grad.

    Raises:
        ValueError: `meta` is empty, or holds anything but real tensors.
        UnsupportedOperationError: A transform of `torch.func` is running.
    """
    if is_transforming():
        raise UnsupportedOperationError(
            "hypergradient, argmin and root: got a call within a transform of torch.func, expected "
            "one outside; use batched=True in the place of vmap, torch.autograd in the place of "
            "grad, jvp and jacrev, and where a loss makes the call, vectorize='loop' and reverse "
            "mode"
        )
    is_dict = isinstance(meta, Mapping)
    if not is_dict or not meta or not all(isinstance(m, Tensor) for m in meta.values()):
        got = f"{type(meta).__name__} {list(meta)}" if is_dict else type(meta).__name__
        raise ValueError(f"meta: got {got}, expected a non-empty dict of tensors by name")
    for name, m in meta.items():
        if str(name).startswith(PREFIX):
            raise ValueError(
                f"meta: got an entry {name!r}, expected another name, because those that start "
                f"with {PREFIX!r} stand for tensors of data"
            )
        if m.is_complex():
            raise ValueError(
                f"meta[{name!r}]: got {m.dtype}, expected real numbers; use torch.view_as_real"
            )
    return {
        name: recordable(m).detach().requires_grad_(m.is_floating_point())
        for name, m in meta.items()
    }


def _check_reach(
    method: Method,
    dependencies: Dependencies,
    reads: Mapping[str, set[str]],
    *,
    direct: Gradients,
    indirect: Gradients,
) -> None:
    """Raise ValueError if the method leaves out a way in which θ* depends on a source.

    Args:
        method: The method.
        dependencies: What θ* depends on: entries of φ, and tensors of c.
        reads: The sources that each tensor of c depends on.
        direct: ∂g/∂φ and ∂g/∂c.
        indirect: (dθ*/dφ)ᵀ ∂g/∂θ and (dθ*/dc)ᵀ ∂g/∂θ.
    """
    of_sources = dependencies.through(reads)
    variables = {name: reads.get(name, {name}) for name in indirect}
    for source in dict.fromkeys(chain(*variables.values())):
        names = [name for name, sources in variables.items() if source in sources]
        if all(indirect[name] is None for name in names):
            has_direct = any(direct[name] is not None for name in names)
            method.check_reach(source, of_sources, has_direct=has_direct)


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None is zero."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


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
