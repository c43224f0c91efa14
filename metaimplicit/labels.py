"""Class indices of short integer types, which torch takes only outside of its transformations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metaimplicit.tensors import tensors_in

# Those of the unsigned types but uint8 have few operations in torch.
SHORT_INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def has_short_integers(data: Any) -> bool:
    """Whether a pytree holds a tensor of an integer type shorter than int64.

    Example:
        >>> has_short_integers({"image": torch.zeros(2, dtype=torch.uint8)})
        True
    """
    return any(x.dtype in SHORT_INTEGERS for x in tensors_in(data))


def long_labels(needed: bool) -> AbstractContextManager[Any]:
    """A context in which torch's losses of classes take labels of every integer type.

    Under vmap and in forward mode, `cross_entropy` and `nll_loss` refuse uint8, which they take
    outside.

    Args:
        needed: Whether there may be such labels. If not, the context does nothing.

    Example:
        >>> scores = torch.zeros(4, 3, 5)
        >>> labels = torch.zeros(4, 3, dtype=torch.uint8)
        >>> with long_labels(has_short_integers(labels)):
        ...     torch.vmap(F.cross_entropy)(scores, labels).shape
        torch.Size([4])
    """
    return _LongLabels() if needed else nullcontext()


class _LongLabels(TorchFunctionMode):
    """Casts the targets of torch's losses of classes to int64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.cross_entropy, F.nll_loss):
            if "target" in kwargs:
                kwargs["target"] = widened(kwargs["target"])
            else:
                args = (args[0], widened(args[1]), *args[2:])
        return func(*args, **kwargs)


def widened(labels: Tensor) -> Tensor:
    """Labels as int64, if they are of a shorter type of integers.

    Example:
        >>> widened(torch.ones(1, dtype=torch.uint8)).dtype, widened(torch.ones(1).bool()).dtype
        (torch.int64, torch.bool)
    """
    return labels.long() if labels.dtype in SHORT_INTEGERS else labels
