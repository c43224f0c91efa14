"""The loss of few-shot learning as a function of φ, which may hold its parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from metaimplicit.functional import functional_call
from metaimplicit.params import Params

TaskLoss = Callable[[Any, Any], Tensor]  # (outputs, targets) of one task -> scalar


class MetaLoss:
    """A loss whose parameters, if it is a module that has some, are entries of φ.

    Args:
        loss: `(outputs, targets) -> scalar`, of one task.
        prefix: What the names of its parameters begin with in φ.

    Attributes:
        parameters: Those that require grad, by their names in φ.

    Example:
        >>> import torch
        >>> class Scaled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.tensor(1.0))
        ...     def forward(self, outputs, targets):
        ...         return self.scale * (outputs - targets).square().mean()
        >>> loss = MetaLoss(Scaled(), "loss")
        >>> loss({"loss.scale": torch.tensor(3.0)}, torch.ones(2), torch.zeros(2))
        tensor(3.)
    """

    def __init__(self, loss: TaskLoss, prefix: str) -> None:
        named = dict(loss.named_parameters()) if isinstance(loss, nn.Module) else {}
        learnt = {name: p for name, p in named.items() if p.requires_grad}
        self.parameters: Params = {f"{prefix}.{name}": p for name, p in learnt.items()}
        self._names = {name: f"{prefix}.{name}" for name in learnt}
        self._loss = loss

    def __call__(self, meta: Params, outputs: Any, targets: Any) -> Tensor:
        """The loss of one task, with its parameters from φ."""
        params = {name: meta[key] for name, key in self._names.items()}
        return _call(self._loss, params, outputs, targets)

    def at(self, meta: Params) -> TaskLoss:
        """The loss at φ."""
        return partial(self, meta)

    def on_cpu(self, meta: Params) -> TaskLoss:
        """The loss at φ, with its parameters and buffers on the CPU."""
        tensors: Params = {}
        if isinstance(self._loss, nn.Module):
            tensors |= dict(self._loss.named_parameters()) | dict(self._loss.named_buffers())
        tensors |= {name: meta[key] for name, key in self._names.items()}
        return partial(_call, self._loss, {name: t.cpu() for name, t in tensors.items()})


def _call(loss: TaskLoss, params: Params, outputs: Any, targets: Any) -> Tensor:
    if isinstance(loss, nn.Module) and params:
        value: Tensor = functional_call(loss, params, (outputs, targets))
        return value
    return loss(outputs, targets)
