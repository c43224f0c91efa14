"""MAML by the loop of higher's example for Omniglot."""

from __future__ import annotations

import higher
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from racing.contender import Sizes, accuracy, each_task
from tasks import Episodes, TaskFamily

INNER_STEPS = 5
INNER_LR = 0.1
OUTER_LR = 1e-3
FILTERS = 64
SIZES = Sizes(tasks=32, ways=5, queries=15)
TRANSDUCTIVE = "all images of a set of a task"


def example_network(family: TaskFamily) -> nn.Module:
    """Three blocks of a convolution without padding, batch normalisation, ReLU and pooling.

    28×28 pixels become 1×1. The momentum 1 does not matter, as the network stays in training mode.
    """
    layers: list[nn.Module] = []
    for channels in (family.input_shape[0], FILTERS, FILTERS):
        layers.append(nn.Conv2d(channels, FILTERS, 3))
        layers.append(nn.BatchNorm2d(FILTERS, momentum=1.0))
        layers.append(nn.ReLU(inplace=True))
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(FILTERS, family.outputs))


class HigherMAML:
    """MAML by `higher.innerloop_ctx`, one task after the other.

    Network and numbers are those of examples/maml-omniglot.py in
    https://github.com/facebookresearch/higher at its commit 15a247a, with `--k_spt 1`: 32 tasks in
    a meta-step, 15 queries of each class, 5 inner steps of SGD of size 0.1, Adam with 1e-3. The
    gradients of the tasks add up, as there.
    """

    normalization = TRANSDUCTIVE

    def __init__(self, family: TaskFamily) -> None:
        self.module = example_network(family)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=OUTER_LR)

    def step(self, episodes: Episodes, *, spent: float) -> None:
        """One meta-step. The step size is constant."""
        self.optimizer.zero_grad()
        for inputs, targets, queries, query_targets in each_task(episodes):
            scores = self._adapt(inputs, targets, queries, differentiable=True)
            F.cross_entropy(scores, query_targets).backward()
        self.optimizer.step()

    def accuracies(self, episodes: Episodes) -> Tensor:
        """The query accuracy of each task, `[tasks]`."""
        values = []
        for inputs, targets, queries, query_targets in each_task(episodes):
            scores = self._adapt(inputs, targets, queries, differentiable=False)
            values.append(accuracy(scores.detach(), query_targets))
        return torch.stack(values)

    def _adapt(
        self, inputs: Tensor, targets: Tensor, queries: Tensor, *, differentiable: bool
    ) -> Tensor:
        """The scores of the queries after the inner steps."""
        inner = torch.optim.SGD(self.module.parameters(), lr=INNER_LR)
        with higher.innerloop_ctx(
            self.module,
            inner,
            copy_initial_weights=not differentiable,
            track_higher_grads=differentiable,
        ) as (model, optimizer):
            for _ in range(INNER_STEPS):
                optimizer.step(F.cross_entropy(model(inputs), targets))
            scores: Tensor = model(queries)
        return scores
