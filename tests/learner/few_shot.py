"""A small few-shot problem in float64: its batch of tasks, its network and its learner."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, randn
from torch import nn

from metaimplicit import GradientDescent, MetaLearner

TASKS = 3
WAYS = 4
QUERIES = 2
INPUTS = 6


def draw_episodes(seed=0, tasks=TASKS):
    """A batch of tasks with one support example and two query examples of each class."""
    labels = torch.arange(WAYS)
    return SimpleNamespace(
        support=(randn(tasks, WAYS, INPUTS, seed=seed), labels.expand(tasks, -1)),
        query=(
            randn(tasks, WAYS * QUERIES, INPUTS, seed=seed + 1),
            labels.repeat(QUERIES).expand(tasks, -1),
        ),
    )


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, WAYS)).double()


def make_learner(model=None, **options):
    defaults = {
        "inner": GradientDescent(steps=3, lr=0.3),
        "method": "cg",
        "proximal": 0.5,
        "vectorize": "vmap",
    }
    model = make_network() if model is None else model
    return MetaLearner(model, F.cross_entropy, **(defaults | options))


class LinearModel(nn.Module):
    """One linear layer; subclasses change what their forward pass does with it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, WAYS).double()


def query_loss_at(learner, parameter, value):
    """The mean query loss after adaptation, with one parameter set to a value for the while."""
    with torch.no_grad():
        before = parameter.clone()
        parameter.copy_(value)
        loss = learner.evaluate(draw_episodes())[0][-1].mean()
        parameter.copy_(before)
    return loss


def assert_gradient_matches_differences(learner, parameter, direction):
    """The parameter's `.grad` along `direction` is the difference quotient of the query loss."""
    expected = finite_difference(
        lambda value: query_loss_at(learner, parameter, value),
        parameter.detach().clone(),
        direction,
    )
    slope = float((parameter.grad * direction).sum())
    assert slope == pytest.approx(float(expected), rel=1e-6, abs=1e-10)
