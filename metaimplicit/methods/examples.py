"""Pytrees whose tensors carry the examples of one problem first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.task_axis import hides_tensors, map_tensors
from metaimplicit.tensors import with_known_types


def count_examples(data: Any) -> int:
    """The number of examples, the first axis of every tensor that has one. It is 0 without any.

    Raises:
        ValueError: The tensors disagree, or they are hidden in an object.

    Example:
        >>> import torch
        >>> count_examples({"x": torch.zeros(4, 2), "y": torch.zeros(4), "scale": torch.ones(())})
        4
    """
    leaves = tree_leaves(with_known_types(data))
    for leaf in leaves:
        if hides_tensors(leaf):
            raise ValueError(
                f"microbatch: got data with a {type(leaf).__name__}, whose examples cannot be "
                "sliced, expected tensors in dicts, lists or tuples"
            )
    sizes = {len(x) for x in leaves if isinstance(x, Tensor) and x.dim()}
    if len(sizes) > 1:
        raise ValueError(
            f"microbatch: got data with leading sizes {sorted(sizes)}, expected one number of "
            "examples first in every tensor that has an axis; hand in training and validation data "
            "by a Stream, and what serves all examples by meta or a closure"
        )
    return sizes.pop() if sizes else 0


def map_rows(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """The data with `function` of every tensor that has an axis.

    Example:
        >>> import torch
        >>> map_rows(len, {"x": torch.zeros(4, 2), "scale": torch.ones(())})
        {'x': 4, 'scale': tensor(1.)}
    """
    return map_tensors(lambda x: function(x) if x.dim() else x, data)


def rows(data: Any, start: int, end: int) -> Any:
    """The examples from `start` to `end`, as views.

    Example:
        >>> import torch
        >>> rows((torch.arange(5), torch.ones(())), 1, 3)
        (tensor([1, 2]), tensor(1.))
    """
    return map_rows(lambda x: x[start:end], data)
