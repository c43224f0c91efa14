"""Towers on CIFAR-10: step size and momentum of a ResNet-20, learnt while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from command_line.ranges import MOST, Number, Steps, within
from torch import Tensor, nn

import tasks
from experiments.networks import balanced_accuracy, parameter_count, seeded
from experiments.runs import Case, Cell, Row, mean
from experiments.small_cifar import SmallCifar
from experiments.towers import Towers, step_decay, train_with_curve
from metaimplicit import Hyperoptimizer, Positive
from metaimplicit.tuning.hyperoptimizers import SGD


@dataclass(frozen=True)
class CifarTower(SmallCifar, Towers):
    """SGD with momentum on a ResNet-20 from the three bad starts of Chandra et al. (2022).

    The method `plain` keeps lr and momentum as they start; `step-decay` multiplies lr by 0.1 after
    half and three quarters of the run (He et al. 2016); `tower` and `tower-adam` learn log lr and
    the logit of momentum, by SGD and by Adam. Their step sizes are the best of 0.01, 0.1 and 1, and
    of 0.03 and 0.1, by the training losses of seed 0 from all three starts. Images are not
    augmented. The size of He et al. is --images 5000 --side 32 --epochs 164.
    """

    start: Annotated[tuple[tuple[float, float], ...], within(0, MOST)] = (
        (0.01, 0.09),
        (0.1, 0.9),
        (1.0, 0.99),
    )
    """Pairs of lr and momentum to start from."""
    epochs: Steps = 12
    """Number of passes through the training set."""
    decay: Number = 1e-4
    """Strength of the decay: ½ decay ‖θ‖² is minimised, too. The losses shown do not include it."""
    outer_sgd: Number = 0.1
    """Step size of the SGD that moves log lr and the logit of momentum of `tower`."""
    outer_adam: Number = 0.03
    """Step size of the Adam that moves log lr and the logit of momentum of `tower-adam`."""

    name = "cifar-tower"
    sides = (4, 8, 16, 32)
    case_options = ("start",)
    quick_options: ClassVar[dict[str, Any]] = {
        "start": ((0.01, 0.09),),
        "images": 8,
        "test": 10,
        "side": 8,
        "batch": 16,
        "epochs": 5,
    }
    result_columns: ClassVar[dict[str, Cell]] = {
        "test accuracy": mean("accuracy", 3),
        "training loss": mean("loss", 3),
    }

    @property
    def starts(self) -> list[Case]:
        """The pairs of lr and momentum to start from."""
        return [{"lr": lr, "momentum": momentum} for lr, momentum in self.start]

    def run(self, case: Case, out: Path) -> Row:
        """Train the network; the row has its curve, and its accuracy, None if the run diverged."""
        train_set, test = self.data(case["seed"])
        batches = tasks.Batches(train_set, self.batch, case["seed"])
        model = resnet20(case["seed"]).to(self.torch_device).to(memory_format=torch.channels_last)

        def loss(step: int) -> Tensor:
            batch = batches(step)
            return F.cross_entropy(model(batch["inputs"]), batch["targets"])

        steps = self.epochs * len(train_set) // self.batch
        row = train_with_curve(
            self.optimizer(case, model.parameters()),
            loss,
            steps=steps,
            last=len(train_set) // self.batch,
            schedule=partial(step_decay, steps=steps) if case["method"] == "step-decay" else None,
        )
        model.eval()
        row["parameters"] = parameter_count(model)
        row["accuracy"] = balanced_accuracy(model, test) if row["diverged"] is None else None
        return row

    def optimizer(self, case: Case, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of a case: torch's SGD, or a tower."""
        outer = self.outer_level(case["method"])
        if outer is None:
            return torch.optim.SGD(
                params,
                lr=case["lr"],
                momentum=case["momentum"],
                weight_decay=self.decay,
            )
        tower = SGD(
            lr=case["lr"],
            momentum=case["momentum"],
            weight_decay=self.decay,
            optimizer=outer,
            domains={"lr": Positive()},
        )
        return Hyperoptimizer(params, tower)


class Block(nn.Module):
    """ReLU(x + two convolutions of x), `[b, channels, h, w]` to `[b, width, h/s, w/s]`.

    The number of channels grows by the whole factor s = width/channels ≥ 1. The shortcut takes
    every s-th pixel and has zeros in the new channels (He et al. 2016, option A).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stride = width // channels
        self.new_channels = width - channels
        self.body = nn.Sequential(
            nn.Conv2d(
                channels,
                width,
                3,
                stride=self.stride,
                padding=1,
                bias=False,
            ),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        pixels = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(pixels, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(shortcut + self.body(x))


def resnet20(seed: int, classes: int = 10) -> nn.Sequential:
    """The ResNet-20 of He et al. 2016, §4.2 (n = 3), with their initialisation.

    It has 0.27 million parameters and maps `[b, 3, h, w]` to `[b, classes]`.
    """
    widths = [16] * 4 + [32] * 3 + [64] * 3
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *(Block(channels, width) for channels, width in pairwise(widths)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight,
                    mode="fan_out",
                    nonlinearity="relu",
                )
    return model
