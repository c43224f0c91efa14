"""What a loss does with its targets: which integers are classes, and which examples count.

The derivative ∂ℓ/∂z in the outputs of a task says so, for any loss. At outputs that are nearly
equal, the loss pulls one output of every example up most, and this is the output of its class. An
example that the loss ignores has no derivative.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metaimplicit.learner.episodes import Episode
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.task_axis import task_of
from metaimplicit.tensors import tensors_in

Metric = Callable[[Any, Any], Tensor | float]  # (outputs, targets) of one task -> one or m numbers

NEARLY_EQUAL = 0.01  # the largest |z| at which ∂ℓ/∂z is taken: no margin is met, no softmax full
MAX_PROBES = 8  # calls of the loss that look for classes that it ignores


class Classes(NamedTuple):
    """Where a loss reads class indices.

    Attributes:
        leaf: Which of the tensors in the targets holds the indices.
        axis: The axis of the outputs of one task that has one output for each class.
        size: The number of classes.
        all_count: Whether every example counts, whatever its class.
    """

    leaf: int
    axis: int
    size: int
    all_count: bool

    def labels(self, targets: Any) -> Tensor:
        """The class indices in the targets."""
        labels: Tensor = tree_leaves(targets)[self.leaf]
        return labels


class Group(NamedTuple):
    """Tasks of the same shapes.

    Attributes:
        data: The tasks, with the task axis first.
        classes: Where the loss of the query set reads class indices. None if it reads none.
        looped: Whether it is one of several groups, each of which is one task.
    """

    data: Episode
    classes: Classes | None
    looped: bool


def find_classes(loss: TaskLoss, outputs: Tensor, targets: Any) -> Classes | None:
    """Where a loss reads class indices. None if it treats no integers as classes.

    The loss is called with labels that take every class in turn; see `_trial_labels`.

    Args:
        loss: `(outputs, targets) -> scalar`, of one task.
        outputs: Outputs of the model for a task, `[...]`.
        targets: Its targets, a pytree.

    Example:
        >>> scores = torch.zeros(3, 7, 5)  # 5 classes on the last axis
        >>> def loss(outputs, targets):
        ...     return torch.nn.functional.cross_entropy(outputs.movedim(-1, 1), targets)
        >>> find_classes(loss, scores, torch.zeros(3, 7, dtype=torch.int64))
        Classes(leaf=0, axis=2, size=5, all_count=True)
        >>> find_classes(torch.nn.functional.mse_loss, torch.zeros(3), torch.zeros(3)) is None
        True
    """
    leaves, structure = tree_flatten(targets)
    for position, axis in _candidates(outputs, leaves):
        size = outputs.shape[axis]
        # A loss of one class has no slope anywhere. A square has none at its minimum, where outputs
        # of zero may be, so it is asked elsewhere.
        z = outputs if size > 1 else torch.ones_like(outputs)
        counted: list[Tensor | None] = []
        for labels in _trial_labels(leaves[position], size):
            with_labels = [*leaves[:position], labels, *leaves[position + 1 :]]
            slopes = output_slopes(loss, z, tree_unflatten(with_labels, structure))
            counted.append(_pulled_to(labels, slopes, axis))
        known = [c for c in counted if c is not None]
        if len(known) == len(counted) and any(bool(c.any()) for c in known):
            every_class = size <= MAX_PROBES * leaves[position].numel()
            complete = every_class and all(bool(c.all()) for c in known)
            # Further tensors may be masks, which differ from batch to batch.
            return Classes(
                position,
                axis,
                size,
                all_count=complete and len(leaves) == 1,
            )
    return None


def may_hold_classes(outputs: Tensor, targets: Any) -> bool:
    """Whether some targets are integers of a shape that class indices can have.

    Example:
        >>> may_hold_classes(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
        True
    """
    return bool(list(_candidates(outputs, tree_leaves(targets))))


def layout_of_cross_entropy(outputs: Tensor, targets: Any) -> Classes | None:
    """Where torch's losses read class indices, for a loss that cannot be asked on the CPU.

    Example:
        >>> layout_of_cross_entropy(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
        Classes(leaf=0, axis=1, size=5, all_count=False)
    """
    if (0, 1) not in _candidates(outputs, tree_leaves(targets)):
        return None
    return Classes(leaf=0, axis=1, size=outputs.shape[1], all_count=False)


def measure(
    group: Group, outputs: Tensor, *, metric: Metric | None, make_loss: Callable[[], TaskLoss]
) -> Tensor | None:
    """The metric of each task, or its accuracy, `[tasks]`, in float64.

    Args:
        group: The tasks.
        outputs: The outputs for their query sets, `[tasks, ...]`.
        metric: The metric. If None, the accuracy.
        make_loss: Makes the loss of the query set of one task.

    Returns:
        None if there is no metric, and the loss treats no targets as classes.

    Example:
        >>> pair = (torch.zeros(1, 2, 3), torch.tensor([[0, 1]]))
        >>> classes = Classes(leaf=0, axis=1, size=3, all_count=True)
        >>> group = Group(Episode.of(pair, pair), classes, looped=False)
        >>> measure(group, torch.eye(2, 3).unsqueeze(0), metric=None, make_loss=lambda: None)
        tensor([1.], dtype=torch.float64)
    """
    targets = group.data.query.targets
    if metric is not None:
        return mean_metric(metric, outputs, targets)
    if group.classes is None:
        return None
    return accuracy(make_loss, outputs, targets, group.classes)


def accuracy(
    make_loss: Callable[[], TaskLoss], outputs: Tensor, targets: Any, classes: Classes
) -> Tensor:
    """The share of correct predictions among the examples of each task that count.

    Args:
        make_loss: Makes the loss of one task, which is needed if not all examples count.
        outputs: One score for each class on the axis of the classes, `[tasks, ...]`.
        targets: Class indices, or a pytree that holds them, `[tasks, ...]`.
        classes: Where the loss reads them.

    Returns:
        `[tasks]`, in float64. NaN for a task whose examples are all ignored. A score that is NaN is
        no correct prediction.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]])
        >>> labels = torch.tensor([[0, 1, -100]])  # cross-entropy ignores -100
        >>> classes = Classes(leaf=0, axis=1, size=2, all_count=False)
        >>> accuracy(lambda: torch.nn.functional.cross_entropy, scores, labels, classes)
        tensor([0.5000], dtype=torch.float64)
    """
    axis = classes.axis + 1
    correct = (outputs.argmax(axis) == classes.labels(targets)) & ~outputs.isnan().any(axis)
    if classes.all_count:
        return correct.double().flatten(1).mean(1)

    loss = make_loss()
    counted = []
    for task, of_task in enumerate(outputs):
        slopes = output_slopes(loss, of_task, task_of(targets, task))
        if slopes is None:
            slopes = torch.zeros_like(of_task)
        counted.append((slopes != 0).any(classes.axis).flatten())
    weights = torch.stack(counted).double()
    return (correct.flatten(1) * weights).sum(1) / weights.sum(1)


def mean_metric(metric: Metric, outputs: Tensor, targets: Any) -> Tensor:
    """The mean of a metric of each task, `[tasks]`, in float64.

    Args:
        metric: `(outputs, targets) -> numbers`, of one task, as it is called for each of them.
        outputs: `[tasks, ...]`, without a graph.
        targets: A pytree of tensors `[tasks, ...]`.

    Example:
        >>> def within_one(outputs, targets):
        ...     return (outputs - targets).abs() < 1
        >>> mean_metric(within_one, torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
        tensor([0.5000], dtype=torch.float64)
    """
    values = []
    for task, of_task in enumerate(outputs.detach()):
        value = metric(of_task, task_of(targets, task))
        try:
            numbers = torch.as_tensor(value, device=outputs.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"metric: got {type(value).__name__}, expected a number, or one for each example"
            ) from error
        values.append(numbers.double().mean())
    return torch.stack(values)


@contextmanager
def fixed_random_state(tensors: Any) -> Iterator[None]:
    """Put torch's random state back at the end, that of CUDA as well if a tensor is there.

    Example:
        >>> state = torch.get_rng_state()
        >>> with fixed_random_state(torch.zeros(1)):
        ...     _ = torch.rand(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    on_cuda = any(x.is_cuda for x in tensors_in(tensors))
    devices = range(torch.cuda.device_count()) if on_cuda else []
    with torch.random.fork_rng(devices=devices):
        yield


def output_slopes(loss: TaskLoss, outputs: Tensor, targets: Any) -> Tensor | None:
    """∂ℓ/∂z where the outputs z are scaled down until they are nearly equal.

    Returns:
        A tensor like the outputs, zero where the slope is not finite, as in a mean over no examples
        at all. None if the loss refuses the targets, or does not depend on z.

    Example:
        >>> output_slopes(torch.nn.functional.l1_loss, torch.tensor([8.0, -8.0]), torch.zeros(2))
        tensor([ 0.5000, -0.5000])
    """
    z = outputs.detach().nan_to_num(0.0, 0.0, 0.0)
    z = (z * (NEARLY_EQUAL / z.abs().max()).clamp(max=1.0)).requires_grad_()
    with fixed_random_state(outputs), torch.enable_grad():
        try:
            value = loss(z, targets)
            return torch.autograd.grad(value.sum(), z)[0].nan_to_num(0.0, 0.0, 0.0)
        except Exception:  # whatever a loss says of labels that are not meant as classes
            return None


def _candidates(outputs: Tensor, leaves: list[Any]) -> Iterator[tuple[int, int]]:
    """Pairs (position, axis): which of the targets may be class indices, and the classes' axis.

    That is each int64 tensor among the leaves whose shape is that of the outputs without the axis.
    """
    if outputs.is_complex():  # complex numbers have no largest one, so they are no scores
        return
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.dtype != torch.int64 or not leaf.numel():
            continue
        shape = tuple(outputs.shape)
        for axis in range(outputs.dim()):
            if shape[:axis] + shape[axis + 1 :] == leaf.shape:
                yield position, axis


def _trial_labels(like: Tensor, size: int) -> Iterator[Tensor]:
    """Labels to call the loss with: the last class for all, and then every class in turn.

    With one class for all, the loss pulls up one output of every example along the right axis, and
    all or none along another one.
    """
    yield torch.full_like(like, size - 1)
    probes = min(-(-size // like.numel()), MAX_PROBES)
    for first in range(0, probes * like.numel(), like.numel()):
        flat = torch.arange(first, first + like.numel(), device=like.device)
        yield (flat % size).reshape(like.shape)


def _pulled_to(labels: Tensor, slopes: Tensor | None, axis: int) -> Tensor | None:
    """The examples that count. None if the loss pulls one of them to another output."""
    if slopes is None:
        return None
    if slopes.shape[axis] == 1:  # with one class, the loss is constant
        return None if bool(slopes.any()) else torch.ones_like(labels, dtype=torch.bool)
    counted = (slopes != 0).any(axis)
    pull, output = slopes.min(axis)
    pulled = (output == labels) & (pull < 0)
    return counted if bool((pulled | ~counted).all()) else None
