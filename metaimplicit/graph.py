"""Walks along autograd's graph: what a loss depends on, and what has no second derivative."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metaimplicit.captured import captured, content_of
from metaimplicit.unsupported import (
    FIRST_DERIVATIVES,
    SCALED_GRADIENT,
    UnsupportedOperationError,
)

Name = TypeVar("Name")

_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__  # of all that are so marked
_NO_SECOND_DERIVATIVE = (
    "inner loss: it uses an operation whose backward is once_differentiable, so second "
    f"derivatives would silently leave it out; replace it, or use {FIRST_DERIVATIVES}"
)


def tangent_of(tensor: Tensor) -> Tensor | None:
    """The tangent of a tensor in forward mode, `torch.autograd.forward_ad`. None without one."""
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent
    return tangent


def without_graph(tensor: Tensor) -> Tensor:
    """The tensor and its tangent, if it has one, without their graphs."""
    tangent = tangent_of(tensor)
    if tangent is None:
        return tensor.detach() if tensor.requires_grad else tensor
    dual: Tensor = forward_ad.make_dual(tensor.detach(), tangent.detach())
    return dual


def as_variable(tensor: Tensor) -> Tensor:
    """The tensor if it requires grad, or else one without a graph that does, with its tangent.

    Example:
        >>> as_variable(torch.ones(1))
        tensor([1.], requires_grad=True)
    """
    if tensor.requires_grad:
        return tensor
    tangent = tangent_of(tensor)
    leaf = tensor.detach().requires_grad_()
    if tangent is None:
        return leaf
    dual: Tensor = forward_ad.make_dual(leaf, tangent)
    return dual


def is_differentiated(tensor: Tensor) -> bool:
    """Whether derivatives with respect to a tensor are taken, in reverse or in forward mode.

    Example:
        >>> is_differentiated(torch.zeros(2)), is_differentiated(torch.zeros(2).requires_grad_())
        (False, True)
    """
    return tensor.requires_grad or tangent_of(tensor) is not None


def find_dependencies(
    outputs: Iterable[Tensor],
    meta: Mapping[Name, Tensor],
    *,
    params: Iterable[Tensor] = (),
    functions: Iterable[Any] | None = None,
) -> set[Name]:
    """The names of the entries of `meta` that `outputs` depend on.

    Args:
        outputs: Tensors with their graph. Those that do not require grad depend on nothing.
        meta: The tensors to look for. The walk ends at them, so an entry is not found if `outputs`
            depend on it through another entry alone.
        params: Further tensors at which the walk ends.
        functions: The functions that computed `outputs`. Their closures are searched to name an
            undeclared tensor. If None, undeclared tensors are allowed.

    Raises:
        ValueError: `outputs` depend on a leaf that requires grad, that is neither in `meta` nor in
            `params`, and that some variable of Python still holds. Its gradient would be lost. A
            leaf that the graph alone holds was made within the functions, as by a penalty on the
            gradient in the inputs, and nobody can ask for its gradient.

    Example:
        >>> a, b = torch.ones(2), torch.ones(2, requires_grad=True)
        >>> find_dependencies([a * b], {"a": a, "b": b})
        {'b'}
    """
    names = {_place(m): name for name, m in meta.items() if m.requires_grad}
    ends = set(names) | {_place(p) for p in params if p.requires_grad}
    pending = [_edge(output) for output in outputs if output.requires_grad]
    seen = set(pending)
    dependencies: set[Name] = set()
    while pending:
        edge = pending.pop()
        node, _ = edge
        following = node.next_functions  # a leaf has none
        leaf = None if following else getattr(node, "variable", None)
        place = edge if leaf is None else id(leaf)
        if place in ends:
            if place in names:
                dependencies.add(names[place])
            continue
        if leaf is not None and functions is not None and _references(leaf) > _OF_THE_GRAPH:
            raise ValueError(
                f"{_describe(leaf, functions)} requires grad and is captured by a "
                "loss, so its gradient would be lost; pass it in meta, or detach() it"
            )
        inputs = [e for e in following if e[0] is not None and e not in seen]
        seen.update(inputs)
        pending.extend(inputs)
    return dependencies


def find_leaves(
    starts: Iterable[GradientEdge],
    leaves: Mapping[Name, Tensor],
    *,
    ends: Iterable[GradientEdge],
) -> set[Name]:
    """The names of the leaves that are reached from `starts` by ways that pass no edge of `ends`.

    Example:
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> middle = a.exp()
        >>> start, end = get_gradient_edge(middle * b), get_gradient_edge(middle)
        >>> find_leaves([start], {"a": a, "b": b}, ends=[end])
        {'b'}
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    seen: set[tuple[Any, int]] = {(edge.node, edge.output_nr) for edge in ends}
    following: list[tuple[Any, int]] = [(edge.node, edge.output_nr) for edge in starts]
    found = set()
    while following:
        edge = following.pop()
        if edge in seen or edge[0] is None:
            continue
        seen.add(edge)
        leaf = getattr(edge[0], "variable", None)
        if id(leaf) in names:
            found.add(names[id(leaf)])
        following.extend(edge[0].next_functions)
    return found


def check_differentiable(gradients: Iterable[Tensor | None], ends: Iterable[Tensor] = ()) -> None:
    """Raise ValueError if `gradients` depend on an operation marked `once_differentiable`.

    Autograd itself says nothing: it takes the second derivative of such an operation for zero.

    Args:
        gradients: First derivatives with their graph (`create_graph=True`). None is skipped.
        ends: Tensors at which the walk ends. What they were computed by is not looked at.
    """
    for node in _nodes((g for g in gradients if g is not None), ends):
        if node.name() == "torch::autograd::Error":
            raise ValueError(_NO_SECOND_DERIVATIVE)


def check_twice_differentiable(
    losses: Iterable[Tensor], params: Iterable[Tensor], ends: Iterable[Tensor] = ()
) -> None:
    """Raise ValueError if a way from losses to θ passes an operation marked `once_differentiable`.

    Right below a loss, what such an operation pulls back is a constant. So is what it returns, and
    the graph of the gradient, which `check_differentiable` looks at, has no trace of it.

    Args:
        losses: With their graph.
        params: θ, at which the walk ends.
        ends: Other tensors at which the walk ends. What they were computed by is not looked at.
    """
    variables = [p for p in params if p.requires_grad]
    places = [_place(p) for p in variables]
    for node in _nodes(losses, [*variables, *ends]):
        function = getattr(type(node), "_forward_cls", None)
        if _is_once_differentiable(function) and _reaches(node, places):
            raise ValueError(_NO_SECOND_DERIVATIVE)


def _is_once_differentiable(function: Any) -> bool:
    """Whether this is an `autograd.Function` so marked, or one that torch made of it for vmap."""
    backward = getattr(function, "backward", None)
    if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
        return True
    held = [content_of(cell) for cell in getattr(backward, "__closure__", None) or ()]
    originals = [x for x in held if isinstance(x, type) and x is not function]
    return any(_is_once_differentiable(original) for original in originals)


def _reaches(node: Any, places: Collection[Any]) -> bool:
    """Whether a way down the graph from a node leads to one of the places; see `_place`.

    The node itself is not looked at.
    """
    pending = [node]
    seen = {node}
    while pending:
        for edge in pending.pop().next_functions:
            following, _ = edge
            if edge in places or id(getattr(following, "variable", None)) in places:
                return True
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return False


def reject_scaled_gradients(loss: Tensor) -> None:
    """Raise UnsupportedOperationError if an embedding scales its gradient by frequencies.

    Differences of such gradients are no second derivatives of the loss.

    Args:
        loss: The loss with its graph.
    """
    if any(getattr(node, "_saved_scale_grad_by_freq", False) for node in _nodes([loss])):
        raise UnsupportedOperationError(SCALED_GRADIENT)


def _nodes(tensors: Iterable[Tensor], ends: Iterable[Tensor] = ()) -> Iterator[Any]:
    """The nodes of the graph of these tensors, up to those of `ends`."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = {*pending, *(end.grad_fn for end in ends)}
    while pending:
        node = pending.pop()
        yield node
        inputs = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= inputs
        pending.extend(inputs)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """Where the gradient of a tensor enters the graph: a node, and the number of its output."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _place(tensor: Tensor) -> Any:
    """What tells a tensor in the graph: the edge at which it enters, or of a leaf its identity.

    Torch makes a view of a leaf to find its edge, which takes longer than the rest of the walk.
    """
    return id(tensor) if tensor.is_leaf else (tensor.grad_fn, tensor.output_nr)


def _references(tensor: Tensor) -> int:
    """How many references to a tensor there are, with those of the graph and of the caller."""
    return sys.getrefcount(tensor)


def _references_of_the_graph() -> int:
    """The references to a leaf that nothing but a graph holds."""
    node: Any = torch.zeros((), requires_grad=True).exp().grad_fn
    leaf = node.next_functions[0][0].variable
    return _references(leaf)


_OF_THE_GRAPH = _references_of_the_graph()


def _describe(tensor: Tensor, functions: Iterable[Any]) -> str:
    """The tensor by the name of the variable or parameter that holds it, or else by its shape."""
    for function in functions:
        for name, value in captured(function):
            if value is tensor:
                return f"tensor {name!r}"
            if isinstance(value, nn.Module):
                for parameter, p in value.named_parameters():
                    if p is tensor:
                        return f"parameter {f'{name}.{parameter}'!r}"
    return f"a tensor of shape {tuple(tensor.shape)}"
