"""The outer loss at θ*, and its partial derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaimplicit.compiled import Compiler, in_one_layout
from metaimplicit.graph import find_dependencies
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import Gradients
from metaimplicit.params import Params, detached, leaves


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
    if problem.compiler is not None:
        return _compiled_outer_gradients(
            problem.compiler,
            problem,
            params,
            meta,
            data=data,
        )
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


def _compiled_outer_gradients(
    compiler: Compiler, problem: LiftedProblem, params: Params, meta: Params, *, data: Any
) -> OuterGradients:
    """The same by one compiled function."""

    def find_read() -> set[str]:
        theta = leaves(params)
        losses, _ = problem.outer(theta, meta, data)
        functions = [problem.problem.outer_loss]
        return find_dependencies(
            [losses],
            meta,
            params=theta.values(),
            functions=functions,
        )

    def make() -> Any:
        functions = problem.without_data()

        def outer(theta: Params, phi: Params, fixed: Params, data: Any) -> Any:
            def value(theta: Params, phi: Params) -> Any:
                losses, aux = functions.outer(theta, {**fixed, **phi}, data)
                return losses.mean(), (losses,) if aux is None else (losses, aux)

            gradients, rest = torch.func.grad(value, argnums=(0, 1), has_aux=True)(theta, phi)
            of_params, of_phi = gradients
            return (in_one_layout(of_params), of_phi), rest

        return outer

    read = compiler.remember("the outer loss", find_read)
    constants = detached(meta)
    phi = {name: m for name, m in constants.items() if name in read}
    fixed = {name: m for name, m in constants.items() if name not in read}
    gradients, (losses, *aux) = compiler.call(
        "the outer loss", None, make, params, phi, fixed, data
    )
    of_params, of_phi = gradients
    of_meta: Gradients = {**dict.fromkeys(meta), **of_phi}
    of_params = in_one_layout(of_params)
    return OuterGradients(losses, aux[0] if aux else None, of_params, of_meta)
