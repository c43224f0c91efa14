"""A loss may change between two calls: what was verified of it has to hold at the present one."""

import pytest
import torch
import torch.nn.functional as F
from curvature_by_hand import gauss_newton, parts_of
from losses_of_likelihoods import LABELS, TARGETS, M
from oracles import dense, randn, relative_error
from torch import nn

from metaimplicit.operators import Fisher, KroneckerFactored

X = randn(M, 4, seed=1)
ONE_HOT = F.one_hot(LABELS, 3).double()


class Changing(nn.Module):
    """A loss of the user's own, with a number that is learnt or annealed."""

    def __init__(self, function, number):
        super().__init__()
        self.function = function
        self.number = number

    def forward(self, z, y):
        return self.function(z, y, self.number)


def tempered(z, y, t):
    return F.cross_entropy(z * t, y)


def focal(z, y, gamma):
    losses = F.cross_entropy(z, y, reduction="none")
    return ((1 - (-losses).exp()) ** gamma * losses).mean()


def penalised(z, y, strength):
    return F.cross_entropy(z, y) + strength * z.square().mean()


def smooth_l1(z, y, weight):
    return (1 - weight) * F.mse_loss(z, ONE_HOT) + weight * F.smooth_l1_loss(z, ONE_HOT)


def clamped(z, y, bound):
    return F.cross_entropy(z.clamp(-bound, bound), y)


def poisson(z, y, weight):
    return (1 - weight) * F.cross_entropy(z, y) + weight * F.poisson_nll_loss(z, ONE_HOT)


# A function, its number at first, and a later one for which there is no likelihood.
CHANGES = {
    "temperature": (tempered, 1.0, 0.3),
    "focal": (focal, 0.0, 2.0),
    "penalty": (penalised, 0.0, 0.01),
    "robust": (smooth_l1, 0.0, 1.0),
    "another loss": (poisson, 0.0, 1.0),
    "clamped at the model's outputs alone": (clamped, 1e4, 10.0),
}


def network(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


@pytest.mark.parametrize("kind", [Fisher, KroneckerFactored])
@pytest.mark.parametrize("name", CHANGES)
def test_a_loss_that_has_no_likelihood_any_more_is_refused(name, kind):
    function, first, later = CHANGES[name]
    loss = Changing(function, first)
    model = network(scale=30.0 if function is clamped else 1.0)
    parts = parts_of(model, loss, X, LABELS)
    kind.from_loss(parts)

    loss.number = later
    with pytest.raises(ValueError, match="of no softmax, gaussian, sigmoid likelihood"):
        kind.from_loss(parts)

    loss.number = first
    kind.from_loss(parts)  # A refusal is not remembered, either.


def test_losses_of_several_likelihoods_take_turns():
    checked = {}
    model = network()
    for _ in range(2):
        for loss, y in ((F.cross_entropy, LABELS), (F.mse_loss, TARGETS)):
            fisher = Fisher.from_loss(parts_of(model, loss, X, y, checked))
            expected = gauss_newton(model, loss, X, y)
            assert relative_error(dense(fisher)[0], expected) < 1e-12


def test_a_first_batch_that_the_loss_ignores_decides_nothing():
    """As where no pseudo-label is confident enough yet."""
    checked = {}
    model = network()

    def confident(z, y):
        return (keep[:, None] * (z - y).square()).sum()

    for count in (0, 4):
        keep = (torch.arange(M) < count).double()
        fisher = Fisher.from_loss(parts_of(model, confident, X, TARGETS, checked))
        expected = gauss_newton(model, confident, X, TARGETS)
        assert (dense(fisher)[0] - expected).norm() <= 1e-12 * expected.norm()
