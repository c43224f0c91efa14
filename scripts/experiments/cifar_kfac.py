"""K-FAC against Adam and SGD: a small convolutional network on CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from command_line.ranges import Number, Numbers, Steps
from torch import Tensor, nn

import tasks
from experiments.networks import seeded
from experiments.optimizer_comparison import OptimizerComparison
from experiments.runs import Case
from experiments.small_cifar import SmallCifar
from experiments.timed_training import Pair, Setting
from metaimplicit.optim import KFAC


@dataclass(frozen=True)
class CifarKFAC(SmallCifar, OptimizerComparison):
    """Training loss of three 3×3 convolutions (16, 32, 32 channels) and a linear layer.

    ReLU and 2×2 max-pooling follow each convolution. The loss is the cross-entropy, without
    augmentation, without weight decay, at constant step sizes. All methods take the same number of
    steps on the same batches. The training loss is that of all training images, after every half
    epoch.
    """

    epochs: Steps = 10
    """Number of passes through the training set."""
    momentum: Numbers = (0.01, 0.03, 0.1)
    """Step sizes to try for SGD with momentum 0.9."""
    adam: Numbers = (0.003, 0.01, 0.03)
    """Step sizes to try for `adam`."""
    kfac: Numbers = (0.01, 0.03, 0.1)
    """Step sizes to try for `kfac`."""
    damping: Number = 0.01
    """Damping λ of `kfac`."""
    kl_clip: Number = 0.001
    """Bound κ on the step of `kfac`. With 0.01 it stays near the loss it starts from."""

    name = "cifar-kfac"
    default_methods = ("momentum", "adam", "kfac")
    case_options = default_methods
    quick_options: ClassVar[dict[str, Any]] = {
        "images": 8,
        "test": 10,
        "side": 8,
        "batch": 16,
        "epochs": 1,
    }
    metric_name = "test accuracy"
    metric_digits = 3

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.epochs * 10 * self.images // self.batch

    def batch_description(self) -> str:
        """What a step sees."""
        return f"{self.batch} images each"

    def is_finished(self, case: Case, steps: int, seconds: float) -> bool:
        """Whether all steps are taken."""
        return steps >= self.steps

    def next_evaluation(self, steps: int) -> int:
        """After half an epoch."""
        half_epoch = 10 * self.images // (2 * self.batch)
        return steps + max(half_epoch, 1)

    def setting(self, seed: int) -> Setting:
        """The network and the images of a seed."""
        train, test = self.data(seed)
        batches = tasks.Batches(train, self.batch, seed)

        def batch(step: int) -> Pair:
            examples = batches(step)
            return examples["inputs"], examples["targets"]

        return Setting(
            model=network(self.side, seed).to(self.torch_device),
            loss=F.cross_entropy,
            test_metric=accuracy,
            batch=batch,
            train=(train.inputs, train.targets),
            test=(test.inputs, test.targets),
        )

    def optimizer(self, case: Case, setting: Setting) -> torch.optim.Optimizer:
        """The optimiser of a case."""
        model = setting.model
        lr = case["lr"]
        match case["method"]:
            case "momentum":
                return torch.optim.SGD(model.parameters(), lr, momentum=0.9)
            case "adam":
                return torch.optim.Adam(model.parameters(), lr)
        return KFAC(
            model,
            setting.loss,
            lr=lr,
            damping=self.damping,
            kl_clip=self.kl_clip,
            seed=case["seed"],
        )


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of right predictions: scores `[n, classes]`, labels `[n]`."""
    return (outputs.argmax(1) == targets).double().mean()


def network(side: int, seed: int) -> nn.Sequential:
    """The network for images of `side`, a multiple of 8. torch initialises it."""
    layers: list[nn.Module] = []
    channels = 3
    with seeded(seed):
        for width in (16, 32, 32):
            layers += [
                nn.Conv2d(
                    channels,
                    width,
                    3,
                    padding=1,
                ),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = width
        features = channels * (side // 8) ** 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 10))
