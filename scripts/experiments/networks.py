"""Networks, plain training and accuracies for the experiments on images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tasks
from metaimplicit.params import Params


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialisations inside depend on `seed` alone, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def joined(a: tasks.Examples, b: tasks.Examples) -> tasks.Examples:
    """One set after the other."""
    return tasks.Examples(torch.cat([a.inputs, b.inputs]), torch.cat([a.targets, b.targets]))


def conv_net(channels: int, classes: int, filters: Sequence[int], seed: int) -> nn.Sequential:
    """Blocks of 3×3 convolution, group norm, ReLU and 2×2 max-pooling, the mean over space, a linear layer."""
    layers: list[nn.Module] = []
    with seeded(seed):
        for width in filters:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(width // 4, width),
                nn.ReLU(),
            ]
            layers.append(nn.MaxPool2d(2))
            channels = width
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )


def train(
    model: nn.Module,
    batches: Callable[[int], dict[str, Tensor]],
    steps: int,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Plain training by cross-entropy, batch i at step i; `schedule` gives a factor on the step size."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        batch = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(model(batch["inputs"]), batch["targets"]).backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def class_accuracies(
    model: nn.Module, examples: tasks.Examples, params: Params | None = None
) -> list[float]:
    """The share of right answers for each class; at `params`, if given, rather than the model's own."""
    outputs = [
        torch.func.functional_call(model, params or {}, (x,)).argmax(1)
        for x in examples.inputs.split(1000)
    ]
    right = (torch.cat(outputs) == examples.targets).double()
    return [right[examples.targets == c].mean().item() for c in range(len(examples.counts()))]
