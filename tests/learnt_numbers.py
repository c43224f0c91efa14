"""Inner loops of three steps whose numbers are meta-parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit import FromMeta, GradientDescent, TorchOptimizer
from metaimplicit.inner import InnerLoop

STEPS = 3


@dataclass(frozen=True)
class LearntLoop:
    """An inner loop, and the values of the meta-parameters that it reads."""

    inner: InnerLoop
    numbers: dict[str, float]

    @property
    def meta(self) -> dict[str, Tensor]:
        return {
            name: torch.tensor(value, dtype=torch.float64) for name, value in self.numbers.items()
        }


def torch_loop(optimizer: type[torch.optim.Optimizer], **options: object) -> TorchOptimizer:
    """`STEPS` steps of an optimiser whose step size is the meta-parameter "lr"."""
    return TorchOptimizer(optimizer, steps=STEPS, lr=FromMeta("lr"), **options)


BY_STEP = ("by step", "by parameter")  # a number belongs to a step of one call of the loop

LEARNT_LOOPS = {
    "gradient-descent": LearntLoop(
        GradientDescent(steps=STEPS, lr=FromMeta("lr"), momentum=FromMeta("mu")),
        {"lr": 0.1, "mu": 0.5},
    ),
    "momentum-from-zero": LearntLoop(
        GradientDescent(steps=STEPS, lr=0.1, momentum=FromMeta("mu")),
        {"mu": 0.0},
    ),
    "transformed": LearntLoop(
        GradientDescent(steps=STEPS, lr=FromMeta("log_lr", torch.exp)),
        {"log_lr": -2.0},
    ),
    "sgd": LearntLoop(
        torch_loop(
            torch.optim.SGD,
            momentum=FromMeta("mu"),
            weight_decay=FromMeta("wd"),
            nesterov=True,
        ),
        {"lr": 0.1, "mu": 0.5, "wd": 0.01},
    ),
    "adam": LearntLoop(
        torch_loop(
            torch.optim.Adam,
            betas=(FromMeta("b1"), FromMeta("b2")),
            weight_decay=FromMeta("wd"),
            eps=FromMeta("eps"),
        ),
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "wd": 0.1, "eps": 0.01},
    ),
    "amsgrad": LearntLoop(
        torch_loop(torch.optim.Adam, betas=(0.8, FromMeta("b2")), amsgrad=True),
        {"lr": 0.05, "b2": 0.95},
    ),
    "adamw": LearntLoop(
        torch_loop(torch.optim.AdamW, betas=(0.8, FromMeta("b2")), weight_decay=FromMeta("wd")),
        {"lr": 0.05, "b2": 0.95, "wd": 0.1},
    ),
    "adagrad": LearntLoop(
        torch_loop(torch.optim.Adagrad, eps=FromMeta("eps")),
        {"lr": 0.1, "eps": 0.1},
    ),
    "rmsprop": LearntLoop(
        torch_loop(torch.optim.RMSprop, alpha=FromMeta("a"), momentum=FromMeta("mu")),
        {"lr": 0.02, "a": 0.9, "mu": 0.5},
    ),
    "adadelta": LearntLoop(
        torch_loop(torch.optim.Adadelta, rho=FromMeta("rho")),
        {"lr": 1.0, "rho": 0.9},
    ),
    "adamax": LearntLoop(
        torch_loop(torch.optim.Adamax, betas=(FromMeta("b1"), 0.99)),
        {"lr": 0.05, "b1": 0.8},
    ),
    "asgd": LearntLoop(
        torch_loop(torch.optim.ASGD, lambd=FromMeta("l")),
        {"lr": 0.1, "l": 0.01},
    ),
    "nadam": LearntLoop(
        torch_loop(
            torch.optim.NAdam,
            betas=(FromMeta("b1"), FromMeta("b2")),
            momentum_decay=FromMeta("psi"),
            weight_decay=FromMeta("wd"),
            eps=FromMeta("eps"),
        ),
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "psi": 0.3, "wd": 0.1, "eps": 0.01},
    ),
    "nadam, decoupled": LearntLoop(
        torch_loop(
            torch.optim.NAdam, weight_decay=FromMeta("wd"), decoupled_weight_decay=True, eps=0.01
        ),
        {"lr": 0.05, "wd": 0.1},
    ),
    "radam": LearntLoop(  # its sixth step is the first that is rectified
        TorchOptimizer(
            torch.optim.RAdam,
            steps=6,
            lr=FromMeta("lr"),
            betas=(FromMeta("b1"), FromMeta("b2")),
            weight_decay=FromMeta("wd"),
            eps=FromMeta("eps"),
        ),
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "wd": 0.1, "eps": 0.01},
    ),
    "rmsprop, centred": LearntLoop(
        torch_loop(torch.optim.RMSprop, alpha=FromMeta("a"), centered=True, eps=FromMeta("eps")),
        {"lr": 0.02, "a": 0.9, "eps": 0.1},
    ),
    "by step": LearntLoop(
        GradientDescent(
            steps=STEPS,
            lr=[FromMeta("lr"), FromMeta("log_lr", torch.exp), FromMeta("lr")],
            momentum=[0.3, FromMeta("mu"), 0.0],
        ),
        {"lr": 0.1, "log_lr": -2.0, "mu": 0.5},
    ),
    "by parameter": LearntLoop(
        GradientDescent(
            steps=STEPS,
            lr={"0.weight": FromMeta("lr"), "*.bias": 0.2, "2": [FromMeta("last"), 0.1, 0.05]},
        ),
        {"lr": 0.1, "last": 0.3},
    ),
    "clipped": LearntLoop(
        GradientDescent(steps=STEPS, lr=FromMeta("lr"), max_grad_norm=FromMeta("limit")),
        {"lr": 0.2, "limit": 0.5},
    ),
    "clipped adam": LearntLoop(
        TorchOptimizer(
            torch.optim.Adam, steps=STEPS, lr=FromMeta("lr"), eps=0.01, max_grad_norm=0.3
        ),
        {"lr": 0.05},
    ),
    "rprop": LearntLoop(
        torch_loop(torch.optim.Rprop),
        {"lr": 0.01},
    ),
}
