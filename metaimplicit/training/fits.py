"""Predictions of a learner for tasks of one input and one output, before and after adaptation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.learner import EpisodeBatch, MetaLearner, Pair
from metaimplicit.training.metrics import evaluation_mode, tasks_of_one_shape

GRID_POINTS = 200


@dataclass(frozen=True)
class Fits:
    """Predictions for tasks of one input and one output, before and after adaptation.

    Attributes:
        grid: The inputs, `[points]`.
        before: The predictions after 0 inner steps, `[tasks, points]`.
        after: The predictions after `steps` inner steps, likewise.
        support: Inputs and targets, `[tasks, examples]`.
        query: Likewise.
        steps: The number of inner steps.

    Example:
        >>> from metaimplicit.learner import Episode
        >>> pair = Pair(torch.randn(2, 5, 1), torch.randn(2, 5, 1))  # 2 tasks of 5 examples
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> fits = predict_curves(learner, Episode(pair, pair), steps=3)
        >>> fits.grid.shape, fits.before.shape, fits.support.inputs.shape
        (torch.Size([200]), torch.Size([2, 200]), torch.Size([2, 5]))
    """

    grid: Tensor
    before: Tensor
    after: Tensor
    support: Pair
    query: Pair
    steps: int


def predict_curves(learner: MetaLearner, episodes: EpisodeBatch, steps: int) -> Fits:
    """Adapt to tasks of one input and one output, and predict over the range of their query inputs.

    The learner is in evaluation mode meanwhile, as in `evaluate`.

    Args:
        learner: The learner.
        episodes: A batch of tasks with inputs and targets `[tasks, examples, 1]`, on any device.
        steps: The number of inner steps.

    Returns:
        Predictions at 200 inputs, on the CPU.

    Raises:
        ValueError: The tasks have several shapes.

    Example:
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> from metaimplicit.learner import Episode
        >>> pair = Pair(torch.randn(2, 5, 1), torch.randn(2, 5, 1))
        >>> predict_curves(learner, Episode(pair, pair), steps=3).after.shape
        torch.Size([2, 200])
    """
    device = next(learner.parameters()).device
    support, query = tasks_of_one_shape(episodes, device)
    low = float(query.inputs.min())
    high = float(query.inputs.max())
    dtype = query.inputs.dtype
    grid = torch.linspace(low, high, GRID_POINTS, device=device, dtype=dtype)
    inputs = grid[:, None].expand(len(query.inputs), -1, 1)

    def predict(count: int) -> Tensor:
        with evaluation_mode(learner):
            adapted = learner.adapt(support, steps=count, batched=True)
            with torch.no_grad():
                outputs: Tensor = adapted(inputs)
        return outputs.squeeze(-1).cpu()

    return Fits(
        grid=grid.cpu(),
        before=predict(0),
        after=predict(steps),
        support=_without_last_axis(support),
        query=_without_last_axis(query),
        steps=steps,
    )


def _without_last_axis(pair: Pair) -> Pair:
    return Pair(pair.inputs.squeeze(-1).cpu(), pair.targets.squeeze(-1).cpu())
