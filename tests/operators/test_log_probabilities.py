"""A loss that is linear in log-probabilities has the curvature of cross-entropy in the logits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from curvature_by_hand import gauss_newton, jacobian, kronecker_factored, parts_of
from losses_of_likelihoods import IGNORED, LABELS, MASK, SOFT, TARGETS, M, V, W
from oracles import dense, randn, relative_error
from torch import nn

from metaimplicit import CG, GradientDescent, Implicit, argmin
from metaimplicit.operators import GGN, Diagonal, Fisher, Hessian, KroneckerFactored
from metaimplicit.problem import Composite, Proximal

X = randn(M, 4, seed=1)
ONES = torch.ones(M).double()
SIGNS = 2.0 * (LABELS == 1) - 1


class OwnLogSoftmax(nn.Module):
    def forward(self, z):
        return z - z.exp().sum(-1, keepdim=True).log()


class OneAgainstRest(nn.Module):
    """log p and log(1 − p) of one logit, side by side."""

    def forward(self, z):
        return torch.stack([F.logsigmoid(z[..., 0]), F.logsigmoid(-z[..., 0])], -1)


class LogOfSoftmax(nn.Module):
    def forward(self, z):
        return z.softmax(-1).log()


class MaskedLogSoftmax(nn.Module):
    """Log-probabilities that are zero for the examples that do not count."""

    def forward(self, z):
        return z.log_softmax(-1) * MASK[:, None]


class Picked(nn.Module):
    """A user's own: −log of the probability of the label, from log-probabilities."""

    def forward(self, log_p, y):
        return -log_p.exp().gather(1, y[:, None]).log().mean()


def masked(log_p, y):
    return -(MASK[:, None] * y * log_p).sum()


def smoothed(log_p, y):
    return -(0.9 * log_p.gather(1, y[:, None])[:, 0] + 0.1 * log_p.mean(-1)).mean()


def rewarded(log_p, y):
    """Policy gradient with rewards ≥ 0."""
    return -(log_p.gather(1, y[:, None])[:, 0] * V).mean()


LINEAR = {
    "nll": (nn.LogSoftmax(-1), F.nll_loss, LABELS, ONES / M),
    "nll, sum": (nn.LogSoftmax(1), nn.NLLLoss(reduction="sum"), LABELS, ONES),
    "nll, class weights": (
        nn.LogSoftmax(-1),
        nn.NLLLoss(weight=W),
        LABELS,
        W[LABELS] / W[LABELS].sum(),
    ),
    "nll, ignored labels": (nn.LogSoftmax(-1), F.nll_loss, IGNORED, (IGNORED >= 0) / 4),
    "divergence": (nn.LogSoftmax(-1), nn.KLDivLoss(reduction="batchmean"), SOFT, ONES / M),
    "divergence of logarithms": (
        nn.LogSoftmax(-1),
        nn.KLDivLoss(reduction="sum", log_target=True),
        SOFT.log(),
        ONES,
    ),
    "soft labels": (nn.LogSoftmax(-1), lambda z, y: -(y * z).sum(-1).mean(), SOFT, ONES / M),
    "label smoothing by hand": (OwnLogSoftmax(), smoothed, LABELS, ONES / M),
    "policy gradient": (OwnLogSoftmax(), rewarded, LABELS, V / M),
    "user's module": (OwnLogSoftmax(), Picked(), LABELS, ONES / M),
    "masked outputs": (MaskedLogSoftmax(), masked, SOFT, MASK),
    "logarithm of softmax": (LogOfSoftmax(), F.nll_loss, LABELS, ONES / M),
    "one against the rest": (OneAgainstRest(), F.nll_loss, (LABELS == 1).long(), ONES / M),
}


def network(tail=None):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers, *([] if tail is None else [tail])).double()


def curvature_in_logits(name):
    """Σ wᵢ (diag p − p pᵀ), or Σ wᵢ p (1 − p) of the one logit that is read."""
    weights = LINEAR[name][3]
    blocks = []
    for z, w in zip(network()(X).detach(), weights, strict=True):
        p = z.softmax(-1)
        block = torch.diag(p) - torch.outer(p, p)
        if name == "one against the rest":
            block = torch.diag(torch.tensor([1.0, 0.0, 0.0]).double())
            block *= z[0].sigmoid() * (1 - z[0].sigmoid())
        blocks.append(w * block)
    return torch.block_diag(*blocks)


def parts(name):
    tail, loss, targets, _ = LINEAR[name]
    return parts_of(network(tail), loss, X, targets)


@pytest.mark.parametrize("name", LINEAR)
def test_gauss_newton_fisher_and_the_diagonal_are_those_of_the_logits(name):
    J = jacobian(network(), X)
    expected = J.T @ curvature_in_logits(name) @ J
    assert relative_error(dense(GGN.from_loss(parts(name)))[0], expected) < 1e-12
    assert relative_error(dense(Fisher.from_loss(parts(name)))[0], expected) < 1e-12
    diagonal = Diagonal.from_loss(parts(name), samples=None)
    assert relative_error(diagonal.values[0], expected.diag()) < 1e-12


@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_stays_that_of_the_model_and_its_loss(name):
    from metaimplicit.params import flatten

    tail, loss, targets, _ = LINEAR[name]
    model = network(tail)
    expected = torch.autograd.grad(loss(model(X), targets), list(model.parameters()))
    gradient = flatten(GGN.from_loss(parts(name)).gradient)[0].detach()
    assert relative_error(gradient, torch.cat([g.flatten() for g in expected])) < 1e-12


@pytest.mark.parametrize(
    "name", ["nll, class weights", "nll, ignored labels", "masked outputs", "one against the rest"]
)
def test_kronecker_factors_are_those_of_the_logits(name):
    weights = LINEAR[name][3]
    expected = kronecker_factored(network(), curvature_in_logits(name), X, weights)
    assert relative_error(dense(KroneckerFactored.from_loss(parts(name)))[0], expected) < 1e-12


def test_classes_on_the_second_axis():
    """Log-probabilities `[m, classes, positions]`."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))).double()
    model = nn.Sequential(*logits, nn.LogSoftmax(1))
    labels = torch.stack([LABELS, IGNORED], 1)
    expected = gauss_newton(logits, F.cross_entropy, X, labels)
    for kind in (GGN, Fisher):
        operator = kind.from_loss(parts_of(model, F.nll_loss, X, labels))
        assert relative_error(dense(operator)[0], expected) < 1e-12


def test_outputs_that_are_equal_along_every_axis():
    """With as many examples as classes, Σ exp z = 1 holds along the examples too."""
    logits = nn.Linear(4, 3).double()
    nn.init.zeros_(logits.weight)
    nn.init.zeros_(logits.bias)
    model = nn.Sequential(logits, nn.LogSoftmax(-1))
    x, y = X[:3], torch.tensor([0, 1, 1])
    expected = gauss_newton(logits, F.cross_entropy, x, y)
    operator = GGN.from_loss(parts_of(model, F.nll_loss, x, y))
    assert relative_error(dense(operator)[0], expected) < 1e-12


def test_single_precision():
    tail, loss, targets, _ = LINEAR["nll"]
    operator = GGN.from_loss(parts_of(network(tail).float(), loss, X.float(), targets))
    J = jacobian(network(), X)
    expected = J.T @ curvature_in_logits("nll") @ J
    assert relative_error(dense(operator)[0].double(), expected) < 1e-5


def test_rewards_of_both_signs_are_not_convex():
    def loss(log_p, y):
        return -(log_p.gather(1, y[:, None])[:, 0] * (V - 0.9)).mean()

    operator = GGN.from_loss(parts_of(network(nn.LogSoftmax(-1)), loss, X, LABELS))
    with pytest.raises(ValueError, match="not convex in the outputs"):
        operator.check_convex()


class Product(nn.Module):
    def forward(self, z, y):
        return (z * y).sum()


class Unit(nn.Module):
    def forward(self, z):
        return F.normalize(z, dim=-1)


# a loss that is linear in outputs which are no log-probabilities

MISLEADING = {
    "log-sigmoid": (nn.LogSigmoid(), lambda z, y: -(y * z).sum(-1).mean(), SOFT),
    "l1": (nn.Identity(), F.l1_loss, TARGETS),
    "hinge": (nn.Identity(), lambda z, y: F.relu(1 - y[:, None] * z).mean(), SIGNS),
    "score": (nn.Tanh(), lambda z, y: -(y * z).mean(), TARGETS),
    "margin of log-probabilities": (
        nn.LogSoftmax(-1),
        lambda z, y: (z[:, 0] - z[:, 1]).mean(),
        LABELS,
    ),
    "masked outputs that the loss reads": (
        MaskedLogSoftmax(),
        lambda z, y: -(y * z).sum(),
        SOFT,
    ),
    "probability": (nn.Softmax(-1), lambda z, y: 1 - z.gather(1, y[:, None]).mean(), LABELS),
    "user's module": (
        nn.Softplus(),
        Product(),
        TARGETS,
    ),
    "cosine of unit outputs": (
        Unit(),
        lambda z, y: 1 - (z * y).sum(-1).mean(),
        TARGETS,
    ),
}


@pytest.mark.parametrize("name", MISLEADING)
@pytest.mark.parametrize("kind", [GGN, Diagonal])
def test_a_zero_matrix_whose_hessian_is_not_zero_comes_with_a_warning(name, kind):
    tail, loss, targets = MISLEADING[name]
    given = parts_of(network(tail), loss, X, targets)
    assert dense(Hessian.from_loss(given)).abs().max() > 1e-3
    with pytest.warns(RuntimeWarning, match="linear in the outputs.*curvature='hessian'"):
        operator = kind.from_loss(given)
    assert dense(operator).abs().max() == 0


@pytest.mark.parametrize("loss", [F.l1_loss, lambda z, y: F.relu(1 - y * z).mean()])
def test_a_model_that_is_linear_in_its_parameters_has_no_curvature_at_all(loss):
    model = nn.Linear(4, 3).double()
    given = parts_of(model, loss, X, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = GGN.from_loss(given)
    assert dense(operator).abs().max() == 0
    assert dense(Hessian.from_loss(given)).abs().max() == 0


def test_argmin_says_that_its_curvature_is_zero():
    model = network(nn.LogSigmoid())
    names = dict(model.named_parameters())
    fit = Composite(
        outputs=lambda params, meta, data: torch.func.functional_call(model, params, (data,)),
        loss=lambda z, data: -(SOFT * z).mean(),
        penalty=Proximal(1.0),
    )
    meta = {name: p.detach().requires_grad_() for name, p in names.items()}
    params = argmin(
        fit,
        lambda meta, data: dict(meta),
        meta,
        X,
        inner=GradientDescent(steps=40, lr=0.5),
        method=Implicit(CG(), curvature="gauss-newton"),
    )
    with pytest.warns(RuntimeWarning, match="linear in the outputs"):
        params["0.weight"].sum().backward()
