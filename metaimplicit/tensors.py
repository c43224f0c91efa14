"""Data in the types that autograd and pytrees know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map


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
        # Torch shares the memory of arrays that are contiguous and may be written to.
        return torch.as_tensor(np.require(leaf, requirements=["C", "W"]))

    return tree_map(known, tree)


def recordable(leaf: Any) -> Any:
    """The same, or a copy of a tensor of `inference_mode`, which autograd cannot record.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(2)
        >>> x.is_inference(), recordable(x).is_inference()
        (True, False)
    """
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf
