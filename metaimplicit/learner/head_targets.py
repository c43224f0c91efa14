"""The targets of support sets as numbers, which a head is fitted to."""

# This module does not import `annotations` from `__future__`; see `episodes`.

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaimplicit.inner.linear_head import as_numbers
from metaimplicit.learner.episodes import Episode, Pair, shapes_of
from metaimplicit.task_axis import map_tensors


class HeadTargets(NamedTuple):
    """The targets of a support set.

    Attributes:
        given: As they came.
        numbers: One number for each output, `[tasks, m, outputs]`: one-hot for classes.
    """

    given: Any
    numbers: Tensor


def with_numbers(data: Episode) -> Episode:
    """The episodes with `HeadTargets` in their support sets.

    The classes of a task are 0, 1, … up to the largest label of its support set. All tasks have as
    many; see `split_by_classes`.

    Args:
        data: A batch of tasks.

    Raises:
        ValueError: The targets of the support are neither class indices nor numbers.

    Example:
        >>> support = Pair(torch.zeros(1, 2, 3), torch.tensor([[0, 1]]))
        >>> with_numbers(Episode(support, support)).support.targets.numbers
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    inputs, targets = data.support
    outputs = count_outputs(targets)
    dtype = torch.get_default_dtype() if not targets.is_floating_point() else targets.dtype
    like = torch.empty(
        *targets.shape[:2],
        outputs,
        dtype=dtype,
        device=targets.device,
    )
    numbers = as_numbers(targets, like)
    return Episode(Pair(inputs, HeadTargets(targets, numbers)), data.query)


def split_by_classes(batches: list[Episode]) -> list[Episode]:
    """Split each batch whose tasks have different numbers of classes into its tasks.

    A head for the largest number would give the other tasks classes without examples.

    Example:
        >>> support = Pair(torch.zeros(2, 3, 1), torch.tensor([[0, 1, 1], [0, 1, 2]]))
        >>> [len(part.query.inputs) for part in split_by_classes([Episode(support, support)])]
        [1, 1]
    """
    parts = []
    for data in batches:
        targets = data.support.targets
        alike = not _are_labels(targets) or len(targets.amax(1).unique()) == 1
        parts += [data] if alike else [_only(data, task) for task in range(len(targets))]
    return parts


def check_every_class(name: str, targets: Any) -> None:
    """Raise ValueError if a class of a task has no support example.

    Example:
        >>> check_every_class("support", torch.tensor([[0, 2]]))
        Traceback (most recent call last):
        ...
        ValueError: support labels: got 2 but no 1 in a task, expected class indices from 0 with \
an example of each class for a head that is fitted to them; number the classes of each task from 0
    """
    if not _are_labels(targets):
        return
    labels = targets.long().cpu()
    has_class = labels.new_zeros(len(labels), int(labels.max()) + 1, dtype=torch.bool)
    has_class.scatter_(1, labels, True)
    # A class is missing if it has no example, but a larger one has.
    classes = torch.arange(has_class.shape[1], device=labels.device)
    misses = ~has_class & (classes < labels.amax(1, keepdim=True))
    if misses.any():
        task, missing = misses.nonzero()[0].tolist()
        raise ValueError(
            f"{name} labels: got {int(labels[task].max())} but no {missing} in a task, expected "
            "class indices from 0 with an example of each class for a head that is fitted to "
            "them; number the classes of each task from 0"
        )


def count_outputs(targets: Any) -> int:
    """The number of outputs that a head for these support targets has.

    Raises:
        ValueError: They are neither class indices `[tasks, m]` nor numbers `[tasks, m, outputs]`.

    Example:
        >>> count_outputs(torch.tensor([[0, 1, 2], [2, 1, 0]]))
        3
    """
    is_tensor = isinstance(targets, Tensor)
    if is_tensor and targets.is_floating_point() and targets.dim() == 3:
        return int(targets.shape[-1])
    if not is_tensor or targets.is_floating_point() or targets.dim() != 2:
        raise ValueError(
            f"support targets: got {shapes_of(targets)}, expected class indices [tasks, m], or "
            "floating-point numbers [tasks, m, outputs], which a head can be fitted to"
        )
    if int(targets.min()) < 0:
        raise ValueError(
            f"support labels: got {int(targets.min())}, expected class indices from 0 for a head "
            "that is fitted to them"
        )
    return int(targets.max()) + 1


def _are_labels(targets: Any) -> bool:
    is_tensor = isinstance(targets, Tensor) and not targets.is_floating_point()
    return is_tensor and targets.dim() == 2 and targets.numel() > 0


def _only(data: Episode, task: int) -> Episode:
    """A batch of one of the tasks."""
    part: Episode = map_tensors(lambda x: x[task : task + 1], data)
    return part
