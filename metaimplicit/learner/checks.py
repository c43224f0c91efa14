"""Checks of a batch of tasks against what the loss does with it, before any gradient is taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from metaimplicit.learner.episodes import Pair, check_pair, shapes_of
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.targets import Classes, find_classes, fixed_random_state, task_of

# What torch's losses say of targets that broadcast.
BROADCAST = "that is different to the input size"


class TargetCheck:
    """Checks the targets of one kind of set, support or query.

    What the loss does with them is found out once for each kind of batch: the types and numbers of
    axes of its tensors. Only the range of class indices is checked in every batch.

    Args:
        call: The model as it is, `inputs of one task -> outputs`.
        loss: Makes the loss of the set as it is, or with `on_cpu=True` a copy on the CPU.

    Example:
        >>> def make_loss(on_cpu=False):
        ...     return torch.nn.functional.cross_entropy
        >>> check = TargetCheck(call=lambda inputs: inputs, loss=make_loss)
        >>> check("support", Pair(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [2, 1, 7]])))
        Traceback (most recent call last):
        ...
        ValueError: support labels: got 7, expected class indices from 0 to 3, one for each output \
of the model; convert targets that are not class indices to float
    """

    def __init__(self, call: Callable[[Any], Tensor], loss: Callable[..., TaskLoss]) -> None:
        self._call = call
        self._loss = loss
        self._classes: dict[Any, Classes | None] = {}
        self._ignored: set[int] = set()

    def __call__(self, name: str, pair: Pair) -> Classes | None:
        """Check a batch.

        Args:
            name: What errors call the set.
            pair: Inputs and targets, with the task axis first.

        Returns:
            Where the loss reads class indices. None if it treats no integers as classes.

        Raises:
            ValueError: The set is empty, the loss refuses the targets, they would broadcast against
                the outputs, or a class index is out of range and the loss does not ignore it.
        """
        check_pair(name, pair)
        kind = _kind(pair)
        if kind in self._classes:
            classes = self._classes[kind]
            return classes and self._check_range(name, pair, classes)

        loss = self._loss()
        first = task_of(pair, 0)
        with fixed_random_state(pair), torch.no_grad():
            outputs = self._call(first.inputs)
        classes = find_classes(loss, outputs, first.targets)
        checked = classes and self._check_range(name, pair, classes)
        check_loss(name, loss, outputs, first.targets, has_classes=classes is not None)
        self._classes[kind] = classes
        return checked

    def _check_range(self, name: str, pair: Pair, classes: Classes) -> Classes:
        """The classes, of which not all examples count if the loss ignores a label of the batch."""
        labels = classes.labels(pair.targets)
        low, high = (int(bound) for bound in labels.aminmax())
        if low >= 0 and high < classes.size:
            return classes
        outside: list[int] = labels[(labels < 0) | (labels >= classes.size)].unique().tolist()
        refused: dict[int, Exception] = {}
        for label in set(outside) - self._ignored:
            task = task_of(pair, int((labels == label).flatten(1).any(1).nonzero()[0]))
            with fixed_random_state(pair), torch.no_grad():
                outputs = self._call(task.inputs).cpu()
            # On CUDA, an index out of range would end the process.
            targets = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, task.targets)
            error = _error_of(self._loss(on_cpu=True), outputs, targets)
            if error is not None:
                refused[label] = error
        if refused:
            worst = min(refused) if min(refused) < 0 else max(refused)
            raise ValueError(
                f"{name} labels: got {worst}, expected class indices from 0 to "
                f"{classes.size - 1}, one for each output of the model; convert targets that "
                "are not class indices to float"
            ) from refused[worst]
        self._ignored.update(outside)
        return classes._replace(all_count=False)


def check_loss(
    name: str, loss: TaskLoss, outputs: Tensor, targets: Any, *, has_classes: bool
) -> None:
    """Check that the loss takes the targets of a task, and does not broadcast them.

    Targets of another shape than the outputs broadcast if the loss has the same value once both
    are expanded to one shape, and another once the outputs are reshaped to that of the targets. A
    loss that reshapes the outputs by itself is no such loss.

    Args:
        name: What errors call the set.
        loss: `(outputs, targets) -> scalar`.
        outputs: The outputs of the model for this task.
        targets: Its targets.
        has_classes: Whether the targets hold class indices, which have another shape by design.

    Raises:
        ValueError: The loss raises an error, or broadcasts.

    Example:
        >>> mse = torch.nn.functional.mse_loss
        >>> check_loss("support", mse, torch.zeros(3, 1), torch.zeros(3), has_classes=False)
        Traceback (most recent call last):
        ...
        ValueError: support: got targets of shape (3,) for outputs of shape (3, 1), which \
broadcast against each other in the loss, expected one shape; reshape the targets
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = _value(loss, outputs, targets)
        if isinstance(value, Exception):
            raise ValueError(
                f"{name}: got targets of shape {shapes_of(targets)} for outputs of shape "
                f"{tuple(outputs.shape)}, which the loss refuses: {value}"
            ) from value
        broadcasts = any(BROADCAST in str(warning.message) for warning in caught)
        for leaf in tree_leaves(targets) if not has_classes else ():
            if not isinstance(leaf, Tensor) or leaf.shape == outputs.shape:
                continue
            if leaf.numel() == outputs.numel() > 1:
                broadcasts |= _is_broadcast(loss, outputs, targets, leaf, value=value)
    if broadcasts:
        raise ValueError(
            f"{name}: got targets of shape {shapes_of(targets)} for outputs of shape "
            f"{tuple(outputs.shape)}, which broadcast against each other in the loss, expected one "
            "shape; reshape the targets"
        )


def _kind(pair: Pair) -> Any:
    """The types of a batch and the axes of its tensors, of which only the size 1 is special."""
    leaves, structure = tree_flatten(pair)
    kinds = []
    for x in leaves:
        is_tensor = isinstance(x, Tensor)
        kinds.append((x.dtype, *(min(size, 2) for size in x.shape[1:])) if is_tensor else type(x))
    return str(structure), tuple(kinds)


def _value(loss: TaskLoss, outputs: Tensor, targets: Any) -> Any:
    """The loss, always with the same random numbers, or the error that it raises."""
    with fixed_random_state(outputs), torch.enable_grad():
        try:
            return loss(outputs.detach().requires_grad_(), targets)
        except Exception as error:  # a loss may raise anything
            return error


def _error_of(loss: TaskLoss, outputs: Tensor, targets: Any) -> Exception | None:
    value = _value(loss, outputs, targets)
    if not isinstance(value, Exception) or "same device" in str(value):
        return None  # a loss that holds tensors of another device cannot be asked on the CPU
    return value


def _is_broadcast(
    loss: TaskLoss, outputs: Tensor, targets: Any, leaf: Tensor, *, value: Any
) -> bool:
    """Whether the loss broadcasts its outputs and one of its targets, of as many numbers."""
    try:
        shape = torch.broadcast_shapes(outputs.shape, leaf.shape)
    except RuntimeError:
        return False
    expanded = tree_map(lambda x: x.expand(shape) if x is leaf else x, targets)
    as_expanded = _value(loss, outputs.expand(shape), expanded)
    as_reshaped = _value(loss, outputs.reshape(leaf.shape), targets)
    return _same(value, as_expanded) is True and _same(value, as_reshaped) is False


def _same(value: Any, other: Any) -> bool | None:
    """Whether two values of a loss are equal. None if one of them is an error."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return None
    if value.shape != other.shape:
        return None
    return torch.allclose(value, other, rtol=1e-4, equal_nan=True)
