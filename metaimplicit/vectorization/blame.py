"""Which module is to blame for a difference between vmap and a loop over the tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metaimplicit.functional import functional_call
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params, leaves
from metaimplicit.problem import BilevelProblem
from metaimplicit.random_state import restored_random_state
from metaimplicit.tensors import tensors_in
from metaimplicit.vectorization.comparison import choose_tasks, find_objection
from metaimplicit.vectorization.evaluations import Evaluation, evaluations, weighted_sum


class _Call(NamedTuple):
    """A call of a module: the leaves of the pytree (its parameters and buffers, args, kwargs)."""

    module: nn.Module
    inputs: list[Any]
    spec: TreeSpec


def find_differing_module(
    problem: BilevelProblem, meta: Params, data: Any, evaluate: Evaluation
) -> nn.Module | None:
    """The first module whose outputs, or their derivatives, differ between vmap and a loop.

    Args:
        problem: The problem of one task.
        meta: φ.
        data: The data of all tasks, or a `Stream` of such.
        evaluate: It is evaluated in a loop. Then each call of a module is repeated by itself, under
            vmap and in a loop.

    Returns:
        The innermost of the modules that differ. None if each module agrees by itself.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: meta,
        ...     inner_loss=lambda params, meta, data: model(data).sum(),
        ...     outer_loss=lambda params, meta, data: model(data).sum(),
        ... )
        >>> compared = evaluations(last_step=1, second_derivatives=True)
        >>> meta = {"w": torch.ones(())}
        >>> print(find_differing_module(problem, meta, torch.ones(2, 3, 1), compared[1]))
        None
    """
    lifted = LiftedProblem(
        problem,
        choose_tasks(data),
        batched=True,
        vectorize="loop",
    )
    device = next(iter(meta.values())).device
    with torch.enable_grad(), restored_random_state(device):
        theta = leaves(lifted.init(meta))
        calls = _record_calls(lambda: evaluate(lifted, theta, meta))

    # The loop makes all calls of one task before those of the next.
    calls_of_task = len(calls) // lifted.tasks
    for position in range(calls_of_task):
        same_call = calls[position::calls_of_task]
        if _differs(same_call):
            return same_call[0].module
    return None


def _record_calls(function: Callable[[], Any]) -> list[_Call]:
    """The calls of modules in a function, in the order in which they end."""
    modules: dict[nn.Module, None] = {}
    handles = [register_module_forward_pre_hook(lambda module, _: modules.setdefault(module))]
    calls: list[_Call] = []
    thread = get_ident()

    def record(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        if get_ident() != thread:
            return
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        inputs, spec = tree_flatten((state, args, kwargs))
        constants = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        calls.append(_Call(module, constants, spec))

    try:
        function()
        handles.pop().remove()
        # Torch never removes all of a hook with keywords that is registered for every module.
        handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
        function()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _differs(calls: list[_Call]) -> bool:
    """Whether a call of one module, with the inputs of each task, differs under vmap."""
    module, first, spec = calls[0]
    if len({call.module for call in calls}) > 1 or any(call.spec != spec for call in calls):
        return False
    columns = list(zip(*(call.inputs for call in calls), strict=True))
    tensors = {
        str(i): torch.stack(column)
        for i, column in enumerate(columns)
        if isinstance(column[0], Tensor) and len({x.shape for x in column}) == 1
    }
    params = {key: x for key, x in tensors.items() if x.is_floating_point()}

    def loss(theta: Params, _: Params, data: Params) -> Tensor:
        replaced = data | theta
        inputs = [replaced.get(str(i), x) for i, x in enumerate(first)]
        state, args, kwargs = tree_unflatten(inputs, spec)
        outputs = functional_call(module, state, args, kwargs)
        return weighted_sum([x.double() for x in tensors_in(outputs)])

    problem = BilevelProblem(lambda _, data: {key: data[key] for key in params}, loss, loss)
    meta = {"unused": torch.zeros(())}
    compared = evaluations(last_step=0, second_derivatives=True)
    with suppress(Exception):  # a module without a gradient, say
        objection = find_objection(problem, meta, tensors, compared)
        return objection is not None and objection.difference is not None
    return False
