"""Whether a loss pairs the targets with the outputs of other examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Value = Callable[[Any, Any], Tensor]


@torch.no_grad()
def refuse_broadcast(value: Value, outputs: Any, targets: Any) -> bool:
    """Refuse targets that a loss pairs with the outputs of other examples.

    That happens to targets `[m]` of outputs `[m, 1]`, of which the loss is that of all m² pairs,
    and to targets `[m]` of outputs `[m, m]`, whose columns are not the examples. Targets `[m, 1]`
    of outputs `[m, k]` may be meant.

    Args:
        value: `(outputs, targets) -> scalar`, the loss.
        outputs: What the model returned, a pytree.
        targets: What the loss compares with it, a pytree.

    Returns:
        Whether it is certain that the loss does no such thing. Labels that are all alike do not
        show it.

    Raises:
        ValueError: The loss broadcasts the targets.

    Example:
        >>> outputs, targets = torch.zeros(2, 1), torch.zeros(2)
        >>> error = lambda z, y: (z - y).square().mean()
        >>> refuse_broadcast(error, outputs, targets)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: targets: got shape (2,) for outputs of shape (2, 1), which broadcast to ...
    """
    is_certain = True
    for z in tree_leaves(outputs):
        for y in tree_leaves(targets):
            if not isinstance(z, Tensor) or not isinstance(y, Tensor) or not _may_broadcast(z, y):
                continue
            trial = _Trial(value, outputs, targets, z=z, y=y)
            if trial.broadcasts():
                raise ValueError(
                    f"targets: got shape {tuple(y.shape)} for outputs of shape {tuple(z.shape)}, "
                    f"which broadcast to {tuple(trial.shape)}, expected the shape of the outputs; "
                    "reshape one of them"
                )
            is_certain &= y.is_floating_point() or bool((y != y.flatten()[0]).any())
    return is_certain


def _may_broadcast(z: Tensor, y: Tensor) -> bool:
    """Whether the shapes of an output and a target broadcast, and not along the examples."""
    if z.shape == y.shape or min(z.numel(), y.numel()) < 2 or not z.is_floating_point():
        return False
    if z.numel() != y.numel() and (z.dim() == y.dim() or len(z) != len(y)):
        return False
    try:
        torch.broadcast_shapes(z.shape, y.shape)
    except RuntimeError:
        return False
    return True


class _Trial:
    """A loss at outputs of which all are different, and at targets that are paired with them."""

    def __init__(self, value: Value, outputs: Any, targets: Any, *, z: Tensor, y: Tensor) -> None:
        self._value = value
        self._outputs = outputs
        self._targets = targets
        self._z = z
        self._y = y
        self.shape = torch.broadcast_shapes(z.shape, y.shape)

    def broadcasts(self) -> bool:
        """Whether the loss of the trial is that of the broadcast tensors, and not of examples."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                given = self._at()
                expand = self._at(lambda x: x.expand(self.shape), lambda x: x.expand(self.shape))
                if not torch.allclose(given, expand):
                    return False
                if self._z.numel() == self._y.numel():
                    return not torch.allclose(given, self._at(lambda x: x.reshape(self._y.shape)))
                # A loss of examples does not depend on their order.
                return not torch.allclose(given, self._at(_rolled, _rolled))
            except Exception:  # a loss that asks for these shapes
                return False

    def _at(
        self,
        of_output: Callable[[Tensor], Tensor] = lambda x: x,
        of_target: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """The loss where the output and the target are numbers without a pattern, reshaped.

        Of several outputs, it is each of the shape of z. The target is y itself.
        """
        size = self._z.numel()
        line = torch.linspace(0.2, 0.8, size, dtype=self._z.dtype, device=self._z.device)
        y = self._y
        if y.is_floating_point():
            squares = torch.linspace(0.8, 0.2, y.numel(), dtype=y.dtype, device=y.device).square()
            y = squares.view_as(y)

        def output(x: Any) -> Any:
            alike = isinstance(x, Tensor) and x.shape == self._z.shape
            return of_output(line.view_as(self._z)) if alike else x

        outputs = tree_map(output, self._outputs)
        return self._value(
            outputs, tree_map(lambda x: of_target(y) if x is self._y else x, self._targets)
        )


def _rolled(x: Tensor) -> Tensor:
    return x.roll(1, 0)
