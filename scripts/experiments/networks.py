"""Networks, plain training and accuracies for the experiments on images."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tasks
from metaimplicit.params import Params


class Split(NamedTuple):
    """A labelled set in three parts."""

    train: tasks.Examples
    validation: tasks.Examples
    test: tasks.Examples

    def standardised(self, device: torch.device) -> Split:
        """Images uint8 as float32 on a device, with mean 0 and deviation 1 in the training part."""
        parts = [tasks.standardise(part, like=self.train).to(device) for part in self]
        return Split(*parts)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside the block depend on `seed` alone. The random state is restored after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def joined(a: tasks.Examples, b: tasks.Examples) -> tasks.Examples:
    """The examples of one set, followed by those of another."""
    inputs = torch.cat([a.inputs, b.inputs])
    return tasks.Examples(inputs, torch.cat([a.targets, b.targets]))


def conv_net(channels: int, classes: int, filters: Sequence[int], seed: int) -> nn.Sequential:
    """A network of convolutional blocks, the mean over space, and a linear layer.

    A block is a 3×3 convolution, group norm, ReLU and 2×2 max-pooling.

    Args:
        channels: Channels of the images.
        classes: Number of outputs.
        filters: Channels of each block's output, multiples of 4.
        seed: Seed of the initialisation.
    """
    layers: list[nn.Module] = []
    with seeded(seed):
        for width in filters:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(width // 4, width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = width
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        return nn.Sequential(*layers, *head)


def parameter_count(model: nn.Module) -> int:
    """The number of a model's parameters, counted in scalars."""
    return sum(p.numel() for p in model.parameters())


def train(
    model: nn.Module,
    batches: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """Train by cross-entropy, in place.

    Args:
        model: The model that the optimizer steps.
        batches: The batch of a step, from 0 on, as `tasks.Batches` gives it.
        steps: Number of steps.
        optimizer: Holds the model's parameters.
        schedule: The factor on the optimizer's step size at a step, from 0 on.
    """
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
    """The share of right predictions in each class.

    Args:
        model: Maps inputs `[n, *shape]` to scores `[n, classes]`.
        examples: What to predict. Every class must have an example.
        params: Parameters to use in place of the model's. If None, the model's own are used.
    """
    predictions = []
    for inputs in examples.inputs.split(1000):
        scores = torch.func.functional_call(model, params or {}, (inputs,))
        predictions.append(scores.argmax(1))
    right = (torch.cat(predictions) == examples.targets).double()
    classes = len(examples.counts())
    return [right[examples.targets == c].mean().item() for c in range(classes)]


def balanced_accuracy(
    model: nn.Module, examples: tasks.Examples, params: Params | None = None
) -> float:
    """The mean over classes of `class_accuracies`."""
    return statistics.fmean(class_accuracies(model, examples, params))
