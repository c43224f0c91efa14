"""Walking autograd's graph, to find what a loss depends on and to name what it should not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge


def find_dependencies(
    outputs: Iterable[Tensor],
    meta: dict[str, Tensor],
    params: Iterable[Tensor],
    sources: Iterable[Any] | None,
) -> set[str]:
    """The names of the entries of `meta` that `outputs` depend on.

    Args:
        outputs: tensors with their graph.
        meta, params: what they may depend on; the walk ends there.
        sources: the functions that made them, searched for the name of a culprit; None, nothing is one.

    Raises:
        ValueError: they depend on another tensor that requires grad: a derivative would silently leave it out.
    """
    known = {_key(m): name for name, m in meta.items() if m.requires_grad}
    ends = set(known) | {_key(p) for p in params if p.requires_grad}
    pending = [_key(out) for out in outputs if out.requires_grad]
    seen = set(pending)
    names: set[str] = set()
    while pending:
        edge = pending.pop()
        if edge in ends:
            if edge in known:
                names.add(known[edge])
            continue
        node = edge[0]
        if not hasattr(node, "next_functions"):
            continue
        if hasattr(node, "variable") and sources is not None:
            raise ValueError(
                f"{_name(node.variable, sources)} requires grad and is captured by a loss, so its gradient would be "
                "lost; pass it in meta, or detach() it"
            )
        new = [e for e in node.next_functions if e[0] is not None and e not in seen]
        seen.update(new)
        pending.extend(new)
    return names


def check_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """Raise ValueError where the graph of `gradients` ends in an operation marked `once_differentiable`.

    Autograd does not: nothing leads from such a node on, so a second derivative through it is silently zero.
    """
    pending = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                "inner loss: it uses an operation whose backward is once_differentiable, so second derivatives would "
                "silently leave it out; replace it, or use 'first-order' or Implicit(products='finite-differences')"
            )
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        pending.extend(new)


def _key(tensor: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _name(tensor: Tensor, sources: Iterable[Any]) -> str:
    for source in sources:
        for name, value in _captured(source):
            if value is tensor:
                return f"tensor {name!r}"
            if isinstance(value, nn.Module):
                for parameter, p in value.named_parameters():
                    if p is tensor:
                        return f"parameter {f'{name}.{parameter}'!r}"
    return f"a tensor of shape {tuple(tensor.shape)}"


def _captured(source: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """The variables a function sees, through partials, bound methods and functions it calls by name."""
    if depth == 0:
        return
    if not inspect.isfunction(source):
        parts: dict[str, Any] = dict(getattr(source, "__dict__", {}))
        if inspect.ismethod(source):
            parts = {"__func__": source.__func__, **vars(source.__self__)}
        elif hasattr(source, "func"):
            parts = {
                "func": source.func,
                **source.keywords,
                **{str(i): a for i, a in enumerate(source.args)},
            }
    else:
        variables = inspect.getclosurevars(source)
        parts = {**variables.nonlocals, **variables.globals}
    for name, value in parts.items():
        yield name, value
        if isinstance(value, Callable) and not isinstance(value, (type, nn.Module)):  # type: ignore[arg-type]
            yield from _captured(value, depth - 1)
