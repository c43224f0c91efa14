"""The smallest problems: parameters without axes, one of each thing, one class."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.methods import make_method

SOLVED = ("cg", "dense", "auto", "lanczos", "minres", "fixed-point")


class Scale(nn.Module):
    """One parameter without axes, and with `bias` another with one."""

    def __init__(self, bias):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))
        self.b = nn.Parameter(torch.tensor([0.1])) if bias else 0.0

    def forward(self, x):
        return self.a * x + self.b


def regression(tasks, examples, width=1):
    def draw():
        return torch.randn(tasks, examples, width) / 2, torch.randn(tasks, examples, 1)

    return draw


def one_class():
    return torch.randn(2, 3, 2) / 2, torch.zeros(2, 3, dtype=torch.int64)


CASES = {  # a model, its loss, and its data
    "no axis": (lambda: Scale(bias=False), F.mse_loss, regression(2, 3)),
    "no axis beside one": (lambda: Scale(bias=True), F.mse_loss, regression(2, 3)),
    "one weight": (lambda: nn.Linear(1, 1, bias=False), F.mse_loss, regression(2, 3)),
    "one example": (lambda: nn.Linear(2, 1), F.mse_loss, regression(2, 1, 2)),
    "one task": (lambda: nn.Linear(2, 1), F.mse_loss, regression(1, 3, 2)),
    "one class": (lambda: nn.Linear(2, 1), F.cross_entropy, one_class),
    "one of everything": (lambda: Scale(bias=False), F.mse_loss, regression(1, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_the_smallest_problems_have_the_unrolled_gradient(name, vectorize):
    make_model, loss, draw = CASES[name]
    episodes = SimpleNamespace(support=draw(), query=draw())
    torch.manual_seed(0)
    model = make_model().double()
    episodes = SimpleNamespace(support=as_double(episodes.support), query=as_double(episodes.query))
    gradients = {}
    # Each solver meets each problem in one of the two ways, and the ways take turns.
    solvers = SOLVED[(list(CASES).index(name) + (vectorize == "loop")) % 2 :: 2]
    for flag in ("unrolled", *solvers):
        model.zero_grad()
        learner = MetaLearner(
            model,
            loss,
            inner=GradientDescent(steps=11, lr=0.08),
            method=make_method(flag),
            proximal=10.0,
            vectorize=vectorize,
        )
        learner.backward(episodes)
        gradients[flag] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for flag in solvers:
        assert torch.allclose(gradients[flag], gradients["unrolled"], rtol=1e-6, atol=1e-9), flag


def as_double(pair):
    inputs, targets = pair
    return inputs.double(), targets.double() if targets.is_floating_point() else targets
