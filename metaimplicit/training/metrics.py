"""What a run is judged by, with its uncertainty."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaimplicit.learner import EpisodeBatch, MetaLearner


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks and its 95 % interval, mean ± interval.

    Attributes:
        mean: the sample mean.
        interval: 1.96 s/√n, the half-width by the normal approximation, s the sample deviation (n − 1).
        tasks: n.
    """

    mean: float
    interval: float
    tasks: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one number a task, `[n]`, n ≥ 2 (ValueError)."""
        if values.dim() != 1 or len(values) < 2:
            raise ValueError(
                f"values: got shape {tuple(values.shape)}, expected one number for each of 2 tasks or more"
            )
        values = values.double()
        return cls(
            values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5, len(values)
        )

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.interval:.4f}"


@dataclass(frozen=True)
class Evaluation:
    """Query loss and accuracy of each task after several numbers of inner steps.

    Attributes:
        losses: `[counts, tasks]`.
        accuracies: `[counts, tasks]`, or None for regression.
        steps: the numbers of inner steps, `counts` of them.
    """

    losses: Tensor
    accuracies: Tensor | None
    steps: tuple[int, ...]

    @property
    def metric(self) -> str:
        """What `curve` holds: "accuracy", or "mse", the mean of the squared errors."""
        return "mse" if self.accuracies is None else "accuracy"

    def curve(self) -> list[Estimate]:
        """The metric after each number of inner steps."""
        return [
            Estimate.of(row)
            for row in (self.losses if self.accuracies is None else self.accuracies)
        ]

    def summary(self) -> dict[str, Any]:
        """For JSON: the metric after the last step and after each."""
        curve = self.curve()
        pairs = zip(self.steps, curve, strict=True)
        return {
            "metric": self.metric,
            "mean": curve[-1].mean,
            "interval_95": curve[-1].interval,
            "inner_steps": self.steps[-1],
            "episodes": curve[-1].tasks,
            "after_steps": [
                {"steps": k, "mean": e.mean, "interval_95": e.interval} for k, e in pairs
            ],
        }


def evaluate(
    learner: MetaLearner,
    batches: Iterable[EpisodeBatch],
    *,
    steps: int | Sequence[int] | None = None,
    tasks: int | None = None,
) -> Evaluation:
    """Adapt to every task of `batches` and measure on its query set, in evaluation mode (dropout off).

    Args:
        steps: measure after 0, 1, …, `steps` inner steps; a sequence, after these; None, the inner loop's own.
        tasks: count only the first so many.

    Raises:
        ValueError: no batches; a negative number of steps.
    """
    device = next(learner.parameters()).device
    last = learner.inner.steps if steps is None else steps
    counts = tuple(last) if isinstance(last, Sequence) else tuple(range(last + 1))
    modes = {module: module.training for module in learner.modules()}
    learner.eval()
    try:
        parts = [learner.evaluate(to_device(batch, device), steps) for batch in batches]
    finally:
        learner.train(modes[learner])  # as its modules may have it; then each as it was
        for module, mode in modes.items():
            module.training = mode
    if not parts:
        raise ValueError("batches: got none, expected at least one batch of episodes")
    losses = torch.cat([loss.cpu() for loss, _ in parts], dim=1)[:, :tasks]
    if any(accuracy is None for _, accuracy in parts):
        return Evaluation(losses, None, counts)
    return Evaluation(
        losses, torch.cat([a.cpu() for _, a in parts if a is not None], dim=1)[:, :tasks], counts
    )


@dataclass(frozen=True)
class Batch:
    """Support and query on the device of the learner."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def to_device(episodes: EpisodeBatch, device: torch.device) -> Batch:
    """The episodes on `device`."""
    support, query = (
        (inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))
        for inputs, targets in (episodes.support, episodes.query)
    )
    return Batch(support, query)


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, in MiB: torch's allocations on CUDA, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
