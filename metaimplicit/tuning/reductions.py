"""The two ways in which a loss is called: with its own reduction, and with none."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Loss = Callable[..., Any]


def split_reductions(loss: Loss) -> tuple[Loss, Loss | None]:
    """The loss with its own reduction, and with none, or None if it has no such argument.

    Neither keeps a copy of the loss, which may change between calls.

    Example:
        >>> import torch
        >>> whole, unreduced = split_reductions(nn.MSELoss(reduction="sum"))
        >>> whole(torch.ones(2), torch.zeros(2)), unreduced(torch.ones(2), torch.zeros(2))
        (tensor(2.), tensor([1., 1.]))
        >>> split_reductions(lambda outputs, targets: outputs.mean())[1] is None
        True
    """
    own = getattr(loss, "reduction", None)
    if isinstance(own, str):
        # A module that torch.compile wraps receives the attributes that are set on the wrapper.
        plain = getattr(loss, "_orig_mod", loss)
        if _shares_attribute(plain):
            return loss, None
        unreduced = partial(_call_with_attribute, plain, "none")
        if own == "none":
            loss = partial(_call_with_attribute, plain, "mean")
        return loss, unreduced
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a function without a signature, as compiled ones are
        return partial(loss, reduction="mean"), partial(loss, reduction="none")
    parameter = parameters.get("reduction")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if parameter is None and (isinstance(loss, nn.Module) or not takes_any):
        return loss, None
    default = None if parameter is None else parameter.default
    has_own = isinstance(default, str) and default != "none"
    whole = loss if has_own else partial(loss, reduction="mean")
    return whole, partial(loss, reduction="none")


def _shares_attribute(loss: Any) -> bool:
    """Whether to set the reduction of a copy sets that of the loss. It is left as it was."""
    own = loss.reduction
    changed = copy.copy(loss)
    changed.reduction = "mean" if own == "none" else "none"
    is_shared: bool = loss.reduction != own
    if is_shared:
        loss.reduction = own
    return is_shared


def _call_with_attribute(loss: Loss, reduction: str, *arguments: Any) -> Any:
    # A shallow copy shares parameters and buffers.
    changed: Any = copy.copy(loss)
    changed.reduction = reduction
    return changed(*arguments)
