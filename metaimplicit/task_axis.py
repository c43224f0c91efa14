"""Pytrees whose tensors carry the task axis first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The pytree with each of its tensors replaced by `function` of it.

    Tuples, lists and dicts are looked into here, which takes a fraction of torch's time.

    Example:
        >>> import torch
        >>> map_tensors(torch.neg, {"label": torch.tensor([3, 4]), "name": "digits"})
        {'label': tensor([-3, -4]), 'name': 'digits'}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    kind = type(tree)
    if kind is dict:
        return {key: map_tensors(function, x) for key, x in tree.items()}
    if kind is list or kind is tuple:
        return kind(map_tensors(function, x) for x in tree)
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def new_views(tree: Any) -> Any:
    """The same tensors in new views, as `task_of` makes them.

    A model may call `requires_grad_()` on its inputs, to differentiate in them. Such a call holds
    for the view alone, and neither for the caller's tensor nor for the next step.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> new_views([x])[0].requires_grad_().requires_grad, x.requires_grad
        (True, False)
    """
    if torch.compiler.is_compiling():
        return tree

    def view(x: Tensor) -> Tensor:
        if x.requires_grad or not x.is_floating_point() or x.layout != torch.strided:
            return x
        return x.view_as(x)

    return map_tensors(view, tree)


def task_of(tree: Any, index: int) -> Any:
    """The entry of one task.

    Example:
        >>> import torch
        >>> task_of({"label": torch.tensor([3, 4]), "name": "digits"}, 1)
        {'label': tensor(4), 'name': 'digits'}
    """
    return map_tensors(lambda x: x[index], tree)


def count_tasks(data: Any) -> int:
    """The number of tasks.

    Raises:
        ValueError: The tensors disagree, there is none, or an array cannot be split by task.

    Example:
        >>> import torch
        >>> count_tasks({"images": torch.zeros(4, 5, 28, 28), "labels": torch.zeros(4, 5)})
        4
    """
    leaves = tree_leaves(data)
    for leaf in leaves:
        reject_hidden_tensors("data", leaf)
    sizes = {x.shape[0] if x.dim() else None for x in leaves if isinstance(x, Tensor)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"data: got leading sizes {sorted(map(str, sizes))}, expected every tensor to carry "
            "one task axis of the same size ≥ 1 first; without a task axis, pass batched=False"
        )
    return int(sizes.pop() or 0)


def reject_hidden_tensors(name: str, leaf: Any) -> None:
    """Raise ValueError if a leaf of a pytree has tensors in it that cannot be split by task.

    Args:
        name: What the message calls it.
        leaf: The leaf.
    """
    if hides_tensors(leaf):
        raise ValueError(
            f"{name}: got {type(leaf).__name__}, which cannot be split by task, expected tensors "
            "in dicts, lists or tuples; use torch.as_tensor for arrays, and "
            "torch.export.register_dataclass for dataclasses"
        )


def hides_tensors(leaf: Any) -> bool:
    """Whether a leaf is an array, or an object with tensors or arrays in it."""
    if isinstance(leaf, Tensor):
        return False
    if isinstance(leaf, np.ndarray):
        return True
    parts = list(getattr(leaf, "__dict__", {}).values())
    if isinstance(leaf, Mapping):
        parts.extend(leaf.values())
    return any(isinstance(part, (Tensor, np.ndarray)) for part in parts)
