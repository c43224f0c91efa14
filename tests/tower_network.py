"""A small classification network, a training loop, and towers with what they are compared with."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam, AdamW, RMSProp

# Each level, and the optimiser of torch that has its rule.
LEVELS = {
    "SGD": (SGD(0.05, momentum=0.8, weight_decay=0.03), torch.optim.SGD),
    "plain SGD": (SGD(0.05), torch.optim.SGD),
    "AdaGrad": (AdaGrad(0.05, eps=0.02, initial=0.1), torch.optim.Adagrad),
    "AdaGrad from 0": (AdaGrad(0.05, eps=0.02), torch.optim.Adagrad),
    "RMSProp": (RMSProp(0.01, alpha=0.9, eps=0.02), torch.optim.RMSprop),
    "Adam": (Adam(0.01, beta1=0.8, beta2=0.95, eps=0.02), torch.optim.Adam),
    "AdamW": (AdamW(0.01, beta1=0.8, beta2=0.95, eps=0.02, weight_decay=0.03), torch.optim.AdamW),
}

TOWERS = {
    "SGD^3": SGD(0.1, momentum=0.5, optimizer=SGD(0.1, optimizer=SGD(0.1))),
    "Adam/SGD": Adam(0.01, optimizer=SGD(0.1)),
    "AdamW/Adam/SGD": AdamW(
        0.01,
        optimizer=Adam(0.01, optimizer=SGD(0.1)),
        learn=("lr", "beta1", "weight_decay"),
    ),
    "RMSProp/RMSProp": RMSProp(0.01, optimizer=RMSProp(0.01)),
    "AdaGrad/SGD": AdaGrad(0.1, optimizer=SGD(0.1), learn={"lr": "per-element"}),
    "Adam": Adam(0.01),
}


def network(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(step, dtype=torch.float64):
    """Inputs and labels that depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 5, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (16,), generator=generator)


def loss(model, step, params=None):
    inputs, targets = batch(step, next(model.parameters()).dtype)
    return F.cross_entropy(functional_call(model, params or {}, (inputs,)), targets)


def train(model, optimizer, steps, first=0):
    """The ordinary training loop, over the batches with numbers from `first` on."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def torch_options(level, values):
    """The keyword arguments of torch's optimiser for hyperparameters of a level."""
    options = dict(values)
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    if isinstance(level, AdaGrad):
        options["initial_accumulator_value"] = level.initial
    return options


def parameter(*numbers, dtype=torch.float64):
    return nn.Parameter(torch.tensor(numbers, dtype=dtype))


def step_with(optimizer, *gradients):
    """One step with these gradients, a number or None for each parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = None if gradient is None else torch.full_like(p, gradient)
    optimizer.step()


def learnt_values(optimizer):
    """The present values of the hyperparameters of the first group's lowest level."""
    return optimizer.hyperparameters[0][0]


def learnt(optimizer, name="lr"):
    """One of them."""
    return learnt_values(optimizer)[name]
