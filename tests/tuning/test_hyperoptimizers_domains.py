"""The ranges of a tower's hyperparameters: their domains, and what is finite at the edges."""

import pytest
import torch
from torch import nn
from tower_network import learnt, learnt_values, network, parameter, step_with, train

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Box, Interval
from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam, AdamW, RMSProp


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_a_decay_can_be_learnt_from_zero_if_its_domain_contains_zero(name):
    """dℓ/dμ = −0.1 b g with b = 1 after the second step, dℓ/dλ = −0.1 θ g with θ = 1 after one."""
    tower = SGD(
        0.1,
        optimizer=SGD(1.0),
        learn=(name,),
        domains={name: Box(0.0, 0.99)},
    )
    optimizer = Hyperoptimizer([parameter(1.0)], tower)
    expected = {"momentum": [0.0, 0.0, 0.1], "weight_decay": [0.0, 0.1]}[name]
    for value in expected:
        step_with(optimizer, 1.0)
        assert learnt(optimizer, name).item() == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("level", [AdaGrad, RMSProp, Adam, AdamW])
def test_zero_gradients_give_finite_hypergradients(level):
    """Coordinates without a gradient, as of a dead unit, do not make any derivative infinite."""
    w = nn.Parameter(torch.ones(4))
    learn = tuple(name for name in level().initial_values if name != "weight_decay")
    optimizer = Hyperoptimizer([w], level(optimizer=SGD(1e-4), learn=learn))
    for _ in range(3):
        optimizer.zero_grad()
        (w[:2] ** 2).sum().backward()
        optimizer.step()
    assert all(x.isfinite().all() for x in learnt_values(optimizer).values())
    assert (w.detach()[2:] >= 0.99).all()


def test_hyperparameters_stay_in_their_domains():
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), Adam(0.5, optimizer=SGD(2.0)))
    train(model, optimizer, 20)
    assert learnt(optimizer) >= 0
    for name in ("beta1", "beta2"):
        assert 0 < learnt(optimizer, name) < 1
        assert optimizer.tower.domain(name) == Interval(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interval_keeps_apart_from_its_bounds_in_every_precision(dtype):
    interval = Interval(0, 1)
    far = interval.project(torch.tensor([-1e3, 1e3], dtype=dtype))
    value = interval.value(far)
    assert value.tolist() == pytest.approx([0, 1], abs=2e-7)
    assert ((value > 0) & (value < 1)).all()


def test_a_step_size_stops_at_zero_and_can_rise_again():
    """dℓ/dlr = −g g₋ = 2, −1, −1/8 at the steps after the first."""
    w = parameter(1.0)
    optimizer = Hyperoptimizer([w], SGD(1.5, optimizer=SGD(1.0)))
    trajectory = []
    for gradient in (1.0, -2.0, -0.5, -0.25):
        step_with(optimizer, gradient)
        trajectory.append((learnt(optimizer).item(), w.item()))
    assert trajectory == [(1.5, -0.5), (0.0, -0.5), (1.0, 0.0), (1.125, 0.28125)]
