"""Outputs and targets as a loss takes them, found out by trials at the first batch of a shape."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metaimplicit.task_axis import map_tensors
from metaimplicit.tuning.batch_shapes import signature
from metaimplicit.tuning.trial_outputs import TrialOutputs, is_transformed, of_one_task

Value = Callable[[Any, Any], Tensor]

# What torch says of a label that is no class.
NO_CLASS = r"out of bounds|out of range|Class values must"


class Layout(NamedTuple):
    """How outputs and targets are handed to a loss.

    Attributes:
        moves_classes: Whether the last axis of the outputs becomes axis 1.
        dtype: Of the targets.
    """

    moves_classes: bool
    dtype: torch.dtype


@torch.no_grad()
def find_layout(value: Value, outputs: Tensor, targets: Tensor) -> Layout:
    """The layout in which a loss takes outputs and targets, neither of which a transform wraps.

    The losses of torch want classes on axis 1, labels as int64, and scores of classes (one-hot
    labels, several answers) as real numbers. Targets become such numbers only if all are 0 or 1.

    Args:
        value: `(outputs, targets) -> scalar`, the loss.
        outputs: What the model returned.
        targets: What the loss compares with it.

    Raises:
        ValueError: The loss refuses the targets in every layout.

    Example:
        >>> scores, labels = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
        >>> find_layout(torch.nn.functional.cross_entropy, scores, labels)
        Layout(moves_classes=True, dtype=torch.int64)
        >>> find_layout(torch.nn.functional.cross_entropy, scores.mT, labels)
        Layout(moves_classes=False, dtype=torch.int64)
    """
    as_given = Layout(False, targets.dtype)
    if targets.is_floating_point() or targets.is_complex():
        return as_given
    dtypes = [targets.dtype]
    if targets.dtype == torch.bool:
        dtypes.append(torch.int64)
    if bool(((targets == 0) | (targets == 1)).all()) and outputs.is_floating_point():
        dtypes.append(outputs.dtype)
    has_last = targets.dim() > 1 and outputs.shape[:-1] == targets.shape
    trial = TrialOutputs()(outputs, order=1, widen=False)
    refusal: Exception | None = None
    for dtype in dtypes:
        for moves in (False, True) if has_last else (False,):
            try:
                value(trial.movedim(-1, 1) if moves else trial, targets.to(dtype))
            except Exception as error:  # a loss may raise anything
                refusal = refusal or error
            else:
                return Layout(moves, dtype)
    with explained_refusal(outputs, targets, refusal):
        value(outputs, targets)  # It may take these outputs alone.
    return as_given


@contextmanager
def explained_refusal(
    outputs: Any, targets: Any, refusal: Exception | None = None
) -> Iterator[None]:
    """Name the targets in an error that a loss raises about them.

    Args:
        outputs: What the loss is called with.
        targets: Likewise.
        refusal: An error that the loss has raised about these targets. If None, only an error about
            a label that is no class is known to be about targets.

    Raises:
        ValueError: In the place of such an error.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if refusal is None and not re.search(NO_CLASS, str(error)):
            raise
        raise ValueError(
            f"targets: got {_describe(targets)} for outputs of {_describe(outputs)}, which the "
            f"loss refuses: {refusal or error}"
        ) from error


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


class Layouts:
    """The layout in which a loss takes outputs and targets, for each of their shapes.

    Args:
        value: `(outputs, targets) -> scalar`, the loss.

    Example:
        >>> layouts = Layouts(torch.nn.functional.cross_entropy)
        >>> outputs, targets = layouts.arrange(torch.zeros(2, 3), torch.tensor([True, False]))
        >>> targets
        tensor([1, 0])
    """

    def __init__(self, value: Value) -> None:
        self._value = value
        self._known: dict[Any, Layout | None] = {}
        self._dtypes: dict[Any, torch.dtype] = {}

    def arrange(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """The outputs and targets as the loss takes them.

        Raises:
            ValueError: The loss refuses the targets, or they broadcast against the outputs.
        """
        key = (signature(outputs), signature(targets))
        layout = self._known.get(key)
        if key not in self._known:
            plain = (map_tensors(torch.detach, of_one_task(x)) for x in (outputs, targets))
            layout, is_certain = self._find(*plain)
            if is_certain:
                self._known[key] = layout
        if layout is None:
            return outputs, targets
        self._dtypes[signature(targets)] = layout.dtype
        moved = outputs.movedim(-1, 1) if layout.moves_classes else outputs
        return moved, self.read_targets(targets)

    def read_targets(self, targets: Any) -> Any:
        """The targets in the type in which the loss took those of the same shape last."""
        dtype = self._dtypes.get(signature(targets))
        return targets if dtype is None else targets.to(dtype)

    def _find(self, outputs: Any, targets: Any) -> tuple[Layout | None, bool]:
        layout = None
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
            layout = find_layout(self._value, outputs, targets)
        return layout, refuse_broadcast(self._value, outputs, targets)


def _describe(tree: Any) -> str:
    """The types and shapes of tensors, with the range of integers."""
    parts = []
    for x in tree_leaves(tree):
        if not isinstance(x, Tensor):
            continue
        part = f"{x.dtype} {tuple(x.shape)}"
        if not x.is_floating_point() and x.numel() and not is_transformed(x):
            low, high = (int(bound) for bound in x.aminmax())
            part += f" from {low} to {high}"
        parts.append(part)
    return ", ".join(parts)
