"""Outputs and targets as a loss takes them, found out by trials at the first batch of a shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.task_axis import map_tensors
from metaimplicit.tensors import is_transformed
from metaimplicit.tuning.batch_shapes import signature
from metaimplicit.tuning.broadcasting import Value, refuse_broadcast
from metaimplicit.tuning.trial_outputs import TrialOutputs, of_one_task

Result = TypeVar("Result")


class Layout(NamedTuple):
    """How outputs and targets are handed to a loss.

    Attributes:
        moves_classes: Whether the last axis of the outputs becomes axis 1.
        dtype: The type of the targets.
    """

    moves_classes: bool
    dtype: torch.dtype


@torch.no_grad()
def find_layout(
    value: Value, outputs: Tensor, targets: Tensor, error: Exception | None = None
) -> Layout | None:
    """The layout in which a loss takes outputs and targets, neither of which a transform wraps.

    The losses of torch want classes on axis 1, labels as int64, and scores of classes (one-hot
    labels, several answers) as real numbers. Targets become such numbers only if all are 0 or 1.

    Args:
        value: `(outputs, targets) -> scalar`, the loss.
        outputs: What the model returned.
        targets: What the loss compares with it.
        error: What the loss has said of them as they are. If None, it is called with them.

    Returns:
        None if the loss takes them as they are, or in no layout.

    Example:
        >>> scores, labels = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
        >>> find_layout(torch.nn.functional.cross_entropy, scores, labels)
        Layout(moves_classes=True, dtype=torch.int64)
        >>> find_layout(torch.nn.functional.cross_entropy, scores.mT, labels)
        Layout(moves_classes=False, dtype=torch.int64)
    """
    dtypes = [targets.dtype]
    is_exact = not targets.is_floating_point() and not targets.is_complex()
    if targets.dtype == torch.bool:
        dtypes.append(torch.int64)
    if is_exact and bool(((targets == 0) | (targets == 1)).all()):
        dtypes.append(outputs.dtype)
    trial = TrialOutputs()(outputs, order=1, widen=False)
    for dtype in dtypes:
        for moves in (False, True) if _may_have_classes_last(outputs, targets) else (False,):
            layout = Layout(moves, dtype)
            is_as_given = layout == Layout(False, targets.dtype)
            if is_as_given and error is not None:
                continue
            try:
                value(trial.movedim(-1, 1) if moves else trial, targets.to(dtype))
            except Exception:  # a loss may raise anything
                continue
            return None if is_as_given else layout
    return None


class Layouts:
    """The layout in which a loss takes outputs and targets, for each of their shapes.

    Args:
        value: `(outputs, targets) -> scalar`, the loss.

    Example:
        >>> layouts = Layouts(torch.nn.functional.cross_entropy)
        >>> targets = torch.tensor([True, False])
        >>> layouts.call(lambda outputs, targets: targets / 2 + 1, torch.zeros(2, 3), targets)
        tensor([1.5000, 1.0000])
    """

    def __init__(self, value: Value) -> None:
        self._value = value
        self._known: dict[Any, Layout | None] = {}
        self._of_axes: dict[Any, Layout | None] = {}  # by what batches of other lengths share
        self._dtypes: dict[Any, torch.dtype] = {}

    def call(self, function: Callable[[Any, Any], Result], outputs: Any, targets: Any) -> Result:
        """A function of outputs and targets as the loss takes them.

        Raises:
            ValueError: The loss refuses the targets, or they broadcast against the outputs.
        """
        key = (signature(outputs), signature(targets))
        if key not in self._known:
            plain_outputs, plain_targets = _plain(outputs), _plain(targets)
            is_certain = refuse_broadcast(self._value, plain_outputs, plain_targets)
            layout = None
            if _may_have_classes_last(outputs, targets):
                layout, is_found = self._find(plain_outputs, plain_targets)
                is_certain &= is_found
            elif _have_classes_first(outputs, targets):
                self._of_axes[_axes_of(outputs, targets)] = None
            if is_certain:
                self._known[key] = layout
        else:
            layout = self._known[key]
        try:
            return function(*self._arrange(outputs, targets, layout))
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            other = self._find_other(outputs, targets, layout, error)
            if other is None:
                raise
        self._known[key] = other
        return function(*self._arrange(outputs, targets, other))

    def _find(self, outputs: Tensor, targets: Tensor) -> tuple[Layout | None, bool]:
        """The layout of labels of positions, and whether it is certain.

        Where there are as many positions as classes, a batch of another length tells.

        Warns:
            RuntimeWarning: There was no such batch.
        """
        axes = _axes_of(outputs, targets)
        if outputs.shape[1] != outputs.shape[-1]:
            self._of_axes[axes] = find_layout(self._value, outputs, targets)
            return self._of_axes[axes], True
        if axes in self._of_axes:
            return self._of_axes[axes], True
        layout = find_layout(self._value, outputs, targets)
        if layout is None:
            warnings.warn(
                f"outputs: got shape {tuple(outputs.shape)}, of which axis 1 and the last one may "
                "be the classes, and axis 1 is taken; if that is wrong, move the classes there, "
                "or begin with a batch of another length",
                RuntimeWarning,
                stacklevel=2,
            )
        return layout, False

    def read_targets(self, targets: Any) -> Any:
        """The targets in the type in which the loss took those of the same shape last.

        Integers 0 and 1 in the shape of the outputs are read as real numbers, although the loss
        converts them itself.
        """
        dtype = self._dtypes.get(signature(targets))
        return targets if dtype is None else targets.to(dtype)

    def _arrange(self, outputs: Any, targets: Any, layout: Layout | None) -> tuple[Any, Any]:
        if layout is None:
            self._dtypes.pop(signature(targets), None)
            if _are_scores(targets, outputs):
                self._dtypes[signature(targets)] = outputs.dtype
            return outputs, targets
        self._dtypes[signature(targets)] = layout.dtype
        moved = outputs.movedim(-1, 1) if layout.moves_classes else outputs
        return moved, targets.to(layout.dtype)

    def _find_other(
        self, outputs: Any, targets: Any, layout: Layout | None, error: Exception
    ) -> Layout | None:
        """Another layout, after an error. None if the error is not about the targets."""
        plain = (_plain(outputs), _plain(targets))
        try:
            self._value(*self._arrange(*plain, layout))
        except Exception:  # The loss refuses this task also by itself.
            other = None
            if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and layout is None:
                other = find_layout(self._value, *plain, error=error)
            if other is not None:
                return other
            raise ValueError(
                f"targets: got {_describe(targets)} for outputs of {_describe(outputs)}, which the "
                f"loss refuses: {error}"
            ) from error
        return None


def _plain(tree: Any) -> Any:
    """Tensors without a graph and without transforms."""
    return map_tensors(torch.detach, of_one_task(tree))


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


def _are_scores(targets: Any, outputs: Any) -> bool:
    """Whether the targets are integers 0 or 1, one for each output, such as several answers."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    if targets.dim() < 2 or targets.shape != outputs.shape or targets.is_floating_point():
        return False
    plain = of_one_task(targets)
    return outputs.is_floating_point() and bool(((plain == 0) | (plain == 1)).all())


def _may_have_classes_last(outputs: Any, targets: Any) -> bool:
    """Whether the outputs are `[m, *positions, classes]`, and the targets labels of positions."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    is_label = not targets.is_floating_point() and targets.dim() > 1
    return is_label and outputs.shape[:-1] == targets.shape


def _have_classes_first(outputs: Any, targets: Any) -> bool:
    """Whether the outputs are `[m, classes, *positions]`, and the targets labels of positions."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    if outputs.dim() < 2 or targets.dim() < 2:
        return False
    return (len(outputs), *outputs.shape[2:]) == targets.shape


def _axes_of(outputs: Tensor, targets: Tensor) -> Any:
    """What batches of other lengths have in common."""
    return outputs.dim(), outputs.dtype, targets.dtype
