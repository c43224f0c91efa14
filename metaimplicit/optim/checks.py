"""Checks of what a second-order optimiser is given, and of what its closure and loss return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaimplicit import counts
from metaimplicit.functions import check_function


def raise_if(
    condition: Tensor,
    message: str,
    kind: type[Exception] = FloatingPointError,
) -> None:
    """Raise `kind(message)` if any element of a boolean tensor is true.

    Example:
        >>> raise_if(torch.tensor([False]), "the step is not finite")
    """
    if bool(condition.any()):
        raise kind(message)


def check_positive(owner: str, **numbers: float) -> None:
    """Raise ValueError unless every number is finite and > 0.

    Args:
        owner: The class that has the numbers, for the message.
        numbers: The numbers by argument.

    Example:
        >>> check_positive("Newton", lr=1.0)
    """
    for name, value in numbers.items():
        if not _is_finite(value) or value <= 0:
            raise ValueError(f"{owner} {name}: got {value!r}, expected a finite number > 0")


def check_nonnegative(owner: str, **numbers: float) -> None:
    """Raise ValueError unless every number is finite and ≥ 0; the arguments of `check_positive`.

    Example:
        >>> check_nonnegative("Newton", damping=0.0)
    """
    for name, value in numbers.items():
        if not _is_finite(value) or value < 0:
            raise ValueError(f"{owner} {name}: got {value!r}, expected a finite number ≥ 0")


def check_fraction(owner: str, **numbers: float) -> None:
    """Raise ValueError unless 0 ≤ x < 1 for every number x; the arguments of `check_positive`.

    Example:
        >>> check_fraction("KFAC", momentum=0.9)
    """
    for name, value in numbers.items():
        if not 0 <= value < 1:
            raise ValueError(f"{owner} {name}: got {value}, expected a number in [0, 1)")


def check_count(owner: str, unit: str, **numbers: int) -> None:
    """Raise ValueError unless every count is a whole number, at least 1.

    Args:
        owner: The class that has the counts, for the message.
        unit: What is counted, for the message.
        numbers: The counts by argument.

    Example:
        >>> check_count("KFAC", "step", update_every=5)
    """
    for name, value in numbers.items():
        counts.check_count(f"{owner} {name}", value, unit=f" {unit}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_loss(owner: str, loss: Any) -> None:
    """Raise ValueError if `loss` is no function, or is known to return one number per example.

    Example:
        >>> check_loss("GaussNewton", torch.nn.MSELoss())
    """
    check_function(f"{owner} loss", loss, "(outputs, targets) -> scalar")
    if getattr(loss, "reduction", "mean") == "none":
        raise ValueError(
            f"{owner} loss: got reduction='none', expected a scalar; use reduction='mean'"
        )


def check_pair(result: Any, signature: str, *, min_dims: int) -> tuple[Tensor, Any]:
    """The outputs and targets that a closure returned.

    Args:
        result: What the closure returned.
        signature: What the closure should be, for the message.
        min_dims: The least number of axes of the outputs.

    Raises:
        ValueError: It is no pair of a tensor and something, or the tensor has too few axes.

    Example:
        >>> check_pair((torch.zeros(3, 1), None), "closure() -> (outputs, targets)", min_dims=2)[1]
    """
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not is_pair or not isinstance(result[0], Tensor):
        raise ValueError(
            f"closure: returned {_describe(result)}, expected a pair (outputs, targets): "
            f"{signature}"
        )
    outputs, targets = result
    if outputs.dim() < min_dims:
        raise ValueError(
            f"closure: returned outputs of shape {tuple(outputs.shape)}, expected "
            "[examples, …, d]; use unsqueeze(-1)"
        )
    return outputs, targets


def check_scalar(value: Any, source: str) -> Tensor:
    """The value, a tensor without axes.

    Args:
        value: What `source` returned.
        source: `"loss"` or `"closure"`, for the message.

    Raises:
        ValueError: It is no scalar tensor.

    Example:
        >>> check_scalar(torch.tensor(1.0), "loss")
        tensor(1.)
    """
    if not isinstance(value, Tensor) or value.dim() > 0:
        raise ValueError(
            f"{source}: returned {_describe(value)}, expected a scalar tensor, the mean over "
            "examples; reduce it, for example with reduction='mean'"
        )
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return type(value).__name__


def check_finite(owner: str, loss: Tensor, outputs: Tensor | None = None) -> None:
    """Raise FloatingPointError if the loss is not finite, or if an output is NaN or +∞.

    An output of −∞ is allowed, because it is the logit of a class that is left out.

    Example:
        >>> check_finite("Newton", torch.tensor(1.0), torch.tensor([0.0, -torch.inf]))
    """
    bad = ~loss.isfinite()
    if outputs is not None:
        bad = bad | ~(outputs < torch.inf).all()
    message = f"{owner}: the loss or the outputs are not finite; no parameter was changed"
    raise_if(bad, message)


def check_dependence(value: Tensor, params: Mapping[str, Tensor], *, source: str) -> None:
    """Raise ValueError unless `value` depends on the parameters, and through the model alone.

    While a `ReplayedClosure` runs, the model computes with other tensors in the place of its
    parameters. If the graph of `value` still reaches a parameter itself, the closure has read it
    without calling the model, and that part of the gradient would be lost.

    Args:
        value: What `source` returned.
        params: The parameters of the model, by name.
        source: `"loss"` or `"closure"`, for the message.

    Example:
        >>> parameter = torch.zeros(1, requires_grad=True)
        >>> stand_in = torch.zeros(1, requires_grad=True)
        >>> check_dependence(stand_in.sum(), {"weight": parameter}, source="loss")
    """
    if not value.requires_grad:
        raise ValueError(
            f"{source}: its result does not depend on a parameter of the model that requires grad; "
            "call the model with gradients on, and detach nothing"
        )
    gradients = torch.autograd.grad(
        value.sum(),
        list(params.values()),
        retain_graph=True,
        allow_unused=True,
    )
    for name, gradient in zip(params, gradients, strict=True):
        if gradient is not None:
            raise ValueError(
                f"{source}: it reads {name!r} without calling the model, so that its gradient "
                "would be lost; call the model, or take the parameter from it inside the closure"
            )
