"""Outputs whose shape a loss misreads or refuses, recognised by trials at the first batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Value = Callable[[Any, Any], Tensor]


@torch.no_grad()
def refuse_broadcast(value: Value, outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets `[m]` of outputs `[m, 1]`, or the reverse, if the loss pairs each with all.

    Args:
        value: `(outputs, targets) -> scalar`, the loss.
        outputs: What the model returned.
        targets: What the loss compares with it.

    Raises:
        ValueError: The loss is that of all m² pairs, and not that of m.

    Example:
        >>> outputs, targets = torch.zeros(2, 1), torch.zeros(2)
        >>> error = lambda z, y: (z - y).square().mean()
        >>> refuse_broadcast(error, outputs, targets)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: targets: got shape (2,) for outputs of shape (2, 1), which broadcast to ...
    """
    if outputs.shape == targets.shape or outputs.numel() != targets.numel():
        return
    if outputs.numel() < 2 or not (outputs.is_floating_point() and targets.is_floating_point()):
        return
    z = torch.linspace(0.2, 0.8, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
    y = z.flip(0).square().to(targets.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given = value(z.reshape(outputs.shape), y.reshape(targets.shape))
            pairs = torch.broadcast_tensors(z.reshape(outputs.shape), y.reshape(targets.shape))
            is_of_pairs = torch.allclose(given, value(*pairs))
            is_of_examples = torch.allclose(given, value(z, y))
        except (RuntimeError, ValueError, IndexError):  # a loss that asks for these shapes
            return
    if is_of_pairs and not is_of_examples:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)} for outputs of shape "
            f"{tuple(outputs.shape)}, which broadcast to {tuple(pairs[0].shape)}, expected the "
            "shape of the outputs; reshape one of them"
        )


@torch.no_grad()
def has_classes_last(value: Value, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the loss wants the classes on axis 1, and refuses these outputs as they are.

    That is so for the losses of torch, outputs `[m, *positions, classes]` and labels
    `[m, *positions]`.

    Example:
        >>> scores, labels = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
        >>> has_classes_last(torch.nn.functional.cross_entropy, scores, labels)
        True
        >>> has_classes_last(torch.nn.functional.cross_entropy, scores.mT, labels)
        False
    """
    if targets.dim() < 2 or outputs.shape[:-1] != targets.shape or targets.is_floating_point():
        return False
    reference = torch.zeros_like(outputs)
    try:
        value(reference, targets)
    except (RuntimeError, ValueError):
        try:
            value(reference.movedim(-1, 1), targets)
        except (RuntimeError, ValueError):
            return False
        return True
    return False
