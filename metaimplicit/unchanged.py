"""A check that a model leaves its inputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


@contextmanager
def reject_changed_data(name: str, data: Any) -> Iterator[None]:
    """Check that no tensor of some data is written to in place within the block.

    The losses are evaluated many times, so each evaluation would see other data.

    Args:
        name: What errors call the data.
        data: Any pytree. Tensors of `inference_mode`, which count no writes, are not checked.

    Raises:
        ValueError: At the end of the block, if a tensor was written to. An error of torch about
            that is its cause.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> with reject_changed_data("data", x):
        ...     x -= 1
        Traceback (most recent call last):
        ...
        ValueError: data: got a tensor of shape (2,) that a forward pass changes in place, \
expected one that stays, as all evaluations share it; write x = x - 1 in the place of x -= 1
    """
    tensors = [x for x in tree_leaves(data) if isinstance(x, Tensor) and not x.is_inference()]
    versions = [x._version for x in tensors]
    error = None
    try:
        yield
    except RuntimeError as raised:
        error = raised
    for x, version in zip(tensors, versions, strict=True):
        if x._version != version:
            raise ValueError(
                f"{name}: got a tensor of shape {tuple(x.shape)} that a forward pass changes in "
                "place, expected one that stays, as all evaluations share it; write x = x - 1 in "
                "the place of x -= 1"
            ) from error
    if error is not None:
        raise error
