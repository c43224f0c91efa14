"""A small run on sinusoid tasks, whose parts can be built again."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import tasks
from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.models import MLP
from metaimplicit.training import Budget, fit


class Noise(torch.nn.Module):
    """Draws from torch's generator, so that a run depends on the random state too."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Parts(NamedTuple):
    """What `fit` takes first."""

    learner: MetaLearner
    optimizer: torch.optim.Optimizer
    sampler: object


def make_parts(noisy=True, **options):
    """The parts of a run, equal each time."""
    torch.manual_seed(7)
    model = MLP(1, 1, hidden=(8,))
    if noisy:
        model = torch.nn.Sequential(Noise(), model)
    defaults = {
        "inner": GradientDescent(2, lr=0.01),
        "method": "unrolled",
        "learn": ("lr",),
        "vectorize": "vmap",
    }
    learner = MetaLearner(model, F.mse_loss, **(defaults | options))
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    return Parts(learner, optimizer, make_sampler(tasks_per_batch=4, seed=3, split="train"))


def make_sampler(tasks_per_batch, seed, split="test"):
    family = getattr(tasks.load("sinusoid", shots=5, queries=5), split)
    return tasks.EpisodeSampler(family, tasks=tasks_per_batch, seed=seed)


def train(out, parts, steps=6, **options):
    return fit(*parts, out=out, budget=Budget(steps=steps), bar=False, **options)


def no_decay(spent):
    return 1.0


def weights(learner):
    return {name: value.detach().clone() for name, value in learner.state_dict().items()}


def assert_same_weights(learner, expected):
    """The learner's weights are those of another learner, or these, to the bit."""
    if not isinstance(expected, dict):
        expected = weights(expected)
    for name, value in weights(learner).items():
        assert torch.equal(value, expected[name]), name
