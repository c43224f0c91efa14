"""Checks of a batch of tasks against what the loss does with it, before any gradient is taken.

They call the loss on one task. These trials run on the CPU, where an index that is out of range is
an error. On CUDA, it would end the process.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from metaimplicit.learner.episodes import Pair, check_pair, shapes_of
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.targets import (
    Classes,
    find_classes,
    fixed_random_state,
    layout_of_cross_entropy,
    may_hold_classes,
    output_slopes,
)
from metaimplicit.loss_state import LossState
from metaimplicit.task_axis import task_of
from metaimplicit.tensors import tensors_in

# What torch's losses say of targets that broadcast, and why a trial may fail on the CPU alone.
BROADCAST = "that is different to the input size"
CPU_ALONE = ("same device", "not implemented for")
IGNORED_BY_DEFAULT = -100  # by torch's losses


class TargetCheck:
    """Checks the targets of one kind of set, support or query.

    What the loss does with them is found out once for each kind of batch: the types and sizes of
    its tensors, apart from the numbers of tasks and examples. Only the range of class indices is
    checked in every batch.

    Once the loss is another one, or has changed as `LossState` sees it, all is found out anew. What
    is learnt of it may change.

    Args:
        call: The model as it is, `inputs of one task -> outputs`.
        make_loss: Makes the loss of the set as it is, on the CPU.
        read_loss: Returns that loss as it was given. If None, that is what `make_loss` returns.

    Example:
        >>> check = TargetCheck(
        ...     call=lambda inputs: inputs, make_loss=lambda: torch.nn.functional.cross_entropy
        ... )
        >>> check("support", Pair(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [2, 1, 7]])))
        Traceback (most recent call last):
        ...
        ValueError: support labels: got 7, expected class indices from 0 to 3, one for each output \
of the model; convert targets that are not class indices to float
    """

    def __init__(
        self,
        call: Callable[[Any], Tensor],
        make_loss: Callable[[], TaskLoss],
        read_loss: Callable[[], TaskLoss] | None = None,
    ) -> None:
        self._call = call
        self._make_loss = make_loss
        self._read_loss = make_loss if read_loss is None else read_loss
        self._state: LossState | None = None
        self._classes: dict[Any, Classes | None] = {}
        self._ignored: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but what belongs to the loss of the original."""
        return self.__dict__ | {"_state": None}

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
        self._forget_another_loss()
        kind = _kind(pair)
        if kind in self._classes:
            classes = self._classes[kind]
            return classes and self._check_range(name, pair, classes)

        loss = self._make_loss()
        outputs, targets = self._call_task(pair, 0)
        is_known = True
        if _is_of_cpu_alone(_value(loss, outputs, targets)):
            classes = layout_of_cross_entropy(outputs, targets)
        else:
            classes = find_classes(loss, outputs, targets)
            if classes is None and may_hold_classes(outputs, targets):
                classes, is_known = self._ask_tasks(pair, loss)
        checked = classes and self._check_range(name, pair, classes)
        check_loss(name, loss, outputs, targets, has_classes=classes is not None)
        if is_known:
            self._classes[kind] = classes
        return checked

    def _forget_another_loss(self) -> None:
        loss = self._read_loss()
        if self._state is not None and self._state.loss is loss and not self._state.has_changed():
            return
        self._state = LossState(loss, but_trained=True)
        self._classes.clear()
        self._ignored.clear()

    def _ask_tasks(self, pair: Pair, loss: TaskLoss) -> tuple[Classes | None, bool]:
        """Where the loss reads class indices, and whether any task tells.

        A task tells if the loss counts one of its examples: they may all be masked.
        """
        tasks = len(next(iter(tensors_in(pair.inputs))))
        for index in range(tasks):
            outputs, targets = self._call_task(pair, index)
            slopes = output_slopes(loss, outputs, targets)
            if slopes is None or bool(slopes.any()):
                return find_classes(loss, outputs, targets), True
        return None, False

    def _call_task(self, pair: Pair, index: int) -> tuple[Tensor, Any]:
        """The outputs and the targets of one task, on the CPU."""
        task = task_of(pair, index)
        # A model may register hooks on its tensors, which need a graph.
        with fixed_random_state(pair), torch.enable_grad():
            outputs = self._call(task.inputs).detach()
        return _on_cpu(outputs), tree_map(_on_cpu, task.targets)

    def _check_range(self, name: str, pair: Pair, classes: Classes) -> Classes:
        """The classes, of which not all examples count if the loss ignores a label of the batch."""
        labels = classes.labels(pair.targets)
        low, high = (int(bound) for bound in labels.aminmax())
        if low >= 0 and high < classes.size:
            return classes
        outside: list[int] = labels[(labels < 0) | (labels >= classes.size)].unique().tolist()
        refused: dict[int, Exception] = {}
        for label in set(outside) - self._ignored:
            task = int((labels == label).flatten(1).any(1).nonzero()[0])
            value = _value(self._make_loss(), *self._call_task(pair, task))
            # A loss that cannot be tried is taken to be one of torch's.
            is_ignored = label == IGNORED_BY_DEFAULT and _is_of_cpu_alone(value)
            if isinstance(value, Exception) and not is_ignored:
                refused[label] = value
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
    are expanded to one shape, and another once their examples are aligned. A loss that reshapes the
    outputs by itself is no such loss. Targets that differ in size from the outputs are looked at
    where broadcasting would meet their examples with another axis: `[m]` with `[m, m]`.

    Args:
        name: What errors call the set.
        loss: `(outputs, targets) -> scalar`.
        outputs: The outputs of the model for this task, on the CPU.
        targets: Its targets, on the CPU.
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
    shapes = f"got targets of shape {shapes_of(targets)} for outputs of shape {shapes_of(outputs)}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = _value(loss, outputs, targets)
        if isinstance(value, Exception):
            if _is_of_cpu_alone(value):
                return
            raise ValueError(f"{name}: {shapes}, which the loss refuses: {value}") from value
        broadcasts = any(BROADCAST in str(warning.message) for warning in caught)
        for leaf in tree_leaves(targets) if not has_classes else ():
            if not isinstance(leaf, Tensor) or leaf.shape == outputs.shape:
                continue
            is_alone = leaf is targets and leaf.dim() != outputs.dim()
            has_another_size = leaf.numel() != outputs.numel()
            if is_alone and has_another_size and _takes_another_example(loss, outputs, leaf):
                continue
            if leaf.numel() == outputs.numel() > 1 or is_alone:
                broadcasts |= _is_broadcast(
                    loss,
                    outputs,
                    targets,
                    leaf,
                    value=value,
                )
    if broadcasts:
        raise ValueError(
            f"{name}: {shapes}, which broadcast against each other in the loss, expected one "
            "shape; reshape the targets"
        )


def _kind(pair: Pair) -> Any:
    """The types of a batch and the sizes that the number of outputs may depend on.

    Those are all but the number of tasks and, if there is one input, the number of examples, of
    which only 1 is special.
    """
    leaves, structure = tree_flatten(pair)
    most = 2 if isinstance(pair.inputs, Tensor) else sys.maxsize
    kinds: list[Any] = []
    for x in leaves:
        if isinstance(x, Tensor):
            examples = [min(size, most) for size in x.shape[1:2]]
            kinds.append((x.dtype, *examples, *x.shape[2:]))
        else:
            kinds.append(type(x))
    return str(structure), tuple(kinds)  # a structure has no hash in torch 2.6


def _on_cpu(leaf: Any) -> Any:
    """A tensor on the CPU, in a type that the CPU computes with."""
    if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
        return leaf
    if leaf.dtype in (torch.float16, torch.bfloat16):
        leaf = leaf.float()
    return leaf.cpu()


def _is_of_cpu_alone(value: Any) -> bool:
    """Whether a loss failed because its tensors are elsewhere, or the CPU lacks an operation."""
    is_error = isinstance(value, Exception)
    return is_error and any(reason in str(value) for reason in CPU_ALONE)


def _value(loss: TaskLoss, outputs: Tensor, targets: Any) -> Any:
    """The loss, always with the same random numbers, or the error that it raises."""
    with fixed_random_state(outputs), torch.enable_grad():
        try:
            return loss(outputs.detach().requires_grad_(), targets)
        except Exception as error:  # a loss may raise anything
            return error


def _is_broadcast(
    loss: TaskLoss, outputs: Tensor, targets: Any, leaf: Tensor, *, value: Any
) -> bool:
    """Whether the loss broadcasts its outputs and one of its targets against each other."""
    try:
        shape = torch.broadcast_shapes(outputs.shape, leaf.shape)
    except RuntimeError:
        return False
    aligned_outputs, aligned_leaf = _align_examples(outputs, leaf)

    def value_of(z: Tensor, replacement: Tensor) -> Any:
        return _value(loss, z, tree_map(lambda x: replacement if x is leaf else x, targets))

    as_expanded = value_of(outputs.expand(shape), leaf.expand(shape))
    as_aligned = value_of(aligned_outputs, aligned_leaf)
    return _same(value, as_expanded) is True and _same(value, as_aligned) is False


def _takes_another_example(loss: TaskLoss, outputs: Tensor, targets: Tensor) -> bool:
    """Whether the loss accepts one more example. One that broadcasts `[m]` with `[m, m]` does not.

    One that reduces the outputs of an example, such as a mean and a variance, does.
    """
    if outputs.dim() == 0 or targets.dim() == 0:
        return False
    longer = [torch.cat([x, x[-1:]]) for x in (outputs, targets)]
    return not isinstance(_value(loss, *longer), Exception)


def _align_examples(outputs: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many axes, the examples on the first. In one shape if that is possible."""
    if leaf.numel() == outputs.numel():
        return outputs.reshape(leaf.shape), leaf
    dims = max(outputs.dim(), leaf.dim())
    first, second = (
        x.reshape(*x.shape[:1], *[1] * (dims - x.dim()), *x.shape[1:]) for x in (outputs, leaf)
    )
    return first, second


def _same(value: Any, other: Any) -> bool | None:
    """Whether two values of a loss are equal. None if one of them is an error."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return None
    if value.shape != other.shape:
        return None
    return torch.allclose(value, other, rtol=1e-4, equal_nan=True)
