"""Towers on CIFAR-10: the step size and momentum of a ResNet-20 learnt while it trains, from bad starts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tasks
from experiments.base import Case, Row
from experiments.networks import class_accuracies, seeded
from experiments.small_cifar import SmallCifar
from experiments.towers import Towers, descend, step_decay
from metaimplicit import Hyperoptimizer, Positive
from metaimplicit.tuning.hyperoptimizers import SGD


@dataclass(frozen=True)
class CifarTower(SmallCifar, Towers):
    """SGD with momentum on a ResNet-20 from the three starts of Chandra et al. 2022.

    `plain`: lr and momentum as they start; `step-decay`: lr × 0.1 after 1/2 and 3/4 of the run (He et al. 2016);
    `tower`, `tower-adam`: log lr and the logit of momentum learnt, under SGD or Adam. No augmentation. He et al.'s
    size: --images 5000 --side 32 --epochs 164.
    """

    start: tuple[tuple[float, float], ...] = ((0.01, 0.09), (0.1, 0.9), (1.0, 0.99))
    """lr and momentum, in pairs, to start from."""
    epochs: int = 12
    """Passes through the training set."""
    decay: float = 1e-4
    """½ decay ‖θ‖² is part of what is descended on, not of the losses told."""
    outer_sgd: float = 0.1
    """Step size of the SGD above, on log lr and the logit of momentum, of `tower`: the best of 0.01, 0.1 and 1 by the
    training losses of seed 0 from all three starts."""
    outer_adam: float = 0.03
    """That of the Adam above, on the same, of `tower-adam`: the best of 0.03 and 0.1."""

    name: ClassVar[str] = "cifar-tower"
    sides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)
    listed: ClassVar[tuple[str, ...]] = ("start",)
    shown: ClassVar[dict[str, tuple[str, int]]] = {
        "accuracy": ("test accuracy", 3), "loss": ("training loss", 3),
    }  # fmt: skip

    @property
    def starts(self) -> list[Case]:
        return [{"lr": lr, "momentum": momentum} for lr, momentum in self.start]

    def quickened(self) -> CifarTower:
        return replace(
            self, start=self.start[:1], seeds=1, images=8, test=10, side=8, batch=16, epochs=5
        )

    def cases(self) -> list[Case]:
        return super().cases()

    def run(self, case: Case, out: Path) -> Row:
        train_set, test = self.data(case["seed"])
        model = resnet20(case["seed"]).to(self.torch_device).to(memory_format=torch.channels_last)
        batches = tasks.Batches(train_set, self.batch, case["seed"])

        def loss(step: int) -> Tensor:
            batch = batches(step)
            return F.cross_entropy(model(batch["inputs"]), batch["targets"])

        steps, last = self.epochs * len(train_set) // self.batch, len(train_set) // self.batch
        schedule = partial(step_decay, steps=steps) if case["method"] == "step-decay" else None
        row = descend(self.optimizer(case, model.parameters()), loss, steps, last, schedule)
        accuracy = (
            None if row["loss"] is None else statistics.fmean(class_accuracies(model.eval(), test))
        )
        return row | {
            "accuracy": accuracy,
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def optimizer(self, case: Case, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Of a case: torch's own SGD, or a tower."""
        lr, momentum = case["lr"], case["momentum"]
        if (above := self.above(case["method"])) is None:
            return torch.optim.SGD(params, lr, momentum, weight_decay=self.decay)
        tower = SGD(
            lr,
            momentum=momentum,
            weight_decay=self.decay,
            optimizer=above,
            domains={"lr": Positive()},
        )
        return Hyperoptimizer(params, tower)


class Block(nn.Module):
    """ReLU(x + two convolutions of it); where channels grow the shortcut has zeros (He et al. 2016, option A)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride, self.more = width // channels, width - channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, self.stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(shortcut + self.body(x))


def resnet20(seed: int, classes: int = 10) -> nn.Sequential:
    """He et al. 2016, §4.2, n = 3: 0.27 M parameters, their initialisation."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            *(Block(a, b) for a, b in pairwise(widths)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
