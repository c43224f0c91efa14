"""An autoencoder of 8×8 digits by first- and second-order optimisers, every step on all the images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

import tasks
from experiments.base import Case
from experiments.networks import seeded
from experiments.optimizer_comparison import Pair, Race, Setting
from experiments.tables import digits_or_cancer
from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient
from metaimplicit.solvers import CG

LAYERS = (64, 15, 15, 15, 15, 10, 15, 15, 15, 15, 64)


@dataclass(frozen=True)
class DigitsAutoencoder(Race):
    """Training loss ½ Σ (z − y)² of 64-15-15-15-15-10-15-15-15-15-64 on scikit-learn's digits, pixels in [0, 1].

    tanh units, linear code and outputs, weights uniform after Glorot & Bengio (2010), biases zero: the same for all.
    `gauss-newton`: (G + λI)⁻¹∇L by CG, λ after Levenberg and Marquardt. For this loss the exact Fisher matrix is G, so
    `natural-gradient` takes that of targets drawn from the model, one an image.
    """

    seconds: float = 6.0
    """Of each run, in its steps alone."""
    longer: float = 24.0
    """The same of `gauss-newton` and `natural-gradient`, whose steps are the fewest."""
    images: int = 1000
    """Training images, of 1797; the others are the test set."""
    batch: int | None = None
    """Images in a step; by default all."""
    products: int = 100
    """Steps of CG at most, of `gauss-newton` and `natural-gradient`."""
    sgd: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Step sizes to try."""
    momentum: tuple[float, ...] = (0.01, 0.03, 0.1)
    """The same with momentum 0.9."""
    adam: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Step sizes to try."""
    gauss_newton: tuple[float, ...] = (1.0,)
    """Lengths of step to try."""
    natural_gradient: tuple[float, ...] = (1.0,)
    """Lengths of step to try."""
    kfac: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Step sizes to try."""
    damping: float = 0.01
    """λ of `kfac`; the one that others start from."""
    kl_clip: float = 0.01
    """κ of `kfac`."""

    name: ClassVar[str] = "digits-autoencoder"
    compared: ClassVar[tuple[str, ...]] = (
        "sgd",
        "momentum",
        "adam",
        "gauss-newton",
        "natural-gradient",
        "kfac",
    )
    baselines: ClassVar[tuple[str, ...]] = compared
    listed: ClassVar[tuple[str, ...]] = tuple(method.replace("-", "_") for method in compared)
    judged: ClassVar[tuple[str, int]] = ("test loss", 4)

    def quickened(self) -> DigitsAutoencoder:
        return replace(self, seeds=1, seconds=0.03, longer=0.03, images=50, products=2)

    @property
    def batched(self) -> str:  # type: ignore[override]
        return "all the images" if self.batch is None else f"{self.batch} images each"

    def cases(self) -> list[Case]:
        for option in ("seconds", "longer"):
            if not 0 < (budget := getattr(self, option)) < math.inf:
                raise ValueError(f"--{option}: got {budget}, expected a positive number")
        for option, most in (("images", 1796), ("batch", self.images)):
            if (got := getattr(self, option)) is not None and not 1 <= got <= most:
                raise ValueError(f"--{option}: got {got}, expected from 1 to {most}")
        return super().cases()

    def ended(self, case: Case, steps: int, seconds: float) -> bool:
        return seconds >= (
            self.longer if case["method"] in ("gauss-newton", "natural-gradient") else self.seconds
        )

    def mark(self, steps: int) -> int:
        return steps + 1 + steps // 50

    def setting(self, seed: int) -> Setting:
        whole = digits_or_cancer("digits")
        order = torch.from_numpy(
            tasks.examples.random_stream(seed, "digits").permutation(len(whole))
        )
        pixels = (whole.inputs[order] / 16).float().to(self.torch_device)
        train, test = pixels[: self.images], pixels[self.images :]
        labelled = tasks.Examples(train, whole.targets[order[: self.images]].to(train.device))
        batches = tasks.Batches(labelled, self.batch, seed)

        def batch(step: int) -> Pair:
            inputs = batches(step)["inputs"]
            return inputs, inputs

        model = autoencoder(seed).to(self.torch_device)
        return Setting(model, half_squares, half_squares, batch, (train, train), (test, test))

    def optimizer(self, case: Case, setting: Setting) -> torch.optim.Optimizer:
        model, loss, lr = setting.model, setting.loss, case["lr"]
        cg = CG(max_steps=self.products, tol=1e-3)
        match case["method"]:
            case "sgd":
                return torch.optim.SGD(model.parameters(), lr)
            case "momentum":
                return torch.optim.SGD(model.parameters(), lr, momentum=0.9)
            case "adam":
                return torch.optim.Adam(model.parameters(), lr)
            case "gauss-newton":
                return GaussNewton(model, loss, lr=lr, damping=self.damping, solver=cg)
            case "natural-gradient":
                return NaturalGradient(
                    model,
                    loss,
                    lr=lr,
                    damping=self.damping,
                    solver=cg,
                    likelihood="gaussian",
                    expectation="monte-carlo",
                    seed=case["seed"],
                )
        return KFAC(
            model,
            loss,
            lr=lr,
            damping=self.damping,
            kl_clip=self.kl_clip,
            likelihood="gaussian",
            seed=case["seed"],
        )


def half_squares(z: Tensor, y: Tensor) -> Tensor:
    """½ Σ (z − y)², the mean over examples."""
    return 0.5 * (z - y).square().sum(-1).mean()


def autoencoder(seed: int) -> nn.Sequential:
    """Linear layers with tanh between them, but for the linear code."""
    layers: list[nn.Module] = []
    with seeded(seed):
        for a, b in pairwise(LAYERS):
            linear = nn.Linear(a, b)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear] if b in (min(LAYERS), LAYERS[-1]) else [linear, nn.Tanh()]
    return nn.Sequential(*layers)
