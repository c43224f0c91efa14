"""Functions whose graph is not kept: their derivatives evaluate them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from metaimplicit.graph import (
    check_differentiable,
    check_twice_differentiable,
    find_dependencies,
)

Tensors = Sequence[Any]  # tensors, and whatever else passes through


def recomputed(function: Callable[[Tensors], Tensors], inputs: Tensors) -> list[Any]:
    """`function(inputs)` as one node of autograd's graph, which keeps the inputs alone.

    A derivative evaluates the function once more and frees what that took (Chen et al. 2016,
    checkpointing). The vector-Jacobian product of such a node,

        (v, x) ↦ (∂y/∂x)ᵀ v,

    is itself a function of tensors that is recomputed. So derivatives of every order exist, and
    none of them keeps a graph of the function.

    Args:
        function: `inputs -> outputs`, which draws no random numbers. Of the outputs, those that are
            no tensors pass through.
        inputs: Tensors, or anything else, which is a constant.

    Returns:
        The outputs. They depend on those inputs alone that the function reads.

    Raises:
        ValueError: The function reads another tensor that requires grad. On differentiating: it
            uses an operation without a second derivative.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> (y,) = recomputed(lambda tensors: [tensors[0] ** 3], [x])
        >>> (slope,) = torch.autograd.grad(y, x, create_graph=True)
        >>> slope.item(), torch.autograd.grad(slope, x)  # 3x² and 6x
        (12.0, (tensor(12.),))
    """
    if not torch.is_grad_enabled():
        return list(function(inputs))
    # Without their own graph, which no evaluation then walks through.
    at = [_leaf(x) if isinstance(x, Tensor) else x for x in inputs]
    outputs = list(function(at))
    numbers = [y.detach() if isinstance(y, Tensor) else y for y in outputs]
    of_tensors = [y for y in outputs if isinstance(y, Tensor)]
    variables = {i: x for i, x in enumerate(at) if isinstance(x, Tensor) and x.requires_grad}
    read = sorted(find_dependencies(of_tensors, variables, functions=[function]))
    if not read:
        return numbers

    def of_read(tensors: Tensors) -> list[Tensor]:
        full = list(at)
        for i, x in zip(read, tensors, strict=True):
            full[i] = x
        return [y for y in function(full) if isinstance(y, Tensor)]

    parts = _Parts(
        function=of_read,
        inputs=[inputs[i] for i in read],
        leaves=[at[i] for i in read],
        outputs=[y for y in numbers if isinstance(y, Tensor)],
    )
    # The views have nodes of their own, which tell whether a derivative in them is asked for.
    nodes = iter(_Recomputed.apply(parts, *(x.view_as(x) for x in parts.inputs)))
    return [next(nodes) if isinstance(y, Tensor) else y for y in numbers]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


class _Parts(NamedTuple):
    """What a node is made of.

    Attributes:
        function: Its inputs to its outputs, which are all tensors.
        inputs: Its inputs, with their graph.
        leaves: The same as leaves of autograd.
        outputs: The values of its outputs.
    """

    function: Callable[[Tensors], list[Tensor]]
    inputs: list[Tensor]
    leaves: list[Tensor]
    outputs: list[Tensor]


class _Recomputed(Function):
    """Given values as a function of inputs, which every derivative evaluates again."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, *views: Tensor) -> Any:
        ctx.function = parts.function
        ctx.leaves = parts.leaves
        ctx.set_materialize_grads(False)
        # Not the views: a further derivative would wait at them, once for each node.
        ctx.save_for_backward(*parts.inputs)
        return tuple(parts.outputs)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor | None) -> Any:
        inputs = ctx.saved_tensors  # raises an error if one was changed in place
        will_run = torch._C._will_engine_execute_node
        needed = [i for i, (node, _) in enumerate(ctx.next_functions) if will_run(node)]
        given = [i for i, v in enumerate(vectors) if v is not None]
        known = [vectors[i] for i in given]
        again = torch.is_grad_enabled()

        def pull_back(tensors: Tensors) -> list[Tensor | None]:
            at = tensors[: len(inputs)]
            with torch.enable_grad():
                values = ctx.function(at)
            v = dict(zip(given, tensors[len(inputs) :], strict=True))
            return _vjp(values, [at[i] for i in needed], v, again=again)

        # Under vmap, where k vectors are pulled back at once, no new leaves can be made.
        wanted = (
            recomputed(pull_back, [*inputs, *known]) if again else pull_back([*ctx.leaves, *known])
        )
        gradients: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(needed, wanted, strict=True):
            gradients[i] = gradient
        return None, *gradients


def _vjp(
    values: Sequence[Tensor], at: Sequence[Tensor], vectors: dict[int, Tensor], *, again: bool
) -> list[Tensor | None]:
    """(∂values/∂at)ᵀ vectors, with its graph if it is differentiated `again`."""
    variable = [i for i in vectors if values[i].requires_grad]
    if not variable or not at:
        return [None] * len(at)
    gradients = torch.autograd.grad(
        [values[i] for i in variable],
        list(at),
        [vectors[i] for i in variable],
        create_graph=again,
        allow_unused=True,
    )
    if again:
        check_differentiable(gradients)
        check_twice_differentiable([values[i] for i in variable], at)
    return list(gradients)
