"""K-FAC against Adam: a small convolutional network on CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tasks
from experiments.base import Case
from experiments.networks import seeded
from experiments.optimizer_comparison import Pair, Race, Setting
from experiments.small_cifar import SmallCifar
from metaimplicit.optim import KFAC


@dataclass(frozen=True)
class CifarKFAC(SmallCifar, Race):
    """Training loss of three 3×3 convolutions (16, 32, 32 channels; ReLU, 2×2 max-pooling) and a linear layer.

    Cross-entropy, no augmentation, no weight decay, constant step sizes. Every method has the same steps, on the same
    batches; the training loss is that of all the training images, after every half epoch.
    """

    epochs: int = 10
    """Passes through the training set."""
    momentum: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Step sizes to try, of SGD with momentum 0.9."""
    adam: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Step sizes to try."""
    kfac: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Step sizes to try."""
    damping: float = 0.01
    """λ of `kfac`."""
    kl_clip: float = 0.001
    """κ of `kfac`; at 0.01 it stays near the loss it starts from."""

    name: ClassVar[str] = "cifar-kfac"
    compared: ClassVar[tuple[str, ...]] = ("momentum", "adam", "kfac")
    baselines: ClassVar[tuple[str, ...]] = compared
    listed: ClassVar[tuple[str, ...]] = compared
    judged: ClassVar[tuple[str, int]] = ("test accuracy", 3)

    def quickened(self) -> CifarKFAC:
        return replace(self, seeds=1, images=8, test=10, side=8, batch=16, epochs=1)

    @property
    def batched(self) -> str:  # type: ignore[override]
        return f"{self.batch} images each"

    @property
    def steps(self) -> int:
        return self.epochs * 10 * self.images // self.batch

    def cases(self) -> list[Case]:
        if self.epochs < 1:
            raise ValueError(f"--epochs: got {self.epochs}, expected at least 1")
        return super().cases()

    def ended(self, case: Case, steps: int, seconds: float) -> bool:
        return steps >= self.steps

    def mark(self, steps: int) -> int:
        return steps + max(10 * self.images // (2 * self.batch), 1)

    def setting(self, seed: int) -> Setting:
        train, test = self.data(seed)
        batches = tasks.Batches(train, self.batch, seed)

        def batch(step: int) -> Pair:
            found = batches(step)
            return found["inputs"], found["targets"]

        model = network(self.side, seed).to(self.torch_device)
        whole = ((part.inputs, part.targets) for part in (train, test))
        return Setting(model, F.cross_entropy, accuracy, batch, *whole)

    def optimizer(self, case: Case, setting: Setting) -> torch.optim.Optimizer:
        model, lr = setting.model, case["lr"]
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
    return (outputs.argmax(1) == targets).double().mean()


def network(side: int, seed: int) -> nn.Sequential:
    """Initialised as torch does."""
    layers: list[nn.Module] = []
    channels = 3
    with seeded(seed):
        for width in (16, 32, 32):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (side // 8) ** 2, 10))
