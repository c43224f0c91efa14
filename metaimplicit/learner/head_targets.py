"""The targets of support sets as numbers, which a head is fitted to."""

# This module does not import `annotations` from `__future__`; see `episodes`.

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaimplicit.inner.linear_head import as_numbers
from metaimplicit.learner.episodes import Episode, Pair, shapes_of


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

    The classes of a batch are 0, 1, … up to the largest label of its support sets.

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
