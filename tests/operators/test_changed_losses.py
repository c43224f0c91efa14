"""What is known of a loss is forgotten once the loss changes."""

from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.loss_state import LossState
from metaimplicit.optim import KFAC, NaturalGradient

GAMMA = 0.0


class Focal(nn.Module):
    """−mean (1 − p)^γ log p of the labels: cross-entropy at γ = 0, and no likelihood beyond."""

    def __init__(self):
        super().__init__()
        self.gamma = 0.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, z, y):
        losses = F.cross_entropy(self.scale * z, y, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()


class Callable:
    def __init__(self):
        self.options = {"gamma": [0.0]}

    def __call__(self, z, y):
        return focal(z, y, self.options["gamma"][0])


class OfAGlobal:
    def __call__(self, z, y):
        return focal(z, y, GAMMA)


def focal(z, y, gamma):
    loss = Focal()
    loss.gamma = gamma
    return loss(z, y)


def of_a_module():
    loss = Focal()
    return loss, partial(setattr, loss, "gamma", 3.0)


def of_a_buffer_written_to():
    loss = Focal()
    return loss, lambda: loss.scale.mul_(3.0)


def of_a_buffer_replaced():
    loss = Focal()
    return loss, lambda: setattr(loss, "scale", torch.tensor(3.0))


def of_a_closure():
    gamma = 0.0

    def loss(z, y):
        return focal(z, y, gamma)

    def change():
        nonlocal gamma
        gamma = 3.0

    return loss, change


def of_a_helper_in_a_closure():
    settings = SimpleNamespace(gamma=0.0)

    def losses(z, y):
        return focal(z, y, settings.gamma)

    return lambda z, y: losses(z, y), partial(setattr, settings, "gamma", 3.0)


def of_a_callable_object():
    loss = Callable()
    return loss, lambda: loss.options["gamma"].__setitem__(0, 3.0)


def of_a_bound_method():
    loss = Callable()
    return loss.__call__, lambda: loss.options.update(gamma=[3.0])


def of_a_partial():
    loss = partial(focal, gamma=0.0)
    return loss, lambda: loss.keywords.update(gamma=3.0)


def of_a_deque():
    recent = deque([0.0])
    return lambda z, y: focal(z, y, recent[-1]), lambda: recent.append(3.0)


def of_a_global():
    return OfAGlobal(), lambda: globals().update(GAMMA=3.0)


HOLDERS = [
    of_a_module,
    of_a_buffer_written_to,
    of_a_buffer_replaced,
    of_a_closure,
    of_a_helper_in_a_closure,
    of_a_callable_object,
    of_a_bound_method,
    of_a_partial,
    of_a_deque,
    of_a_global,
]


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_change_is_seen_wherever_the_loss_holds_it(holder, monkeypatch):
    monkeypatch.setitem(globals(), "GAMMA", 0.0)
    loss, change = holder()
    state = LossState(loss)
    loss(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert not state.has_changed()
    change()
    assert state.has_changed()


def test_a_tensor_replaced_by_one_at_its_address_is_a_change():
    loss = Focal()
    state = LossState(loss)
    for value in range(5):
        del loss.scale
        loss.register_buffer("scale", torch.tensor(float(value)))
        assert state.has_changed()


X = torch.randn(2, 10, 4)
Y = (torch.arange(10) % 5).repeat(2, 1)
NO_LIKELIHOOD = "got a loss that is −log p of no"


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_learner_refuses_a_loss_once_it_has_no_likelihood(method):
    loss = Focal()
    learner = MetaLearner(nn.Linear(4, 5), loss, inner=GradientDescent(steps=1), method=method)
    learner.backward(((X, Y), (X, Y)))
    loss.gamma = 3.0
    with pytest.raises(ValueError, match=NO_LIKELIHOOD):
        learner.backward(((X, Y), (X, Y)))


@pytest.mark.parametrize("optimizer", [NaturalGradient, KFAC])
def test_an_optimiser_refuses_a_loss_once_it_has_no_likelihood(optimizer):
    loss = Focal()
    model = nn.Linear(4, 5)
    steps = optimizer(model, loss, damping=1.0)
    steps.step(lambda: (model(X[0]), Y[0]))
    loss.scale.mul_(3.0)
    with pytest.raises(ValueError, match=NO_LIKELIHOOD):
        steps.step(lambda: (model(X[0]), Y[0]))
