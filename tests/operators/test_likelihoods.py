"""Fisher, K-FAC and EKFAC take the likelihood and the weights of the loss, or refuse it by name."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from curvature_by_hand import gauss_newton, jacobian, kronecker_factored, output_hessian, parts_of
from losses_of_likelihoods import EACH_KIND, FITTING, LABELS, NOT_FITTING, TARGETS, M
from oracles import dense, generator, randn, relative_error
from torch import nn

from metaimplicit.operators import Fisher, Identity, KroneckerFactored

X = randn(M, 4, seed=1)


def network(scale=1.0, tail=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), *tail).double()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def example_weights(weights):
    return weights if weights.dim() == 1 else weights.sum(1)


@pytest.mark.parametrize("name", FITTING)
def test_the_matrix_is_that_of_the_likelihood_and_the_weights_by_hand(name):
    """diag(wᵢ Fᵢ) with F = diag p − p pᵀ, I or diag p(1 − p), written out."""
    row = FITTING[name]
    model = network()
    blocks = []
    for z, w in zip(model(X).detach(), row.weights, strict=True):
        p = z.softmax(-1)
        fisher = {
            "softmax": torch.diag(p) - torch.outer(p, p),
            "gaussian": torch.eye(3).double(),
            "sigmoid": torch.diag(z.sigmoid() * (1 - z.sigmoid())),
        }[row.family]
        blocks.append(w * fisher)
    J = jacobian(model, X)
    expected = J.T @ torch.block_diag(*blocks) @ J
    parts = parts_of(model, row.loss, X, row.targets)
    assert relative_error(dense(Fisher.from_loss(parts))[0], expected) < 1e-12
    assert (
        relative_error(dense(Fisher.from_loss(parts, likelihood=row.family))[0], expected) < 1e-12
    )


@pytest.mark.parametrize("name", EACH_KIND)
def test_the_kronecker_factors_weigh_examples_as_the_loss_does(name):
    row = FITTING[name]
    model = network()
    curvature = output_hessian(row.loss, model(X).detach(), row.targets)
    expected = kronecker_factored(model, curvature, X, example_weights(row.weights))
    factors = KroneckerFactored.from_loss(parts_of(model, row.loss, X, row.targets))
    assert relative_error(dense(factors)[0], expected) < 1e-12


@pytest.mark.parametrize("name", EACH_KIND)
def test_ekfac_of_a_linear_model_has_the_right_curvature_along_its_eigenvectors(name):
    """uᵀ F u for each eigenvector u of G ⊗ A, as one linear layer has no other approximation."""
    row = FITTING[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    parts = parts_of(model, row.loss, X, row.targets)
    kfac = dense(KroneckerFactored.from_loss(parts))[0]
    ekfac = dense(KroneckerFactored.from_loss(parts, corrected=True))[0]
    full = gauss_newton(model, row.loss, X, row.targets)
    _, vectors = torch.linalg.eigh(kfac)
    expected = vectors @ torch.diag((vectors * (full @ vectors)).sum(0)) @ vectors.T
    assert relative_error(ekfac, expected) < 1e-8


@pytest.mark.parametrize("name", EACH_KIND)
def test_the_empirical_matrix_counts_each_gradient_once(name):
    """Σ wᵢ ∇ log pᵢ ∇ log pᵢᵀ, where the slope of the loss is wᵢ ∇ log pᵢ, output by output."""
    row = FITTING[name]
    model = network()
    z = model(X).detach().requires_grad_()
    (slope,) = torch.autograd.grad(row.loss(z, row.targets), z)
    w = row.weights if row.weights.dim() == 2 else row.weights[:, None].expand(-1, 3)
    J = jacobian(model, X).reshape(M, 3, -1)
    expected = 0
    for i in range(M):
        if bool((w[i] > 0).all()):
            gradient = J[i].T @ (slope[i] / w[i].sqrt())
            expected = expected + torch.outer(gradient, gradient)
    parts = parts_of(model, row.loss, X, row.targets)
    fisher = Fisher.from_loss(parts, expectation="empirical")
    assert relative_error(dense(fisher)[0], expected) < 1e-11


@pytest.mark.parametrize("name", ["class weights", "mse, masked", "bce, positive weight"])
@pytest.mark.parametrize("kind", [Fisher, KroneckerFactored])
def test_draws_tend_to_the_exact_matrix(name, kind):
    row = FITTING[name]
    parts = parts_of(network(), row.loss, X, row.targets)
    exact = dense(kind.from_loss(parts))
    options = {"expectation": "monte-carlo", "samples": 2000, "generator": generator(0)}
    assert relative_error(dense(kind.from_loss(parts, **options)), exact) < 0.05


# what has no such likelihood


@pytest.mark.parametrize(("kind", "scale"), [(Fisher, 1.0), (KroneckerFactored, 100.0)])
@pytest.mark.parametrize("name", NOT_FITTING)
def test_another_loss_is_refused_however_saturated_the_model_is(name, kind, scale):
    loss, targets = NOT_FITTING[name]
    parts = parts_of(network(scale), loss, X, targets)
    message = "got a loss that is −log p of no softmax, gaussian, sigmoid likelihood.*gauss-newton"
    with pytest.raises(ValueError, match=message):
        kind.from_loss(parts)


@pytest.mark.parametrize("name", ["focal", "temperature"])
def test_another_loss_is_refused_where_its_curvature_is_zero(name):
    """At the model's own outputs any softmax and any weights would fit."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(1e5)
    loss, targets = NOT_FITTING[name]
    assert output_hessian(loss, model(X).detach(), targets).abs().max() < 1e-100
    with pytest.raises(ValueError, match="got a loss that is −log p of no softmax"):
        Fisher.from_loss(parts_of(model, loss, X, targets))


@pytest.mark.parametrize("name", EACH_KIND)
def test_a_saturated_model_does_not_hide_the_likelihood(name):
    row = FITTING[name]
    parts = parts_of(network(100.0), row.loss, X, row.targets)
    factors = KroneckerFactored.from_loss(parts)
    weights = example_weights(row.weights)
    rows = torch.cat([X, torch.ones(M, 1).double()], 1)
    A = rows.T @ (weights[:, None] * rows) / weights.sum()
    block = factors.blocks[0]
    basis = block.right[0]
    assert relative_error(basis.T @ A @ basis, torch.diag(torch.linalg.eigvalsh(A))) < 1e-10


@pytest.mark.parametrize("kind", [Fisher, KroneckerFactored])
@pytest.mark.parametrize(
    ("loss", "targets", "likelihood"),
    [
        (F.mse_loss, TARGETS, "softmax"),
        (F.cross_entropy, LABELS, "gaussian"),
        (F.cross_entropy, LABELS, "sigmoid"),
        (F.smooth_l1_loss, TARGETS, "gaussian"),
    ],
)
def test_a_likelihood_that_the_loss_does_not_have_is_refused(kind, loss, targets, likelihood):
    parts = parts_of(network(), loss, X, targets)
    message = f"got a loss that is −log p of no {likelihood} likelihood"
    with pytest.raises(ValueError, match=message):
        kind.from_loss(parts, likelihood=likelihood)


@pytest.mark.parametrize(("name", "m"), [*((name, M) for name in NOT_FITTING), ("poisson", 1)])
def test_the_empirical_matrix_of_another_loss_is_that_of_a_mean(name, m):
    """Of m examples, each with the gradient of m times its part of the loss."""
    loss, targets = NOT_FITTING[name]
    x, y = (X[:m], targets[:m])
    model = network()
    z = model(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(z, y), z)
    gradients = torch.einsum("mdn,md->mn", jacobian(model, x).reshape(m, 3, -1), m * slope)
    with pytest.warns(RuntimeWarning, match="does not tell the weights of its examples"):
        fisher = Fisher.from_loss(parts_of(model, loss, x, y), expectation="empirical")
    assert relative_error(dense(fisher)[0], gradients.T @ gradients / m) < 1e-12


def test_examples_that_another_loss_ignores_do_not_count_in_the_empirical_matrix():
    """A mean over the four examples that a mask keeps is the mean of these four."""
    kept = torch.arange(M) < 4
    counts = TARGETS.abs().round()

    def masked(z, y):
        losses = F.poisson_nll_loss(z, y, reduction="none")
        return losses[kept[: len(z)]].mean()

    matrices = []
    for x, y in ((X, counts), (X[kept], counts[kept])):
        with pytest.warns(RuntimeWarning, match="as in a mean over those that the loss reads"):
            fisher = Fisher.from_loss(parts_of(network(), masked, x, y), expectation="empirical")
        matrices.append(dense(fisher)[0])
    assert relative_error(*matrices) < 1e-12


@pytest.mark.parametrize("name", ["smooth l1", "poisson", "quartic", "penalty of the logits"])
def test_a_preconditioner_takes_any_loss(name):
    """It changes how many products a solve takes, and not what it solves."""
    loss, targets = NOT_FITTING[name]
    parts = parts_of(network(), loss, X, targets)
    full = gauss_newton(network(), loss, X, targets)
    factors = KroneckerFactored.preconditioner(Identity(torch.zeros(1, len(full))), parts)
    if name != "penalty of the logits":  # The others treat output by output.
        curvature = output_hessian(loss, network()(X).detach(), targets)
        expected = kronecker_factored(
            network(), curvature, X, curvature.diag().reshape(M, 3).sum(1)
        )
        assert relative_error(dense(factors)[0], expected) < 1e-12
    assert torch.linalg.eigvalsh(dense(factors)[0]).min() > -1e-12


# a loss is verified every time


def test_a_family_that_was_seen_before_takes_fewer_evaluations():
    checked = {}
    calls = []

    def loss(z, y):
        calls.append(len(z))
        return F.cross_entropy(z, y)

    counts = []
    for labels in (LABELS, torch.where(LABELS == 1, -100, LABELS)):
        calls.clear()
        fisher = Fisher.from_loss(parts_of(network(), loss, X, labels, checked))
        expected = gauss_newton(network(), F.cross_entropy, X, labels)
        assert relative_error(dense(fisher)[0], expected) < 1e-12
        counts.append(len(calls))
    assert counts[1] < counts[0]
    for kind in (partial(Fisher.from_loss), partial(KroneckerFactored.from_loss)):
        with pytest.raises(ValueError, match="of no softmax"):
            kind(parts_of(network(), F.smooth_l1_loss, X, TARGETS))
