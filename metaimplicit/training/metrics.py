"""What a run is measured by, with its uncertainty."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metaimplicit.counts import check_count
from metaimplicit.learner import Episode, EpisodeBatch, MetaLearner, name_parts, read_episodes
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.problem import step_counts
from metaimplicit.training.queries import query_loss

Measure = Literal["accuracy", "metric", "mse", "loss"]


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its 95 % interval, mean ± interval.

    Attributes:
        mean: The sample mean.
        interval: 1.96 s/√n, half of the interval's width by the normal approximation. s is the
            sample deviation, with n − 1 in its denominator.
        tasks: n, the number of tasks.

    Example:
        >>> accuracies = torch.tensor([0.25, 0.5, 0.75])  # one for each task
        >>> estimate = Estimate.of(accuracies)
        >>> estimate.mean, estimate.tasks
        (0.5, 3)
    """

    mean: float
    interval: float
    tasks: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The estimate from one number for each task, `[n]`.

        Raises:
            ValueError: There are fewer than two numbers, or `values` has another shape.

        Example:
            >>> print(Estimate.of(torch.tensor([1.0, 2.0, 3.0])))
            2.0000 ± 1.1316
        """
        if values.dim() != 1 or len(values) < 2:
            raise ValueError(
                f"values: got shape {tuple(values.shape)}, expected [n], "
                "one number for each of n ≥ 2 tasks"
            )
        values = values.double()
        n = len(values)
        # Without the first value, equal values are zeros, whose mean has no round-off.
        first = values[0].nan_to_num(0.0, 0.0, 0.0)
        rest = values - first
        return cls((first + rest.mean()).item(), 1.96 * rest.std().item() / n**0.5, n)

    @classmethod
    def of_difference(cls, values: Tensor, others: Tensor) -> Estimate:
        """The paired estimate of the mean of d = values − others, both on the same tasks.

            mean(d) ± 1.96 s/√n,    s² = Σᵢ (dᵢ − mean(d))²/(n − 1)

        What makes a task hard for both cancels in dᵢ, so that the interval is narrower than that of
        two estimates on different tasks.

        Args:
            values: `[n]`, one number for each task.
            others: `[n]`, those of the other learner on the same tasks in the same order.

        Raises:
            ValueError: The shapes differ, or are not `[n]` with n ≥ 2.

        Example:
            >>> ours, theirs = torch.tensor([1.0, 0.5, 0.75]), torch.tensor([0.75, 0.25, 0.5])
            >>> print(Estimate.of_difference(ours, theirs))
            0.2500 ± 0.0000
        """
        if values.shape != others.shape:
            raise ValueError(
                f"others: got shape {tuple(others.shape)}, expected {tuple(values.shape)}, "
                "one number for each of the same tasks"
            )
        return cls.of(values.double() - others.double())

    def to_dict(self) -> dict[str, float | None]:
        """The mean and half of the interval for JSON, where NaN and infinities are None.

        Example:
            >>> Estimate.of(torch.tensor([1.0, float("inf")])).to_dict()
            {'mean': None, 'interval_95': None}
        """
        numbers = {"mean": self.mean, "interval_95": self.interval}
        return {name: x if math.isfinite(x) else None for name, x in numbers.items()}

    def __str__(self) -> str:
        """The mean and half of the interval, with four decimals."""
        return f"{self.mean:.4f} ± {self.interval:.4f}"


@dataclass(frozen=True)
class Evaluation:
    """The query loss and accuracy of each task after several numbers of inner steps.

    Attributes:
        losses: `[counts, tasks]`.
        accuracies: The accuracies, or the learner's `metric`, `[counts, tasks]`. None for
            regression without a metric.
        steps: The numbers of inner steps, `counts` of them.
        measure: What `curve` holds: "accuracy", "metric", which is the learner's, "mse", which is
            the mean squared error, or "loss". If None, it is the accuracy or else the loss.

    Example:
        >>> evaluation = Evaluation(torch.tensor([[4.0, 2.0], [1.0, 1.0]]), None, steps=(0, 5))
        >>> evaluation.metric, [estimate.mean for estimate in evaluation.curve()]
        ('loss', [3.0, 1.0])
    """

    losses: Tensor
    accuracies: Tensor | None
    steps: tuple[int, ...]
    measure: Measure | None = None

    @property
    def metric(self) -> Measure:
        """What `curve` holds, by the names of `measure`."""
        if self.measure is not None:
            return self.measure
        return "loss" if self.accuracies is None else "accuracy"

    @property
    def values(self) -> Tensor:
        """What `curve` is the mean of, `[counts, tasks]`."""
        return self.losses if self.accuracies is None else self.accuracies

    def curve(self) -> list[Estimate]:
        """The metric after each number of inner steps."""
        return [Estimate.of(row) for row in self.values]

    def summary(self) -> dict[str, Any]:
        """The metric after the last number of steps, and after each, for JSON.

        Means that are not finite are None.
        """
        curve = self.curve()
        last = curve[-1]
        after_steps = [
            {"steps": steps, **estimate.to_dict()}
            for steps, estimate in zip(self.steps, curve, strict=True)
        ]
        return {
            "metric": self.metric,
            **last.to_dict(),
            "inner_steps": self.steps[-1],
            "episodes": last.tasks,
            "after_steps": after_steps,
        }


def evaluate(
    learner: MetaLearner,
    batches: Iterable[EpisodeBatch],
    *,
    steps: int | Sequence[int] | None = None,
    tasks: int | None = None,
) -> Evaluation:
    """Adapt to every task of `batches`, and measure on its query set.

    The learner is in evaluation mode meanwhile (dropout is off). Its modules return to the modes
    that they had.

    Args:
        learner: The learner.
        batches: Batches of tasks, on any device.
        steps: Measure after 0, 1, …, `steps` inner steps, or after each number of steps of a
            sequence. If None, measure after 0 … T steps, T being those of the inner loop.
        tasks: The number of tasks that count, ≥ 1, the first ones. If None, all.

    Raises:
        ValueError: There is no batch, or no end of them. A number of steps is negative. `tasks` is
            below 1, or there are fewer.

    Example:
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> pair = (torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))
        >>> evaluate(learner, [Episode.of(pair, pair)], steps=[0, 2]).losses.shape
        torch.Size([2, 4])
    """
    device = next(learner.parameters()).device
    require_several(batches, tasks)
    if tasks is not None:
        check_count("tasks", tasks)
    counts = tuple(step_counts(steps, learner.inner))
    losses = []
    accuracies = []
    with evaluation_mode(learner):
        for batch in batches:
            loss, accuracy = learner.evaluate(to_device(batch, device), steps)
            losses.append(loss.cpu())
            if accuracy is not None:
                accuracies.append(accuracy.cpu())
            if tasks is not None and sum(x.shape[1] for x in losses) >= tasks:
                break
    check_tasks(sum(x.shape[1] for x in losses), tasks)
    all_losses = torch.cat(losses, dim=1)[:, :tasks]
    if len(accuracies) < len(losses):
        name: Measure = "mse" if _is_squared_error(query_loss(learner)) else "loss"
        return Evaluation(all_losses, None, counts, measure=name)
    all_accuracies = torch.cat(accuracies, dim=1)[:, :tasks]
    return Evaluation(all_losses, all_accuracies, counts, measure=measure_name(learner))


def require_several(batches: object, tasks: int | None = None, name: str = "batches") -> None:
    """Raise ValueError for one batch of tasks in the place of several, or for a sampler of no end.

    Args:
        batches: What should be batches of tasks.
        tasks: The number of tasks that are taken. If None, all, so that there has to be an end.
        name: What the error calls the batches.

    Example:
        >>> require_several([{"support": None, "query": None}])
    """
    if isinstance(batches, Mapping) or hasattr(batches, "support"):
        raise ValueError(f"{name}: got one batch, expected several; put it into a list")
    methods = ("batches", "state_dict", "load_state_dict")  # of a sampler, as `fit` takes one
    is_sampler = all(callable(getattr(batches, name, None)) for name in methods)
    is_stream = is_sampler and not hasattr(batches, "__len__")
    if tasks is None and is_stream:
        raise ValueError(
            f"{name}: got {type(batches).__name__}, which has no end, expected a number of batches;"
            " take those of its method batches(count)"
        )


def check_tasks(found: int, tasks: int | None) -> None:
    """Raise ValueError if there were no tasks, or fewer than were asked for.

    Example:
        >>> check_tasks(4, tasks=600)
        Traceback (most recent call last):
        ValueError: tasks: got 600, expected at most 4, the tasks of all batches
    """
    if not found:
        raise ValueError("batches: got none, expected at least one batch of episodes")
    if tasks is not None and found < tasks:
        raise ValueError(f"tasks: got {tasks}, expected at most {found}, the tasks of all batches")


def measure_name(learner: MetaLearner) -> Literal["accuracy", "metric"]:
    """What the measure beside the loss is called, in the log of a run as well.

    Example:
        >>> measure_name(MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy))
        'accuracy'
    """
    return "accuracy" if learner.metric is None else "metric"


def to_device(episodes: EpisodeBatch, device: torch.device) -> Episode | list[Episode]:
    """The episodes on a device: one batch of tasks, or a list of tasks if they came as a list.

    Example:
        >>> pair = (torch.zeros(1, 2, 3), torch.zeros(1, 2))
        >>> to_device((pair, pair), torch.device("meta")).support.inputs.device.type
        'meta'
    """
    moved: Episode | list[Episode] = _move(name_parts(episodes), device)
    return moved


def tasks_of_one_shape(episodes: EpisodeBatch, device: torch.device) -> Episode:
    """A batch of tasks in any form, on a device, as one episode with the task axis first.

    Raises:
        ValueError: The tasks have several shapes, and so cannot be one episode.

    Example:
        >>> pair = (torch.zeros(1, 2, 3), torch.zeros(1, 2))
        >>> tasks_of_one_shape([(pair, pair)], torch.device("cpu")).support.inputs.shape
        torch.Size([1, 1, 2, 3])
    """
    first, *others = read_episodes(to_device(episodes, device))
    if others:
        raise ValueError(
            f"episodes: got {1 + len(others)} tasks of different shapes, expected one shape, as "
            "their predictions are one tensor; call this for each task, or use evaluate"
        )
    return first


def peak_memory(device: torch.device) -> float:
    """The most memory that was held so far, in MiB.

    On CUDA, this counts the tensors that torch allocated on the device. On the CPU, it is the
    resident size of the process, without that of the process that started it.

    Example:
        >>> peak_memory(torch.device("cpu")) > 1.0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        # A process that another one starts inherits its ru_maxrss. Some sandboxes lack VmHWM.
        lines = Path("/proc/self/status").read_text().splitlines()
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024  # KiB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _is_squared_error(loss: TaskLoss) -> bool:
    """Whether a loss is torch's mean squared error."""
    if isinstance(loss, nn.MSELoss):
        return loss.reduction == "mean"
    return loss is nn.functional.mse_loss


def _move(tree: Any, device: torch.device) -> Any:
    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return tree_map(move, tree)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The modules of a model are in evaluation mode, and return to the modes that they had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])  # calls what a module does when its mode changes
        for module, mode in modes.items():
            module.training = mode
