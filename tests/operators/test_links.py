"""Losses that read log-probabilities or probabilities and are not linear in them.

The models are linear before their last function, so their curvature is the Hessian if the cut is
there. Where the cut is behind it, a warning says that something is left out.
"""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from curvature_by_hand import gauss_newton, parts_of
from losses_of_likelihoods import BINARY, LABELS, SOFT, TARGETS, M
from oracles import dense, randn, relative_error
from torch import nn

from metaimplicit.operators import GGN, Fisher, Hessian, KroneckerFactored
from metaimplicit.operators.links import Link, find_link
from metaimplicit.operators.output_loss import output_gradient, widen

X = randn(M, 4, seed=1)
NUMBERS = randn(M, seed=2)


CLASS_LOSSES = {  # of one task, and of each number along its classes another one
    "log-softmax": lambda z: -z.flatten(1).cos().sum(1),
    "softmax": lambda p: -p.flatten(1).log().sum(1),
}


class OwnLogSoftmax(nn.Module):
    def forward(self, z):
        return z - z.exp().sum(-1, keepdim=True).log()


class OwnSoftmax(nn.Module):
    def forward(self, z):
        return z.exp() / z.exp().sum(-1, keepdim=True)


class OwnSigmoid(nn.Module):
    def forward(self, z):
        return 1 / (1 + (-z).exp())


class Heads(nn.Module):
    """A number first, log-probabilities of three classes and of two, and a number."""

    def forward(self, z):
        return torch.cat(
            [z[:, :1], z[:, 1:4].log_softmax(1), z[:, 4:6].log_softmax(1), z[:, 6:]], 1
        )


def entropy_bonus(z, y, weight=0.01):
    return F.nll_loss(z, y) + weight * (z.exp() * z).sum(1).mean()


def penalised(z, y):
    return F.nll_loss(z, y) + 1e-3 * z.square().mean()


def focal(z, y):
    q = z.gather(1, y[:, None])
    return -((1 - q.exp()) ** 2 * q).mean()


def of_heads(z, y):
    classes = F.nll_loss(z[:, 1:4], y) + F.nll_loss(z[:, 4:6], (y == 1).long())
    return classes + F.mse_loss(z[:, 0], NUMBERS) + F.mse_loss(z[:, 6], NUMBERS)


def divergence_from_uniform(z, y):
    return (z.exp() * z).sum(1).mean()


def negative_log(p, y):
    return F.nll_loss(p.log(), y)


def brier(p, y):
    return F.mse_loss(p, F.one_hot(y, 3).double())


def clamped_binary(p, y):
    p = 0.999998 * p + 1e-6
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def model_of(tail, outputs=3, scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, outputs), tail).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


CUT_BEFORE = {
    "entropy bonus": (nn.LogSoftmax(-1), entropy_bonus, LABELS),
    "entropy bonus, user's module": (OwnLogSoftmax(), entropy_bonus, LABELS),
    "penalty": (nn.LogSoftmax(-1), penalised, LABELS),
    "focal": (OwnLogSoftmax(), focal, LABELS),
    "heads": (Heads(), of_heads, LABELS),
    "squares with a slope of one sign": (
        nn.LogSoftmax(-1),
        F.mse_loss,
        TARGETS.abs(),
    ),
}


@pytest.mark.parametrize("name", CUT_BEFORE)
def test_gauss_newton_is_the_hessian_of_a_model_that_is_linear_before_log_softmax(name):
    tail, loss, targets = CUT_BEFORE[name]
    model = model_of(tail, outputs=7 if name == "heads" else 3)
    given = parts_of(model, loss, X, targets)
    behind = gauss_newton(model, loss, X, targets)
    hessian = dense(Hessian.from_loss(given))[0]
    assert relative_error(behind, hessian) > 0.1
    assert relative_error(dense(GGN.from_loss(given))[0], hessian) < 1e-12


LEFT_OUT = {
    "divergence": ("log-softmax", nn.LogSoftmax(-1), divergence_from_uniform, LABELS),
    "squares": ("log-softmax", OwnLogSoftmax(), F.mse_loss, 5 * TARGETS - 5),
    "negative log": ("softmax", nn.Softmax(-1), negative_log, LABELS),
    "negative log, user's module": ("softmax", OwnSoftmax(), negative_log, LABELS),
    "brier": ("softmax", OwnSoftmax(), brier, LABELS),
    "bce": ("sigmoid", nn.Sigmoid(), nn.BCELoss(), BINARY),
    "bce, user's modules": ("sigmoid", OwnSigmoid(), clamped_binary, BINARY),
    "bce, soft labels": ("sigmoid", OwnSigmoid(), F.binary_cross_entropy, SOFT),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_curvature_of_a_last_function_is_not_left_out_in_silence(name):
    link, tail, loss, targets = LEFT_OUT[name]
    model = model_of(tail)
    given = parts_of(model, loss, X, targets)
    expected = gauss_newton(model, loss, X, targets)
    assert relative_error(expected, dense(Hessian.from_loss(given))[0]) > 0.01
    for _ in range(2):  # Nothing is remembered that would silence the second.
        with pytest.warns(RuntimeWarning, match=f"of a {link}, whose.*curvature='hessian'"):
            operator = GGN.from_loss(given)
        assert relative_error(dense(operator)[0], expected) < 1e-12


COMPLETE = {
    "logits": (nn.Identity(), F.cross_entropy, LABELS),
    "logits of one output each": (nn.Identity(), F.binary_cross_entropy_with_logits, BINARY),
    "cross-entropy of log-probabilities": (nn.LogSoftmax(-1), F.cross_entropy, LABELS),
    "squares": (nn.Identity(), F.mse_loss, TARGETS),
    "a small residual of large numbers": (nn.Identity(), F.mse_loss, 1e10 * TARGETS),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_nothing_is_said_where_nothing_is_left_out(name):
    tail, loss, targets = COMPLETE[name]
    model = model_of(tail)
    given = parts_of(model, loss, X, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = GGN.from_loss(given)
    assert relative_error(dense(operator)[0], gauss_newton(model, loss, X, targets)) < 1e-12
    assert relative_error(dense(operator)[0], dense(Hessian.from_loss(given))[0]) < 1e-6


@pytest.mark.parametrize("tail", [nn.Sigmoid(), nn.Hardtanh(0.0, 1.0)])
def test_squares_of_outputs_that_happen_to_be_in_the_unit_interval(tail):
    """The loss tells nothing of where they come from, and this is the Gauss–Newton matrix."""
    model = model_of(tail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = GGN.from_loss(parts_of(model, F.mse_loss, X, TARGETS))
    assert relative_error(dense(operator)[0], gauss_newton(model, F.mse_loss, X, TARGETS)) < 1e-12


def test_log_probabilities_that_are_fitted_well():
    """The residual r is small, and so is what is left out."""
    model = model_of(nn.LogSoftmax(-1))
    targets = model(X).detach() + 1e-5 * TARGETS
    expected = gauss_newton(model, F.mse_loss, X, targets)
    operator = GGN.from_loss(parts_of(model, F.mse_loss, X, targets))
    assert relative_error(dense(operator)[0], expected) < 1e-12


def test_a_weight_of_the_entropy_that_is_annealed_to_zero():
    model = model_of(nn.LogSoftmax(-1))
    checked = {}
    for weight in (0.3, 0.0, 0.3):

        def loss(z, y, weight=weight):
            return entropy_bonus(z, y, weight)

        given = parts_of(model, loss, X, LABELS, checked)
        hessian = dense(Hessian.from_loss(given))[0]
        assert relative_error(dense(GGN.from_loss(given))[0], hessian) < 1e-12
    assert pickle.loads(pickle.dumps(checked)) == checked  # An optimiser is pickled with it.


@pytest.mark.parametrize("kind", [Fisher, KroneckerFactored])
def test_a_gaussian_of_log_probabilities_is_not_taken_in_silence(kind):
    """Σ r ∂²z/∂s² is all of the curvature of nll, and no part of a Gaussian's Fisher matrix."""
    given = parts_of(model_of(nn.LogSoftmax(-1)), penalised, X, LABELS)
    with pytest.warns(RuntimeWarning, match="of a log-softmax, whose"):
        kind.from_loss(given)


def test_a_loss_of_log_probabilities_in_single_precision():
    model = model_of(nn.LogSoftmax(-1)).float()
    given = parts_of(model, entropy_bonus, X.float(), LABELS)
    double = parts_of(model_of(nn.LogSoftmax(-1)), entropy_bonus, X, LABELS)
    hessian = dense(Hessian.from_loss(double))[0]
    assert relative_error(dense(GGN.from_loss(given))[0].double(), hessian) < 1e-5


class OfOneType(torch.autograd.Function):
    """The sum, whose derivative exists in single precision alone."""

    @staticmethod
    def forward(ctx, z):
        return z.sum(1)

    @staticmethod
    def backward(ctx, grad):
        if grad.dtype == torch.float64:
            raise RuntimeError("Found dtype Float but expected Double")
        return grad[:, None].expand(-1, 2)


def test_outputs_are_widened_only_for_losses_that_have_a_derivative_then():
    z = torch.zeros(3, 2)
    assert widen(lambda z: z.sum(1), z).dtype == torch.float64
    assert widen(OfOneType.apply, z).dtype == torch.float32


@pytest.mark.parametrize("kind", ["log-softmax", "softmax"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 3), -1), ((2, 3, 4), -1), ((2, 3, 4), -2), ((2, 3, 4, 5), -1), ((2, 3, 4, 5), -2)],
)
def test_the_classes_may_be_along_any_axis_of_a_task(kind, shape, axis):
    z = Link(kind, axis).apply(randn(*shape, seed=3))
    loss = CLASS_LOSSES[kind]
    found = find_link(loss, z, output_gradient(loss, z)[1])
    assert (found.kind, found.axis) == (kind, axis)


@pytest.mark.parametrize("kind", ["log-softmax", "softmax", "sigmoid"])
def test_a_link_is_inverted(kind):
    link = Link(kind)
    z = link.apply(X)
    torch.testing.assert_close(link.apply(link.invert(z)), z)
