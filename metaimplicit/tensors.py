"""Data in the types that autograd and pytrees know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in order.

    Tuples, lists and dicts are looked into here, which takes a fraction of torch's time.

    Example:
        >>> tensors_in({"x": torch.ones(1), "name": "one"})
        [tensor([1.])]
    """
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    kind = type(tree)
    if isinstance(tree, Tensor):
        found.append(tree)
    elif kind is dict:
        for x in tree.values():
            _collect(x, found)
    elif kind is list or kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        for x in tree:
            _collect(x, found)
    elif tree is not None:
        found += [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def copied_tensors(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of plain containers with a copy of each tensor.

    Example:
        >>> state = {"w": torch.zeros(1), "steps": 3}
        >>> copy = copied_tensors(state)
        >>> state["w"] += 1
        >>> copy
        {'w': tensor([0.]), 'steps': 3}
    """
    copied: dict[str, Any] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)
    return copied


def with_known_types(tree: Any) -> Any:
    """A pytree with its mappings as dicts, which pytrees know, and its arrays as tensors.

    Arrays that are no numbers, such as those of text, stay as they are.

    Example:
        >>> with_known_types((np.ones(2), "name"))
        (tensor([1., 1.], dtype=torch.float64), 'name')
    """
    if isinstance(tree, Tensor):
        return tree

    def known(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return with_known_types(dict(leaf))
        if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "biufc":
            return leaf
        # Torch shares the memory of arrays that are contiguous, in the byte order of the machine,
        # and may be written to.
        native = leaf.dtype.newbyteorder("=")
        return torch.as_tensor(np.require(leaf, native, requirements=["C", "W"]))

    return tree_map(known, tree)


def recordable(leaf: Any) -> Any:
    """The same, or a copy of a tensor of `inference_mode`, which autograd cannot record.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(2)
        >>> x.is_inference(), recordable(x).is_inference()
        (True, False)
    """
    if torch.compiler.is_compiling():  # which `is_inference` would end
        return leaf
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform such as vmap wraps the tensor.

    Example:
        >>> is_transformed(torch.zeros(2))
        False
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def put_back_dead(present: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Put back the entries in which a forward pass under vmap has left a tensor.

    Such a tensor is dead after vmap: it can be neither read nor saved. Entries that are new go.

    Args:
        present: What a module holds, by name.
        before: What it held before the pass.

    Example:
        >>> present = {"last": None}
        >>> _ = torch.vmap(lambda x: present.update(last=x) or x)(torch.ones(2))
        >>> put_back_dead(present, {"last": 1})
        >>> present
        {'last': 1}
    """
    dead = [n for n, x in present.items() if isinstance(x, Tensor) and is_transformed(x)]
    for name in dead:
        del present[name]
        if name in before:
            present[name] = before[name]
