"""The padding row of nn.Embedding(padding_idx=…) is never trained, under vmap as in a loop."""

import pytest
import torch
from reported.helpers import (
    assert_hypergradient,
    assert_learns,
    draw,
    plain_maml,
    split,
)
from torch import nn


def network_and_words():
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=0), nn.Flatten(), nn.Linear(24, 5))
    return model, draw(tasks=2, inputs=lambda *shape: torch.randint(0, 3, (*shape, 4)))


@pytest.mark.parametrize("vectorize", ["loop", "vmap", "auto"])
def test_the_learner_leaves_the_padding_row_of_every_task_alone(vectorize):
    model, episodes = network_and_words()
    expected = plain_maml(model, split(episodes))
    learner = assert_learns(expected, model, episodes, vectorize=vectorize)
    adapted = learner.adapt(episodes.support, batched=True).params["0.weight"]
    assert torch.equal(adapted[:, 0], torch.zeros(2, 6))


def test_hypergradient_leaves_the_padding_row_of_every_task_alone():
    model, episodes = network_and_words()
    result = assert_hypergradient(plain_maml(model, split(episodes)), model, episodes)
    assert torch.equal(result.params["0.weight"][:, 0], torch.zeros(2, 6))
