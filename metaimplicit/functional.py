"""Calls of a module with other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """`torch.func.functional_call`, also of a module that holds another one under two names.

    Torch replaces the parameters of such a module twice, and leaves the replacements there.

    Args:
        module: The module.
        tensors: What replaces its parameters and buffers, by name. A tensor that stands in several
            places is replaced in all of them. Give it by one of its names only.
        args: The positional arguments of the call.
        kwargs: The keyword arguments.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> twice = nn.Sequential(layer, layer)
        >>> functional_call(twice, {"0.weight": torch.tensor([[3.0]])}, (torch.ones(1),))
        tensor([9.])
        >>> type(layer.weight).__name__
        'Parameter'
    """
    given = dict(tensors)
    keywords = dict(kwargs or {})
    parts = [part for _, part in module.named_modules(remove_duplicate=False)]
    if len(parts) == len(set(parts)):
        return torch.func.functional_call(module, given, args, keywords)
    once = _at_first_names(module, given)
    return torch.func.functional_call(module, once, args, keywords, tie_weights=False)


def _at_first_names(module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The replacements, each by the first name of every place where its tensor stands."""
    replacement = {
        id(tensor): given[name] for name, tensor in _named_tensors(module) if name in given
    }
    places = {}
    for prefix, part in module.named_modules():
        for key, tensor in _named_tensors(part, recurse=False):
            if id(tensor) in replacement:
                places[f"{prefix}.{key}" if prefix else key] = replacement[id(tensor)]
    return places


def _named_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)
