"""Classification of 9 examples into 3 classes, with models of a few parameters."""

import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import hypergradient, tuning_problem
from metaimplicit.problem import Stream


def network(seed=0, hidden=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def softmax_regression():
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def batch(n, seed):
    """n examples with labels 0, 1, 2, 0, …, in a random order of their numbers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    index = torch.randperm(n, generator=generator)
    return {"inputs": inputs, "targets": torch.arange(n) % 3, "index": index}


TRAIN = batch(9, 0)
VALIDATION = batch(6, 1)
MODEL = network()
PARAMS = {name: p.detach() for name, p in MODEL.named_parameters()}


def make_problem(*variables, model=MODEL, **options):
    """The tuning problem of a model with cross-entropy."""
    return tuning_problem(model, F.cross_entropy, variables, **options)


def stream(steps):
    """The training batch for each inner step, then the validation batch."""
    return Stream(lambda t: TRAIN if t < steps else VALIDATION)


def random_like(meta, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(m.shape, generator=generator, dtype=m.dtype) for name, m in meta.items()
    }


def moved(meta, direction, length=1.0):
    """φ + length · direction."""
    return {name: m + length * direction[name] for name, m in meta.items()}


def slope(grads, direction):
    """The derivative along a direction."""
    return sum((grads[name] * d).sum().item() for name, d in direction.items())


def difference_quotient(problem, meta, inner, direction, h=1e-5):
    """The slope of the outer loss after the inner loop, by central differences."""

    def outer_loss(length):
        point = moved(meta, direction, length)
        data = stream(inner.steps)
        return hypergradient(problem, point, data, inner=inner, method="unrolled").outer_loss.item()

    return (outer_loss(h) - outer_loss(-h)) / (2 * h)
