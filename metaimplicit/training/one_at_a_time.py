"""What a model is measured by that sees one query example at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.learner import Episode, EpisodeBatch, MetaLearner, read_episodes
from metaimplicit.learner.targets import Group, measure
from metaimplicit.task_axis import map_tensors
from metaimplicit.tensors import tensors_in
from metaimplicit.training.metrics import (
    Estimate,
    check_tasks,
    evaluation_mode,
    require_several,
    to_device,
)
from metaimplicit.training.queries import query_classes, query_loss


def evaluate_one_at_a_time(
    learner: MetaLearner,
    batches: Iterable[EpisodeBatch],
    *,
    steps: int | None = None,
    tasks: int | None = None,
) -> Estimate:
    """The accuracy, or the learner's `metric`, where the model sees one query at a time.

    Where a normalisation takes its statistics from its batch, this is what a user gets who has one
    image to classify. For other models it is what `evaluate` measures.

    Args:
        learner: The learner of a classification, or one with a `metric`.
        batches: Batches of tasks, on any device, as for `evaluate`.
        steps: The number of inner steps. If None, those of the inner loop.
        tasks: The number of tasks that count, ≥ 2, the first ones. If None, all.

    Raises:
        ValueError: There is no batch, or no end of them. The loss treats no targets as classes, and
            there is no metric. An input has no axis of examples. `tasks` is below 2, or there are
            fewer.

    Example:
        >>> from torch import nn
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> pair = (torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))
        >>> evaluate_one_at_a_time(learner, [Episode.of(pair, pair)]).tasks
        4
    """
    require_several(batches, tasks)
    if tasks is not None:
        check_count("tasks", tasks, least=2)
    device = next(learner.parameters()).device
    measured = []
    with evaluation_mode(learner), torch.no_grad():
        for batch in batches:
            for episode in read_episodes(to_device(batch, device)):
                adapted = learner.adapt(episode.support, steps=steps, batched=True)
                queries = _split_examples(episode.query.inputs)
                outputs = torch.cat([adapted(query) for query in queries], dim=1)
                measured.append(_measure(learner, episode, outputs).cpu())
            if tasks is not None and sum(map(len, measured)) >= tasks:
                break
    check_tasks(sum(map(len, measured)), tasks)
    return Estimate.of(torch.cat(measured)[:tasks])


def _split_examples(inputs: Any) -> list[Any]:
    """The inputs of each query example, with an axis of one example."""
    shapes = [tuple(x.shape) for x in tensors_in(inputs)]
    counts = {shape[1] if len(shape) > 1 else None for shape in shapes}
    count = counts.pop()
    if counts or count is None:
        raise ValueError(
            f"batches: got query inputs of shapes {shapes}, expected each to begin with the same "
            "[tasks, examples], to be split into examples; use evaluate for other inputs"
        )

    def example(number: int, tensor: Tensor) -> Tensor:
        return tensor.narrow(1, number, 1)

    return [map_tensors(partial(example, number), inputs) for number in range(count)]


def _measure(learner: MetaLearner, episode: Episode, outputs: Tensor) -> Tensor:
    """The metric or the accuracy of each task, `[tasks]`, as `evaluate` measures it."""
    classes = query_classes(learner, outputs, episode.query.targets)
    measured = measure(
        Group(episode, classes, looped=False),
        outputs,
        metric=learner.metric,
        make_loss=lambda: query_loss(learner),
    )
    if measured is None:
        raise ValueError(
            "learner: got a loss that treats no targets as classes, expected that of a "
            "classification, or a learner with a metric; use evaluate for the loss"
        )
    return measured
