"""Numbers, models and losses that a second-order optimiser refuses, and those that it accepts."""

import math

import pytest
import torch
import torch.nn.functional as F
from losses_of_likelihoods import NOT_FITTING
from oracles import relative_error
from second_order import (
    LABELS,
    TARGETS,
    Point,
    X,
    network,
    tanh_network,
    vector,
)
from torch import nn

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient, Newton
from metaimplicit.solvers import CG


@pytest.mark.parametrize(
    "make", [Newton, lambda model, **options: GaussNewton(model, F.mse_loss, **options)]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: got 0.0, expected a finite number > 0"),
        ({"lr": math.inf}, "lr: got inf, expected a finite number > 0"),
        ({"damping": 0.0}, "damping: got 0.0, expected a finite number > 0"),
        (
            {"damping": -1.0, "adapt_damping": False},
            "damping: got -1.0, expected a finite number ≥ 0",
        ),
        (
            {"damping": math.nan, "adapt_damping": False},
            "damping: got nan, expected a finite number ≥ 0",
        ),
        ({"solver": "cg"}, "solver: got 'cg', expected one of metaimplicit.solvers"),
    ],
)
def test_numbers_out_of_range_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(tanh_network(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: got 0.0, expected a finite number > 0"),
        ({"damping": 0.0}, "damping: got 0.0, expected a finite number > 0"),
        ({"damping": math.inf}, "damping: got inf, expected a finite number > 0"),
        ({"kl_clip": 0.0}, "kl_clip: got 0.0, expected a finite number > 0"),
        ({"momentum": 1.0}, r"momentum: got 1.0, expected a number in \[0, 1\)"),
        ({"decay": -0.1}, r"decay: got -0.1, expected a number in \[0, 1\)"),
        ({"update_every": 0}, "update_every: got 0, expected at least 1 step"),
        ({"update_every": 1.5}, "update_every: got 1.5, expected a whole number"),
        ({"invert_every": 0}, "invert_every: got 0, expected at least 1 step"),
        ({"adapt_every": 0}, "adapt_every: got 0, expected at least 1 step"),
        ({"others": "zero"}, "others: got 'zero', expected 'raise' or 'gradient'"),
        ({"likelihood": "poisson"}, "likelihood: got 'poisson', expected one of softmax, gaussian"),
        ({"expectation": "mean"}, "expectation: got 'mean', expected one of exact"),
    ],
)
def test_options_of_kfac_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"KFAC {message}"):
        KFAC(network(), F.cross_entropy, **options)


def mixed_precision():
    model = tanh_network()
    model[2].float()
    return model


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: list(tanh_network().parameters()), "got list, expected an nn.Module"),
        (lambda: tanh_network().requires_grad_(False), "got no parameter that requires grad"),
        (mixed_precision, "got '2.weight' as torch.float32 on cpu, expected torch.float64"),
    ],
)
def test_models_without_parameters_of_one_type_are_refused(make_model, message):
    with pytest.raises(ValueError, match=f"Newton model: {message}"):
        Newton(make_model())


@pytest.mark.parametrize(
    ("make", "loss", "options", "message"),
    [
        (GaussNewton, "mse", {}, "loss: got 'mse', expected a function"),
        (KFAC, nn.MSELoss, {}, "loss: got the class MSELoss, .*make an instance of it"),
        (GaussNewton, nn.MSELoss(reduction="none"), {}, "loss: got reduction='none'"),
        (
            NaturalGradient,
            F.cross_entropy,
            {"likelihood": "poisson"},
            "likelihood: got 'poisson', expected one of softmax, gaussian",
        ),
        (
            NaturalGradient,
            F.cross_entropy,
            {"expectation": "mean"},
            "expectation: got 'mean', expected one of exact",
        ),
    ],
)
def test_losses_and_likelihoods_that_do_not_fit_are_refused(make, loss, options, message):
    with pytest.raises(ValueError, match=f"{make.__name__} {message}"):
        make(tanh_network(), loss, **options)


@pytest.mark.parametrize("make", [NaturalGradient, KFAC])
@pytest.mark.parametrize(
    ("loss", "targets", "likelihood"),
    [
        (F.mse_loss, TARGETS, "softmax"),
        (nn.CrossEntropyLoss(), LABELS, "gaussian"),
        (F.cross_entropy, LABELS, "sigmoid"),
        (F.binary_cross_entropy_with_logits, TARGETS, "softmax"),
    ],
)
def test_a_likelihood_that_the_loss_does_not_have_is_refused(make, loss, targets, likelihood):
    model = network()
    start = vector(model)
    message = f"got a loss that is −log p of no {likelihood} likelihood.*optim.GaussNewton"
    with pytest.raises(ValueError, match=message):
        make(model, loss, likelihood=likelihood).step(lambda: (model(X), targets))
    assert torch.equal(vector(model), start)


@pytest.mark.parametrize(
    ("make", "expectation"), [(NaturalGradient, "monte-carlo"), (KFAC, "exact")]
)
@pytest.mark.parametrize("name", NOT_FITTING)
def test_a_loss_of_no_likelihood_is_refused(make, name, expectation):
    loss, targets = NOT_FITTING[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3)).double()
    start = vector(model)
    message = "got a loss that is −log p of no softmax, gaussian, sigmoid likelihood"
    optimizer = make(model, loss, expectation=expectation)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: (model(X[: len(targets)]), targets))
    assert torch.equal(vector(model), start)


@pytest.mark.parametrize("make", [NaturalGradient, KFAC])
def test_label_smoothing_is_accepted(make):
    model = network()
    make(model, nn.CrossEntropyLoss(label_smoothing=0.1)).step(lambda: (model(X), LABELS))


@pytest.mark.parametrize("make", [NaturalGradient, KFAC])
def test_normalised_outputs_with_nll_loss_take_the_step_of_logits_with_cross_entropy(make):
    ends = []
    for layers, loss in (((), F.cross_entropy), ((nn.LogSoftmax(1),), F.nll_loss)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), *layers).double()
        optimizer = make(model, loss, expectation="exact")
        optimizer.step(lambda model=model: (model(X), LABELS))
        ends.append(vector(model))
    assert relative_error(*ends) < 1e-12


@pytest.mark.parametrize("make", [NaturalGradient, KFAC])
def test_a_class_that_is_masked_out_leaves_the_step_finite(make):
    model = network()
    is_masked = torch.tensor([False, False, False, True])

    def closure():
        return model(X).masked_fill(is_masked, -torch.inf), LABELS.remainder(3)

    make(model, F.cross_entropy).step(closure)
    assert vector(model).isfinite().all()


def test_a_step_that_is_not_finite_changes_no_parameter():
    """The Hessian of a linear loss is zero, and so is the damping."""
    model = Point(torch.zeros(2).double())
    start = model.x.detach().clone()
    message = "the step is not finite; no parameter was changed; raise damping"
    with pytest.raises(FloatingPointError, match=message):
        Newton(model, damping=0.0, adapt_damping=False, solver=CG()).step(lambda: model.x.sum())
    assert torch.equal(model.x.detach(), start)
