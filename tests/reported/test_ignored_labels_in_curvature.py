"""Examples count in the curvature as they count in the loss: not if ignored, more if weighted."""

from functools import partial

import pytest
import torch
from reported.helpers import assert_same
from torch import nn
from torch.nn import functional as F

from metaimplicit import Dense, GradientDescent, Implicit, hypergradient, tuning_problem
from metaimplicit.operators import Fisher
from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient
from metaimplicit.tuning import WeightDecay

Empirical = partial(Fisher, expectation="empirical")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def padded_and_kept():
    """The same data twice: with 30 labels that F.cross_entropy ignores, and without them."""
    inputs = torch.randn(40, 4)
    labels = torch.randint(0, 3, (40,))
    keep = torch.arange(40) < 10
    return (inputs, torch.where(keep, labels, -100)), (inputs[keep], labels[keep])


def step_taken(optimizer, data, loss=F.cross_entropy, **options):
    model = network()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer(model, loss, damping=1.0, **options).step(lambda: (model(data[0]), data[1]))
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (GaussNewton, {}),
        (NaturalGradient, {}),
        (NaturalGradient, {"expectation": "empirical"}),
        (KFAC, {"expectation": "exact", "kl_clip": None}),
    ],
    ids=["GaussNewton", "NaturalGradient", "NaturalGradient-empirical", "KFAC"],
)
def test_optimizers_step_as_without_the_ignored_examples(optimizer, options):
    padded, kept = padded_and_kept()
    assert_same(step_taken(optimizer, padded, **options), step_taken(optimizer, kept, **options))


def test_the_fisher_matrix_of_weighted_cross_entropy_is_its_gauss_newton_matrix():
    # Of −w_y log softmax(z)_y both are Jᵀ w_y (diag p − p pᵀ) J, averaged as the loss is.
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    _, data = padded_and_kept()
    assert_same(step_taken(NaturalGradient, data, loss), step_taken(GaussNewton, data, loss))


def implicit_gradient(method, data):
    problem, meta, _ = tuning_problem(network(), F.cross_entropy, [WeightDecay(start=1.0)])
    result = hypergradient(problem, meta, data, inner=GradientDescent(), method=method)
    return result.grads["weight_decay"]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Implicit(Dense(), curvature="gauss-newton"), id="gauss-newton"),
        pytest.param(Implicit(Dense(), curvature=Fisher), id="Fisher"),
        pytest.param(Implicit(Dense(), curvature=Empirical), id="Fisher-empirical"),
        "kfac",
        "ekfac",
    ],
)
def test_implicit_gradients_are_those_without_the_ignored_examples(method):
    padded, kept = padded_and_kept()
    assert_same(implicit_gradient(method, padded), implicit_gradient(method, kept))
