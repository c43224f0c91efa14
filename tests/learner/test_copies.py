"""Copies and pickles of learners compute with their own model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from metaimplicit import GradientDescent, MetaLearner


class Network(nn.Module):
    """A frozen layer, a buffer and dropout before a layer that is trained."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.zeros(8))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.dropout(torch.relu(self.frozen(x) + self.shift)))


class Smoothed:
    """A loss that is no module, and has a class of its own."""

    smoothing = 0.1

    def __call__(self, outputs, labels):
        return F.cross_entropy(outputs, labels, label_smoothing=self.smoothing)


def draw_episodes():
    inputs = torch.randn(3, 6, 4)
    labels = torch.arange(3).repeat(2).expand(3, -1)
    return {"support": (inputs, labels), "query": (inputs + 0.1, labels)}


pytestmark = pytest.mark.usefixtures("float64")

INNER = GradientDescent(steps=2, lr=0.5)
LEARNERS = {
    "all adapt": {"inner": INNER},
    "the last layer adapts": {"inner": INNER, "adapt": "last.*", "vectorize": "loop"},
    "ridge": {"head": "ridge"},
    "prototypes": {"head": "prototypes", "vectorize": "loop"},
}


@pytest.mark.parametrize(
    ("name", "is_used"), [*((name, True) for name in LEARNERS), ("the last layer adapts", False)]
)
def test_a_copy_has_its_own_modes_buffers_and_frozen_parameters(name, is_used):
    learner = MetaLearner(Network(), F.cross_entropy, **LEARNERS[name])
    episodes = draw_episodes()
    if is_used:
        learner.backward(episodes)
    other = MetaLearner(Network(), F.cross_entropy, **LEARNERS[name]).eval()
    other.model.shift += 1

    clone = copy.deepcopy(learner)
    clone.load_state_dict(other.state_dict())
    clone.eval()
    expected, _ = other.evaluate(episodes)
    for _ in range(2):  # without dropout, twice the same
        losses, _ = clone.evaluate(episodes)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_used_learner_and_its_adapted_models_are_pickled(name):
    learner = MetaLearner(Network(), F.cross_entropy, **LEARNERS[name]).eval()
    episodes = draw_episodes()
    learner.backward(episodes)
    expected, _ = learner.evaluate(episodes)

    loaded = pickle.loads(pickle.dumps(learner))
    assert torch.equal(loaded.evaluate(episodes)[0], expected)
    file = io.BytesIO()
    torch.save(learner, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).evaluate(episodes)[0], expected)

    inputs, labels = episodes["support"]
    adapted = learner.adapt((inputs[0], labels[0]))
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(inputs[0]), adapted(inputs[0]))


class Showing(nn.Module):
    """It shows what is in front of a pruned layer, whose hook makes its weight an attribute."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)
        self.shown = None
        prune.random_unstructured(self.last, "weight", 0.5)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        self.shown = hidden.detach()
        return self.last(hidden)


@pytest.mark.parametrize("call", ["backward", "evaluate", "adapt", "predict"])
def test_a_learner_is_saved_whatever_a_model_keeps_of_a_forward_pass(call):
    learner = MetaLearner(Showing(), F.cross_entropy, inner=INNER, vectorize="vmap")
    episodes = draw_episodes()
    calls = {
        "backward": lambda: learner.backward(episodes),
        "evaluate": lambda: learner.evaluate(episodes),
        "adapt": lambda: learner.adapt(episodes["support"], batched=True),
        "predict": lambda: learner.adapt(episodes["support"], batched=True)(episodes["query"][0]),
    }
    calls[call]()
    assert 0 < (learner.model.last.weight == 0).double().mean() < 1
    loaded = pickle.loads(pickle.dumps(learner))
    assert torch.equal(loaded.evaluate(episodes)[0], learner.evaluate(episodes)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_used_learner_whose_loss_is_of_a_class_of_its_own_is_copied(copied):
    learner = MetaLearner(Network().eval(), Smoothed(), inner=INNER)
    episodes = draw_episodes()
    losses = learner.evaluate(episodes)[0]
    assert torch.equal(copied(learner).evaluate(episodes)[0], losses)
