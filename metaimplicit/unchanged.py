"""A check whether a model leaves its inputs alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaimplicit.tensors import tensors_in


@contextmanager
def notice_changed_data(name: str, data: Any) -> Iterator[None]:
    """Warn if a tensor of the data is written to in place within the block.

    The losses are evaluated many times, so each evaluation may see other data. It does not if the
    write leaves the data of the first one as they are, as a clamp does.

    Args:
        name: What the message calls the data.
        data: Any pytree. Tensors of `inference_mode`, which count no writes, are not checked.

    Raises:
        ValueError: At the end of the block, if a tensor was written to and torch raised an error,
            which is its cause.

    Warns:
        RuntimeWarning: At the end of the block, if a tensor was written to.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> with warnings.catch_warnings(record=True) as given:
        ...     warnings.simplefilter("always")
        ...     with notice_changed_data("data", x):
        ...         x -= 1
        >>> print(given[0].message)
        data: a forward pass writes to a tensor of shape (2,) in place, so each evaluation may see \
other data, and the gradient be wrong; write x = x - 1 in the place of x -= 1
    """
    tensors = [x for x in tensors_in(data) if not x.is_inference()]
    versions = [x._version for x in tensors]
    error = None
    try:
        yield
    except RuntimeError as raised:
        error = raised
    pairs = zip(tensors, versions, strict=True)
    changed = [x for x, version in pairs if x._version != version]
    if changed:
        message = (
            f"{name}: a forward pass writes to a tensor of shape {tuple(changed[0].shape)} in "
            "place, so each evaluation may see other data, and the gradient be wrong; write "
            "x = x - 1 in the place of x -= 1"
        )
        if error is not None:
            raise ValueError(message) from error
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    if error is not None:
        raise error
