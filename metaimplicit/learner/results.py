"""What the methods of `MetaLearner` return."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metaimplicit.methods import Report
from metaimplicit.params import Params
from metaimplicit.solvers import SolverState


@dataclass(frozen=True)
class Step:
    """What `MetaLearner.backward` returns.

    Attributes:
        loss: The mean query loss over the tasks, a scalar without a graph.
        accuracy: The mean over the tasks of their query accuracy, or of the learner's `metric`, a
            scalar. None if the loss treats no targets as classes.
        report: The report of the method: its inner loop and its solve.

    Example:
        >>> import torch
        >>> from metaimplicit.learner import Episode, MetaLearner, Pair
        >>> pair = Pair(torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))  # 4 tasks of 3 classes
        >>> learner = MetaLearner(torch.nn.Linear(2, 3), torch.nn.functional.cross_entropy)
        >>> step = learner.backward(Episode(support=pair, query=pair))
        >>> bool(step.loss > 0), bool(0 <= step.accuracy <= 1), step.report.method
        (True, True, 'unrolled')
    """

    loss: Tensor
    accuracy: Tensor | None
    report: Report


class Predict(Protocol):
    """A model as a function of its adapted parameters, such as `MetaLearner.predict`."""

    def __call__(self, params: Params, inputs: Any, *, batched: bool) -> Any:
        """The outputs for `inputs`. If `batched`, all three carry the task axis first."""


class AdaptedModel:
    """A model with adapted parameters, of one task or of a batch of tasks.

    Call it on inputs `[m, ...]` to get outputs `[m, ...]`. If it is batched, both carry the task
    axis first, or are lists with one entry for each task. Parameters that do not adapt are those
    that the learner has at the time of the call.

    Args:
        predict: The model as a function of its adapted parameters.
        params: The adapted parameters, `{name: [*shape]}`, or `{name: [tasks, *shape]}`.
        batched: Whether the parameters carry the task axis.

    Attributes:
        params: The adapted parameters, as given.

    Example:
        >>> import torch
        >>> def scale(params, inputs, *, batched):
        ...     return inputs * (params["scale"].unsqueeze(-1) if batched else params["scale"])
        >>> batch = AdaptedModel(scale, {"scale": torch.tensor([2.0, 3.0])}, batched=True)
        >>> len(batch)
        2
        >>> batch[1](torch.ones(2))
        tensor([3., 3.])
        >>> batch[1:](torch.ones(1, 2))
        tensor([[3., 3.]])
    """

    def __init__(self, predict: Predict, params: Params, *, batched: bool) -> None:
        self.params = params
        self._predict = predict
        self._batched = batched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the adapted model, of each task on its own inputs if batched.

        Several inputs are several arguments, or one argument that holds them as an episode does.

        Raises:
            TypeError: There are positional and keyword arguments.
        """
        if args and kwargs:
            raise TypeError("adapted model: got positional and keyword inputs, expected one kind")
        inputs = args[0] if len(args) == 1 else (args or kwargs)
        return self._predict(self.params, inputs, batched=self._batched)

    def __len__(self) -> int:
        """The number of tasks: 1 if the model is not batched."""
        return len(next(iter(self.params.values()))) if self._batched else 1

    def __getitem__(self, tasks: int | slice) -> AdaptedModel:
        """The model of one task of the batch, or for a slice the batch of these tasks.

        Raises:
            IndexError: There is no task of that number.
            TypeError: The model is not batched, or the index is neither a number nor a slice.
        """
        if not self._batched:
            raise TypeError("this model holds one task; adapt with batched=True for several")
        try:
            chosen = tasks if isinstance(tasks, slice) else operator.index(tasks)
        except TypeError as error:
            raise TypeError(
                f"adapted model: got the index {tasks!r}, expected the number of a task, or a slice"
            ) from error
        params = {name: p[chosen] for name, p in self.params.items()}
        return AdaptedModel(self._predict, params, batched=isinstance(chosen, slice))


def join_reports(reports: Sequence[Report]) -> Report:
    """The report of several groups of tasks as one, with the tasks in the order of the groups.

    Tensors are joined along the task axis. A number is the largest of the groups, as a product is
    one over all tasks. Anything else is that of the first group.

    Example:
        >>> def report(steps):
        ...     return Report("cg", torch.tensor([steps]), torch.zeros(1), products=steps)
        >>> joined = join_reports([report(3), report(5)])
        >>> joined.inner_steps, joined.products
        (tensor([3, 5]), 5)
    """
    if len(reports) == 1:
        return reports[0]
    # No solve starts from several states, so the joined report has none. They may not even fit
    # together: the heads of tasks with different numbers of classes have other parameters.
    stateless = [dataclasses.replace(report, state=SolverState()) for report in reports]
    joined: Report = _join(stateless)
    return joined


def reject_other_shapes(params: Sequence[Params]) -> None:
    """Raise ValueError if the parameters of several groups of tasks cannot be one batch.

    A head has as many outputs as a task has classes.

    Example:
        >>> import torch
        >>> reject_other_shapes([{"w": torch.zeros(1, 2)}, {"w": torch.zeros(3, 2)}])
    """
    shapes = {tuple(p.shape[1:] for p in group.values()) for group in params}
    if len(shapes) > 1:
        raise ValueError(
            "support: got tasks with different numbers of classes, expected one number, because "
            "the heads of a batch are stacked; adapt to each task by itself"
        )


def combine(
    values: Sequence[Tensor | None], function: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    """A function of several tensors. None if one of them is missing.

    Example:
        >>> combine([torch.ones(1), None], torch.cat) is None
        True
    """
    present = [value for value in values if value is not None]
    return function(present) if len(present) == len(values) else None


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, which for one tensor is that tensor.

    Example:
        >>> mean([torch.tensor([1.0]), torch.tensor([3.0])])
        tensor([2.])
    """
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


def _join(values: list[Any]) -> Any:
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Tensor):
        return torch.cat(values) if first.dim() else first
    if isinstance(first, (int, float)):
        return max(values)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        joined = {name: _join([getattr(value, name) for value in values]) for name in names}
        return dataclasses.replace(first, **joined)
    return first
