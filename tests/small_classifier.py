"""A small network with three classes, three tasks of it, and its derivatives by `torch.func`."""

import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit.operators import LossParts
from metaimplicit.params import flatten, unflatten

TASKS = 3
POINTS = 7
INPUTS = 4
HIDDEN = 5
CLASSES = 3
X = randn(TASKS, POINTS, INPUTS, seed=0)
LABELS = torch.arange(POINTS).remainder(CLASSES).expand(TASKS, -1)
TARGETS = randn(TASKS, POINTS, CLASSES, seed=1)
PARAMS = {
    "w1": 0.7 * randn(TASKS, INPUTS, HIDDEN, seed=2),
    "b1": randn(TASKS, HIDDEN, seed=3),
    "w2": 0.7 * randn(TASKS, HIDDEN, CLASSES, seed=4),
    "scale": 1 + 0.1 * randn(TASKS, seed=5),
}
SIZE = sum(p[0].numel() for p in PARAMS.values())
LOSSES = {  # of one task's outputs, with the targets of all tasks
    "cross-entropy": (F.cross_entropy, LABELS),
    "squared error": (F.mse_loss, TARGETS),
    "neither": (lambda z, y: z.logsumexp(-1).square().mean() + (z - y).pow(4).mean(), TARGETS),
}


def network(params, x):
    return params["scale"] * (torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"])


def outputs(params):
    """z of all tasks, `[tasks, points, classes]`."""
    return torch.vmap(network)(params, X)


def loss_of(kind):
    """The loss of the outputs of all tasks, `[tasks]`."""
    loss, targets = LOSSES[kind]
    return lambda z: torch.vmap(loss)(z, targets)


def parts_of(kind):
    return LossParts(PARAMS, outputs, loss_of(kind))


def of_task(function, task):
    """One task's flat parameters, and `function` of a dict of them as one of the flat vector."""
    one = {name: p[task : task + 1] for name, p in PARAMS.items()}

    def of_flat(vector):
        return function({name: p[0] for name, p in unflatten(vector.unsqueeze(0), one).items()})

    return flatten(one)[0], of_flat


def loss_of_task(kind, task):
    """One task's flat parameters, and its loss as a function of them."""
    loss, targets = LOSSES[kind]
    return of_task(lambda p: loss(network(p, X[task]), targets[task]), task)
