"""What the methods of `MetaLearner` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from metaimplicit.methods import Report
from metaimplicit.params import Params


@dataclass(frozen=True)
class Step:
    """What `MetaLearner.backward` returns.

    Attributes:
        loss: The mean query loss over the tasks, a scalar without a graph.
        accuracy: The mean query accuracy, a scalar. None for regression.
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

    def __call__(self, params: Params, inputs: Tensor, *, batched: bool) -> Tensor:
        """The outputs for `inputs`. If `batched`, all three carry the task axis first."""


class AdaptedModel:
    """A model with adapted parameters, of one task or of a batch of tasks.

    Call it on inputs `[m, ...]` to get outputs `[m, ...]`. If it is batched, both carry the task
    axis first. Parameters that do not adapt are those that the learner has at the time of the call.

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
    """

    def __init__(self, predict: Predict, params: Params, *, batched: bool) -> None:
        self.params = params
        self._predict = predict
        self._batched = batched

    def __call__(self, inputs: Tensor) -> Tensor:
        """The outputs of the adapted model, of each task on its own inputs if batched."""
        return self._predict(self.params, inputs, batched=self._batched)

    def __len__(self) -> int:
        """The number of tasks: 1 if the model is not batched."""
        return len(next(iter(self.params.values()))) if self._batched else 1

    def __getitem__(self, task: int) -> AdaptedModel:
        """The model of one task of the batch.

        Raises:
            TypeError: The model is not batched.
        """
        if not self._batched:
            raise TypeError("this model holds one task; adapt with batched=True for several")
        params = {name: p[task] for name, p in self.params.items()}
        return AdaptedModel(self._predict, params, batched=False)
