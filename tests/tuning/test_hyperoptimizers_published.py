"""Towers against the package of Chandra et al. 2022, gradient-descent-the-ultimate-optimizer 1.0.

Where the package differs from the paper or from ours, the test says how it is made equal.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from gradient_descent_the_ultimate_optimizer import gdtuo
from torch import Tensor, nn
from torch.testing import assert_close

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Domain
from metaimplicit.tuning.hyperoptimizers import SGD, Adam


@dataclass(frozen=True)
class Tanh(Domain):
    """The package has β = (tanh z + 1)/2, which is sigmoid(2z).

    Its steps of β are therefore four times as long as those of a logit.
    """

    def value(self, free: Tensor) -> Tensor:
        return (free.tanh() + 1) / 2

    def free(self, value: Tensor) -> Tensor:
        return value.logit() / 2


TOWERS = {
    "SGD/SGD/SGD": (
        SGD(0.1, optimizer=SGD(0.01, optimizer=SGD(0.01))),
        lambda: gdtuo.SGD(0.1, optimizer=gdtuo.SGD(0.01, optimizer=gdtuo.SGD(0.01))),
    ),
    "Adam/SGD": (
        Adam(
            1e-3,
            optimizer=SGD(1e-4),
            domains={"beta1": Tanh(), "beta2": Tanh()},
        ),
        lambda: gdtuo.Adam(optimizer=gdtuo.SGD(1e-4)),
    ),
}
PUBLISHED_NAMES = {"lr": "alpha", "beta1": "beta1", "beta2": "beta2"}


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def loss(model, step):
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(inputs), inputs[:, :4].argmax(1))


def published_levels(optimizer):
    """The hyperparameters of each level of a tower of the package."""
    while not isinstance(optimizer, gdtuo.NoOpOptimizer):
        yield optimizer.parameters
        optimizer = optimizer.optimizer


def published_value(parameters, name):
    value = parameters[PUBLISHED_NAMES[name]].detach()
    return gdtuo.Adam.clamp(value) if name.startswith("beta") else value


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_trajectories_are_those_of_the_published_package(name):
    """Every weight and every hyperparameter of every level at each of 50 steps, to 1e-5."""
    tower, make_published = TOWERS[name]
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), tower)
    published = make_published()
    wrapper = gdtuo.ModuleWrapper(network(), optimizer=published)
    wrapper.initialize()
    if name == "Adam/SGD":
        # The package starts v at ε, so that √v has a derivative at 0. Ours starts at 0.
        published.cache = {
            key: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            for key, p in model.named_parameters()
        }
    for step in range(50):
        wrapper.begin()
        value = loss(wrapper.forward, step)
        wrapper.zero_grad()
        value.backward()
        wrapper.step()

        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()

        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        pairs = zip(
            model.named_parameters(),
            wrapper.parameters.values(),
            strict=True,
        )
        for (key, p), other in pairs:
            message = f"{key}, step {step}"
            assert_close(p.detach(), other.detach(), **tolerance, msg=message)
        learnt = [values for values in optimizer.hyperparameters[0] if values]
        assert len(learnt) == name.count("/")
        for values, parameters in zip(learnt, published_levels(published), strict=False):
            for key, x in values.items():
                expected = published_value(parameters, key)
                message = f"{key}, step {step}"
                assert_close(x, expected, **tolerance, msg=message)
    moved = optimizer.hyperparameters[0][0]["lr"].item() / tower.lr
    assert abs(moved - 1) > 0.1
