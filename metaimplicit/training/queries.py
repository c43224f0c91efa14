"""How a learner's loss reads the query sets of its tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaimplicit.learner import MetaLearner
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.targets import Classes, find_classes
from metaimplicit.task_axis import task_of


def query_loss(learner: MetaLearner) -> TaskLoss:
    """The loss of the query sets, which is that of the support sets unless it is given.

    Example:
        >>> from torch import nn
        >>> learner = MetaLearner(nn.Linear(2, 1), nn.functional.l1_loss)
        >>> query_loss(learner).__name__
        'l1_loss'
    """
    loss: TaskLoss = learner.loss if learner.query_loss is None else learner.query_loss
    return loss


def query_classes(learner: MetaLearner, outputs: Tensor, targets: Any) -> Classes | None:
    """Where the loss reads class indices. None if it treats no integers as classes.

    Not all examples count if a label is no class, such as -100, which cross-entropy ignores.

    Args:
        learner: The learner.
        outputs: The outputs for some query sets, `[tasks, ...]`.
        targets: Their targets, a pytree of tensors `[tasks, ...]`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> query_classes(learner, torch.zeros(1, 2, 3), torch.tensor([[0, -100]]))
        Classes(leaf=0, axis=1, size=3, all_count=False)
    """
    classes = find_classes(query_loss(learner), outputs[0], task_of(targets, 0))
    if classes is None:
        return None
    labels = classes.labels(targets)
    is_class = (labels >= 0) & (labels < classes.size)
    return classes if bool(is_class.all()) else classes._replace(all_count=False)
