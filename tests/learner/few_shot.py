"""A small few-shot problem in float64: its batch of tasks, its network and its learner."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, randn
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from metaimplicit import GradientDescent, MetaLearner

TASKS = 2
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
        "inner": GradientDescent(steps=2, lr=0.3),
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


def query_loss_at(learner, parameters, values):
    """The mean query loss after adaptation, with parameters set to values for the while."""
    parameters = list(parameters)
    with torch.no_grad():
        before = parameters_to_vector(parameters).clone()
        vector_to_parameters(values, parameters)
        loss = learner.evaluate(draw_episodes())[0][-1].mean()
        vector_to_parameters(before, parameters)
    return loss


def assert_gradients_match_differences(learner, parameters):
    """Their `.grad` along a random direction is the difference quotient of the query loss.

    No two parts of a random direction are alike, so that the error of any parameter shows.
    """
    parameters = list(parameters)
    start = parameters_to_vector(parameters).detach().clone()
    direction = randn(len(start), seed=7)
    expected = finite_difference(
        lambda values: query_loss_at(learner, parameters, values), start, direction
    )
    slope = float(parameters_to_vector(p.grad for p in parameters) @ direction)
    assert slope == pytest.approx(float(expected), rel=1e-6, abs=1e-10)
