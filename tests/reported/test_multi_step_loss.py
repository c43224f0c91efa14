"""MAML++ (Antoniou et al. 2019): a loss of all iterates, and step sizes by layer and by step."""

import pytest
from reported.helpers import STEPS, assert_learns, descend, draw, plain_maml, split
from torch import nn

from metaimplicit import GradientDescent, Unrolled

LAYERS = {"weight": 0.1, "bias": 0.01}
SIZES = [0.1, 0.03, 0.01]


def by_layer(loss, start):
    return descend(loss, start, rate=lambda step, name: LAYERS[name])


def by_step(loss, start):
    return descend(loss, start, rate=lambda step, name: SIZES[step])


def test_the_learner_takes_the_mean_query_loss_of_all_iterates():
    model = nn.Linear(4, 5)
    episodes = draw()
    expected = plain_maml(model, split(episodes), last=STEPS + 1)
    assert_learns(expected, model, episodes, method=Unrolled(iterates=True))


@pytest.mark.parametrize(
    ("lr", "plain"),
    [(LAYERS, by_layer), (SIZES, by_step)],
    ids=["layer", "step"],
)
def test_the_learner_takes_a_step_size_of_each_layer_or_each_step(lr, plain):
    model = nn.Linear(4, 5)
    episodes = draw()
    expected = plain_maml(model, split(episodes), descend=plain)
    assert_learns(expected, model, episodes, inner=GradientDescent(steps=STEPS, lr=lr))
