"""Towers against the package that Chandra et al. published, gradient-descent-the-ultimate-optimizer 1.0.

Where its definitions are not the paper's, or not ours, the test says how it is brought to ours.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from gradient_descent_the_ultimate_optimizer import gdtuo
from torch import Tensor, nn

from metaimplicit import Domain, Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import SGD, Adam


@dataclass(frozen=True)
class Tanh(Domain):
    """The package squashes β by (tanh x + 1)/2, the sigmoid of 2x: its steps of β are 4 times those of a logit."""

    def value(self, free: Tensor) -> Tensor:
        return (free.tanh() + 1) / 2

    def free(self, value: Tensor) -> Tensor:
        return value.logit() / 2


BETAS = {"beta1": Tanh(), "beta2": Tanh()}
PAIRS = {
    "SGD/SGD": (SGD(0.1, optimizer=SGD(0.01)), lambda: gdtuo.SGD(0.1, optimizer=gdtuo.SGD(0.01))),
    "SGD/SGD/SGD": (
        SGD(0.1, optimizer=SGD(0.01, optimizer=SGD(0.01))),
        lambda: gdtuo.SGD(0.1, optimizer=gdtuo.SGD(0.01, optimizer=gdtuo.SGD(0.01))),
    ),
    "Adam/SGD": (
        Adam(1e-3, optimizer=SGD(1e-4), domains=BETAS),
        lambda: gdtuo.Adam(optimizer=gdtuo.SGD(1e-4)),
    ),
}
OURS_TO_THEIRS = {"lr": "alpha", "beta1": "beta1", "beta2": "beta2"}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def loss(call, step):
    draws = torch.Generator().manual_seed(step)
    inputs = torch.randn(32, 8, generator=draws)
    return F.cross_entropy(call(inputs), inputs[:, :4].argmax(1))


def levels(optimizer):
    while not isinstance(optimizer, gdtuo.NoOpOptimizer):
        yield optimizer.parameters
        optimizer = optimizer.optimizer


@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_are_those_of_the_published_package(name):
    """100 steps: every weight and every hyperparameter of every level at each, to 1e-5."""
    tower, make = PAIRS[name]
    ours, published = network(), make()
    theirs = gdtuo.ModuleWrapper(network(), optimizer=published)
    optimizer = Hyperoptimizer(ours.parameters(), tower)
    theirs.initialize()
    if (
        name == "Adam/SGD"
    ):  # the package starts v at ε, so that √v has a derivative at 0; ours starts at 0
        published.cache = {
            n: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            for n, p in ours.named_parameters()
        }
    for step in range(100):
        theirs.begin()
        value = loss(theirs.forward, step)
        theirs.zero_grad()
        value.backward()
        theirs.step()
        optimizer.zero_grad()
        loss(ours, step).backward()
        optimizer.step()
        for (key, a), b in zip(ours.named_parameters(), theirs.parameters.values(), strict=True):
            torch.testing.assert_close(
                a.detach(), b.detach(), rtol=1e-5, atol=1e-5, msg=f"{key}, step {step}"
            )
        found = [h for h in optimizer.hyperparameters[0] if h]
        for level, expected in zip(found, levels(published), strict=False):
            for key, value in level.items():
                other = expected[OURS_TO_THEIRS[key]].detach()
                other = gdtuo.Adam.clamp(other) if key.startswith("beta") else other
                torch.testing.assert_close(
                    value, other, rtol=1e-5, atol=1e-5, msg=f"{key}, step {step}"
                )
    moved = optimizer.hyperparameters[0][0]["lr"].item() / tower.lr
    assert abs(moved - 1) > 0.1
    assert len(found) == name.count("/")
