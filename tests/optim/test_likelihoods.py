"""The natural gradient and K-FAC take the likelihood of the loss, and count examples as it does."""

import pytest
import torch
import torch.nn.functional as F
from curvature_by_hand import gauss_newton, kronecker_factored, output_hessian
from losses_of_likelihoods import EACH_KIND, FITTING, LABELS, M
from oracles import generator, randn, relative_error
from second_order import gradient_vector, vector
from torch import nn

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient

X = randn(M, 4, seed=1)
TOKENS = randn(M, 5, 4, seed=2)
TOKEN_LABELS = torch.arange(5 * M).reshape(M, 5).remainder(3)
KEPT = randn(M, 5, seed=3) > 0
PADDED = torch.where(KEPT, TOKEN_LABELS, -100)
EXACT = {"expectation": "exact", "momentum": 0.0, "kl_clip": None}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def by_token(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def factors(optimizer, model):
    states = (optimizer.state[model[i].weight] for i in (0, 2))
    return [state[key] for state in states for key in ("A", "G")]


def step(make, loss, data, **options):
    model = network()
    optimizer = make(model, loss, **options)
    optimizer.step(lambda: (model(data[0]), data[1]))
    return model, optimizer


@pytest.mark.parametrize("name", EACH_KIND)
def test_a_step_of_the_natural_gradient_is_the_dense_one(name):
    row = FITTING[name]
    model = network()
    curvature = gauss_newton(model, row.loss, X, row.targets)
    g = gradient_vector(row.loss(model(X), row.targets), model)
    damped = curvature + 0.1 * torch.eye(len(g)).double()
    expected = vector(model) - torch.linalg.solve(damped, g)
    options = {"damping": 0.1, "adapt_damping": False}
    moved, _ = step(NaturalGradient, row.loss, (X, row.targets), **options)
    assert relative_error(vector(moved), expected) < 1e-10


@pytest.mark.parametrize("name", EACH_KIND)
def test_the_factors_of_kfac_are_those_of_the_loss(name):
    """G ⊗ A of each layer, with the weights of the examples in both."""
    row = FITTING[name]
    model, optimizer = step(KFAC, row.loss, (X, row.targets), lr=1e-9, **EXACT)
    weights = row.weights if row.weights.dim() == 1 else row.weights.sum(1)
    curvature = output_hessian(row.loss, network()(X).detach(), row.targets)
    expected = kronecker_factored(network(), curvature, X, weights)
    first_a, first_g, second_a, second_g = factors(optimizer, model)
    blocks = []
    for a, g in ((first_a, first_g), (second_a, second_g)):
        index = torch.arange(len(a) * len(g)).reshape(len(g), len(a))
        order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
        blocks.append(torch.kron(g, a)[order][:, order])
    assert relative_error(torch.block_diag(*blocks), expected) < 1e-12


@pytest.mark.parametrize("expectation", ["exact", "empirical"])
@pytest.mark.parametrize("make", [KFAC, NaturalGradient])
def test_padded_tokens_do_not_count(make, expectation):
    """Neither in the curvature of the outputs nor in the inputs of the layers."""
    options = {"damping": 0.3, "expectation": expectation}
    padded, _ = step(make, by_token, (TOKENS, PADDED), **options)
    kept, _ = step(make, F.cross_entropy, (TOKENS[KEPT], TOKEN_LABELS[KEPT]), **options)
    assert relative_error(vector(padded), vector(kept)) < 1e-12


@pytest.mark.parametrize("make", [KFAC, NaturalGradient])
def test_an_example_of_weight_two_counts_as_two_examples(make):
    weights = torch.tensor([1.0, 2.0, 1.0, 3.0, 0.0, 1.0]).double()

    def weighted(z, y):
        return (weights * F.cross_entropy(z, y, reduction="none")).sum() / weights.sum()

    copies = weights.long()
    repeated = (X.repeat_interleave(copies, 0), LABELS.repeat_interleave(copies))
    options = {"damping": 0.3, "expectation": "exact"}
    once, _ = step(make, weighted, (X, LABELS), **options)
    again, _ = step(make, F.cross_entropy, repeated, **options)
    assert relative_error(vector(once), vector(again)) < 1e-12


def test_drawn_targets_count_as_the_loss_counts_examples():
    """G of the last layer is Σ wᵢ (pᵢ − e_y)(pᵢ − e_y)ᵀ for the draws y."""
    row = FITTING["class weights"]
    model, optimizer = step(KFAC, row.loss, (X, row.targets), seed=4)
    draws = generator(int(torch.randint(2**62, (), generator=generator(4))))
    p = network()(X).detach().softmax(-1)
    y = torch.multinomial(p, 1, generator=draws)[:, 0]
    scores = p - F.one_hot(y, 3)
    expected = scores.T @ (row.weights[:, None] * scores)
    assert relative_error(optimizer.state[model[2].weight]["G"], expected) < 1e-12


def test_the_weights_of_every_batch_are_its_own():
    """The likelihood is verified at the first step, and a later batch ignores other labels."""
    ends = []
    for padded in (True, False):
        model = network()
        optimizer = KFAC(model, F.cross_entropy, update_every=1, invert_every=1, **EXACT)
        for count in (6, 2, 4):
            keep = torch.arange(M) < count
            x, y = (X, torch.where(keep, LABELS, -100)) if padded else (X[keep], LABELS[keep])
            optimizer.step(lambda model=model, x=x, y=y: (model(x), y))
        ends.append(vector(model))
    assert relative_error(*ends) < 1e-12


@pytest.mark.parametrize("make", [KFAC, NaturalGradient])
def test_classes_on_the_second_axis_take_the_step_of_classes_on_the_last(make):
    ends = []
    for swaps in (False, True):
        model = network()

        def closure(model=model, swaps=swaps):
            z = model(TOKENS)
            return z.mT if swaps else z, PADDED

        make(model, F.cross_entropy if swaps else by_token, expectation="exact").step(closure)
        ends.append(vector(model))
    assert relative_error(*ends) < 1e-12


@pytest.mark.parametrize("make", [GaussNewton, NaturalGradient, KFAC])
def test_log_probabilities_take_the_step_of_logits(make):
    ends = []
    for tail, loss in (((), F.cross_entropy), ((nn.LogSoftmax(-1),), F.nll_loss)):
        model = nn.Sequential(*network(), *tail)
        options = {} if make is GaussNewton else {"expectation": "exact"}
        optimizer = make(model, loss, damping=0.1, **options)
        for _ in range(3):
            optimizer.step(lambda model=model: (model(X), LABELS))
        ends.append(vector(model))
    assert relative_error(*ends) < 1e-10


class Horizons(nn.Module):
    """Outputs `[m, 2, 3]` of one layer, which sees one row for each example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 6).double()

    def forward(self, x):
        return self.layer(x).unflatten(1, (2, 3))


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("expectation", ["exact", "empirical"])
def test_positions_that_one_row_reaches_have_no_cross_terms(expectation, swaps):
    """G = Σᵢ diag over the positions of w F, or of w (p − e_y)(p − e_y)ᵀ, w = 1/(2m)."""
    labels = TOKEN_LABELS[:, :2]
    model = Horizons()
    loss = F.cross_entropy if swaps else by_token

    def closure():
        z = model(X)
        return z.mT if swaps else z, labels

    optimizer = KFAC(model, loss, expectation=expectation)
    optimizer.step(closure)
    expected = torch.zeros(2, 3, 2, 3).double()
    p = Horizons()(X).detach().softmax(-1)
    for i in range(M):
        for t in range(2):
            score = p[i, t] - F.one_hot(labels[i, t], 3)
            fisher = torch.diag(p[i, t]) - torch.outer(p[i, t], p[i, t])
            block = fisher if expectation == "exact" else torch.outer(score, score)
            expected[t, :, t] += block / (2 * M)
    actual = optimizer.state[model.layer.weight]["G"]
    assert relative_error(actual, expected.reshape(6, 6)) < 1e-12


def test_more_positions_than_passes_are_refused():
    model = nn.Sequential(nn.Linear(4, 1100), nn.Unflatten(1, (1100, 1))).double()
    optimizer = KFAC(model, F.mse_loss, expectation="exact")
    with pytest.raises(ValueError, match=r"takes 1100 backward passes.*'monte-carlo'"):
        optimizer.step(lambda: (model(X), torch.zeros(M, 1100, 1).double()))
