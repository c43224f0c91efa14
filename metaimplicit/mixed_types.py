"""Functions of tensors in double precision that hold other tensors in a narrower type."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from metaimplicit.tensors import tensors_in

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def takes_mixed_types(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, in which operations of torch may mix double precision with a narrower type.

    Torch refuses many such mixtures, and computes some in the narrower type. Here the narrower
    tensors are converted. An operation that writes to one of them is left as it is.

    Args:
        function: It may hold tensors of any type, as a loss holds the weights of classes.

    Example:
        >>> narrow, wide = torch.eye(2), torch.ones(2, dtype=torch.float64)
        >>> takes_mixed_types(lambda x: narrow @ x)(wide)
        tensor([1., 1.], dtype=torch.float64)
    """

    @wraps(function)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _MixedTypes():
            return function(*args, **kwargs)

    return wrapped


class _MixedTypes(TorchFunctionMode):
    """Converts the arguments of an operation to double precision where one of them has it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_mixed((args, kwargs)) and not _writes(func, kwargs):
            args, kwargs = tree_map_only(Tensor, _to_double, (args, kwargs))
        return func(*args, **kwargs)


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether the result goes into an argument, so that a converted one would be lost."""
    name = func.__name__
    is_operator = name.startswith(("__i", "__set"))  # as += and item assignment
    return "out" in kwargs or is_operator or (name.endswith("_") and not name.endswith("__"))


def _is_mixed(data: Any) -> bool:
    """Whether there is a tensor in double precision, and one in a narrower type."""
    kinds = {x.dtype for x in tensors_in(data) if x.is_floating_point()}
    return torch.float64 in kinds and len(kinds) > 1


def _to_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
