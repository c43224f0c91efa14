"""MAML and ANIL by the loops of learn2learn's examples."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from command_line import require_package
from torch import Tensor, nn

from racing.contender import Sizes, accuracy, each_task
from tasks import Episodes, TaskFamily

SIZES = Sizes(tasks=32, ways=5, queries=1)  # as many queries as shots


def load_learn2learn() -> Any:
    """The package without the warnings of its import, and without what gym prints.

    Raises:
        ImportError: It is not installed, or lacks what it needs.
    """
    require_package("learn2learn", purpose="the race", extra="learn2learn")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return import_module("learn2learn")


class PerTaskLoop:
    """One task after the other, as in the examples: `MAML.clone`, `adapt`, `backward`.

    Each example also validates on as many tasks as it trains with in every meta-step. That is left
    out.

    Args:
        body: The layers that all tasks share, or None.
        maml: The `learn2learn.algorithms.MAML` of the layers that adapt.
        inner_steps: The number of inner steps.
        outer_lr: The step size of Adam, which is constant.
    """

    def __init__(
        self, body: nn.Module | None, maml: Any, *, inner_steps: int, outer_lr: float
    ) -> None:
        self.body = body
        self.maml = maml
        self.inner_steps = inner_steps
        self.module = nn.ModuleList([part for part in (body, maml) if part is not None])
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=outer_lr)
        self.normalization = "all images of a set of a task"
        if body is not None:
            self.normalization = "all images of a task, support and queries together"

    def step(self, episodes: Episodes, *, spent: float) -> None:
        """One meta-step. The step size is constant."""
        self.optimizer.zero_grad()
        for inputs, targets, queries, query_targets in each_task(episodes):
            scores = self._adapt(inputs, targets, queries, differentiable=True)
            F.cross_entropy(scores, query_targets).backward()
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / len(episodes))
        self.optimizer.step()

    def accuracies(self, episodes: Episodes) -> Tensor:
        """The query accuracy of each task, `[tasks]`."""
        values = []
        for inputs, targets, queries, query_targets in each_task(episodes):
            scores = self._adapt(inputs, targets, queries, differentiable=False)
            values.append(accuracy(scores, query_targets))
        return torch.stack(values)

    def _adapt(
        self, inputs: Tensor, targets: Tensor, queries: Tensor, *, differentiable: bool
    ) -> Tensor:
        """The scores of the queries after the inner steps."""
        if self.body is not None:
            with torch.set_grad_enabled(differentiable):
                features = self.body(torch.cat([inputs, queries]))
            inputs, queries = features.split([len(inputs), len(queries)])
        learner = self.maml.clone(first_order=not differentiable)
        for _ in range(self.inner_steps):
            learner.adapt(F.cross_entropy(learner(inputs), targets))
        with torch.set_grad_enabled(differentiable):
            scores: Tensor = learner(queries)
        return scores


def learn2learn_maml(family: TaskFamily) -> PerTaskLoop:
    """MAML at the settings of examples/vision/maml_omniglot.py.

    See https://github.com/learnables/learn2learn, commit db5cee3; version 0.2.0 has the same file.
    The network is `OmniglotFC` (linear layers of 256, 128, 64 and 64 with batch normalisation).
    There are 32 tasks in a meta-step, 1 query of each class, 1 inner step of size 0.5, and Adam
    with 0.003.
    """
    l2l = load_learn2learn()
    model = l2l.vision.models.OmniglotFC(math.prod(family.input_shape), family.outputs)
    maml = l2l.algorithms.MAML(model, lr=0.5, first_order=False)
    return PerTaskLoop(None, maml, inner_steps=1, outer_lr=0.003)


def learn2learn_anil(family: TaskFamily) -> PerTaskLoop:
    """ANIL at the settings of examples/vision/anil_fc100.py, the only example of ANIL.

    See https://github.com/learnables/learn2learn, commit db5cee3; version 0.2.0 has the same file.
    The network is `CNN4` with 64 channels, which takes images of one channel here, and makes 64
    features of 28×28 pixels. There are 32 tasks in a meta-step, as many queries as shots, 5 inner
    steps of size 0.1 on the head, and Adam with 0.001.
    """
    l2l = load_learn2learn()
    model = l2l.vision.models.CNN4(
        output_size=family.outputs,
        hidden_size=64,
        channels=family.input_shape[0],
        embedding_size=64,
    )
    maml = l2l.algorithms.MAML(model.classifier, lr=0.1)
    return PerTaskLoop(model.features, maml, inner_steps=5, outer_lr=0.001)
