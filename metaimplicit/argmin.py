"""The minimum of an inner loss as a function that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metaimplicit.data import outside_inference_mode
from metaimplicit.graph import find_dependencies, is_differentiated, tangent_of
from metaimplicit.hypergradient import meta_leaves
from metaimplicit.inner import InnerLoop, KnownSolution, make_inner
from metaimplicit.inner.known import read_solution
from metaimplicit.methods import Method, make_method
from metaimplicit.methods.base import ALL_ROUTES
from metaimplicit.methods.pullback import attach_pullback, forward_mode_error
from metaimplicit.params import Params, detached, floating_entry, leaves
from metaimplicit.problem import BilevelProblem, Composite, Loss
from metaimplicit.tensors import recordable
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import AutoVectorize, lift


@explain_unsupported()
@outside_inference_mode()
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
    """θ*(φ) = argmin_θ f(θ, φ) as a differentiable function of φ and of the data.

    Compose it with any torch code and call `.backward()`. With `unrolled`, `truncated`, and an
    implicit method whose A is the Hessian without damping, the result can be differentiated any
    number of times, with most other methods once. `unrolled` with the loop `Newton` has three
    derivatives. The derivative of an implicit method's solve is again a solve. The same methods,
    and implicit ones with another A, pass tangents in forward mode (`torch.autograd.forward_ad`):
    (dθ*/dφ) φ̇ = −A⁻¹ (∂²f/∂θ∂φ) φ̇. A minimum that was found elsewhere, by scipy, say, is
    differentiated if it is passed as the `solution`.

    Args:
        inner_loss: f, of one task: `(params, meta, data) -> scalar`, a function or a `Composite`.
        init: `(meta, data) -> params` of one task, where the inner loop starts.
        meta: φ, `{name: tensor}`. Gradients flow to the tensors that require grad.
        data: As for `hypergradient`. Gradients flow to the tensors that require grad.
        inner: The inner loop that approximates θ*, or its flag. If None, there is a `solution`.
        method: How the derivative of θ* is computed, or the flag of that method.
        solution: θ*, `{name: [*shape]}` (`[tasks, *shape]` if `batched`), where ∂f/∂θ = 0:
            tensors, or arrays of numpy. The method has to be an implicit one. If None, the inner
            loop finds it.
        batched: As for `hypergradient`.
        vectorize: As for `hypergradient`.
        chunk_size: As for `hypergradient`.

    Returns:
        θ*, `{name: [tasks, *shape]}`. Unless `batched`, they have no task axis.

    Raises:
        ValueError: As in `hypergradient`, or the method is "reptile" or "f2sa", which do not
            differentiate θ*. A gradient that the method cannot give may raise in backward only.
        RuntimeError: A derivative that the method does not have: a second one, or one in forward
            mode. In backward: a tensor of `meta` or `data` was changed in place.

    Warns:
        RuntimeWarning: In backward: ∂f/∂θ does not vanish at θ*, as an implicit method assumes, or
            its linear system was not solved.

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
    phi = meta_leaves(meta)
    if solution is not None:
        known = read_solution(solution, like=floating_entry(phi))
        inner = KnownSolution(known if batched else _unsqueeze(known))
    inner = make_inner(inner or "")
    method = make_method(method)
    if method.argmin_objection:
        raise ValueError(
            f"argmin method: got {method.flag!r}, which is {method.argmin_objection}; "
            "use 'unrolled' or an implicit method"
        )
    method.check_inner(inner)
    problem = BilevelProblem(init, inner_loss, outer_loss=lambda *_: None)
    lifted = lift(
        method.prepare(problem, batched=batched),
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
        m.requires_grad_(is_differentiated(meta[name]))

    # Tensors of the data that require grad are entries of φ beside those of `meta`.
    sources = {name: recordable(m) for name, m in meta.items()} | lifted.entries.tensors
    variables = {**phi, **leaves(lifted.entries.tensors)}
    if not method.forward_mode and any(tangent_of(m) is not None for m in sources.values()):
        raise forward_mode_error(method.flag)
    with torch.enable_grad():
        # A pullback differentiates with respect to its own leaves, since the sources may depend on
        # one another.
        adaptation = method.adapt(lifted, inner, sources if method.carries_graph else variables)

    if adaptation.pullback is not None:
        params = attach_pullback(adaptation, method, sources, data=lifted.data)
    elif torch.is_grad_enabled() and any(map(is_differentiated, sources.values())):
        params = adaptation.params
        if method.reach != ALL_ROUTES:
            for name in sources.keys() - find_dependencies(params.values(), sources):
                if sources[name].requires_grad:
                    method.check_reach(name, adaptation.dependencies)
    else:
        params = detached(adaptation.params)
    return params if batched else _squeeze(params)


def _unsqueeze(params: Params) -> Params:
    """The parameters of one task with a task axis."""
    return {name: p.unsqueeze(0) for name, p in params.items()}


def _squeeze(params: Params) -> Params:
    """The parameters of the only task, without the task axis."""
    return {name: p.squeeze(0) for name, p in params.items()}
