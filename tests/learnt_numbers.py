"""Inner loops whose numbers are meta-parameters, and the values that those take."""

import torch

from metaimplicit import FromMeta, GradientDescent, TorchOptimizer

NUMBERS = {
    "gradient-descent": (
        GradientDescent(steps=4, lr=FromMeta("lr"), momentum=FromMeta("mu")),
        {"lr": 0.1, "mu": 0.5},
    ),
    "momentum-from-zero": (GradientDescent(steps=4, lr=0.1, momentum=FromMeta("mu")), {"mu": 0.0}),
    "transformed": (GradientDescent(steps=4, lr=FromMeta("log_lr", torch.exp)), {"log_lr": -2.0}),
    "sgd": (
        TorchOptimizer(
            torch.optim.SGD,
            steps=4,
            lr=FromMeta("lr"),
            momentum=FromMeta("mu"),
            weight_decay=FromMeta("wd"),
            nesterov=True,
        ),
        {"lr": 0.1, "mu": 0.5, "wd": 0.01},
    ),
    "adam": (
        TorchOptimizer(
            torch.optim.Adam,
            steps=4,
            lr=FromMeta("lr"),
            betas=(FromMeta("b1"), FromMeta("b2")),
            weight_decay=FromMeta("wd"),
            eps=FromMeta("eps"),
        ),
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "wd": 0.1, "eps": 0.01},
    ),
    "amsgrad": (
        TorchOptimizer(
            torch.optim.Adam, steps=4, lr=FromMeta("lr"), betas=(0.8, FromMeta("b2")), amsgrad=True
        ),
        {"lr": 0.05, "b2": 0.95},
    ),
    "adamw": (
        TorchOptimizer(
            torch.optim.AdamW,
            steps=4,
            lr=FromMeta("lr"),
            betas=(0.8, FromMeta("b2")),
            weight_decay=FromMeta("wd"),
        ),
        {"lr": 0.05, "b2": 0.95, "wd": 0.1},
    ),
    "adagrad": (
        TorchOptimizer(torch.optim.Adagrad, steps=4, lr=FromMeta("lr"), eps=FromMeta("eps")),
        {"lr": 0.1, "eps": 0.1},
    ),
    "rmsprop": (
        TorchOptimizer(
            torch.optim.RMSprop,
            steps=4,
            lr=FromMeta("lr"),
            alpha=FromMeta("a"),
            momentum=FromMeta("mu"),
        ),
        {"lr": 0.02, "a": 0.9, "mu": 0.5},
    ),
    "adadelta": (
        TorchOptimizer(torch.optim.Adadelta, steps=4, lr=FromMeta("lr"), rho=FromMeta("rho")),
        {"lr": 1.0, "rho": 0.9},
    ),
    "adamax": (
        TorchOptimizer(
            torch.optim.Adamax, steps=4, lr=FromMeta("lr"), betas=(FromMeta("b1"), 0.99)
        ),
        {"lr": 0.05, "b1": 0.8},
    ),
    "asgd": (
        TorchOptimizer(torch.optim.ASGD, steps=4, lr=FromMeta("lr"), lambd=FromMeta("l")),
        {"lr": 0.1, "l": 0.01},
    ),
    "rprop": (TorchOptimizer(torch.optim.Rprop, steps=4, lr=FromMeta("lr")), {"lr": 0.01}),
}
