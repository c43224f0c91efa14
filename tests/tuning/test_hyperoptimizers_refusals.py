"""Towers that are built wrongly, used wrongly, or driven out of their range."""

import math

import pytest
import torch
from torch import nn
from tower_network import loss, network, parameter, step_with

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Box, Positive, Real
from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam

LR = {"lr": Real()}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SGD(-0.1), "SGD lr: got -0.1, expected a finite number ≥ 0"),
        (lambda: Adam(beta1=1.0), r"Adam beta1: got 1.0, expected a number in \[0, 1\)"),
        (lambda: AdaGrad(initial=-1), "AdaGrad initial: got -1, expected a finite number ≥ 0"),
        (
            lambda: SGD(optimizer=SGD(), learn=("rate",)),
            r"SGD learn: got \['rate'\], expected some of \['lr', 'momentum'",
        ),
        (lambda: SGD(learn=("lr",)), r"SGD learn: got \('lr',\) and no optimizer"),
        (lambda: SGD(optimizer=SGD(), learn=()), "SGD: got an optimizer and nothing to learn"),
        (
            lambda: SGD(optimizer=SGD(), momentum=0.5, learn={"momentum": "per-tensor"}),
            "SGD learn: got {'momentum': 'per-tensor'}, expected 'scalar'",
        ),
        (
            lambda: SGD(optimizer=SGD(), learn=("momentum",)),
            "SGD momentum: hyperparameter: got 0, expected numbers between 0 and 1",
        ),
        (lambda: SGD(domains={"beta1": Positive()}), r"SGD domains: got \['beta1'\]"),
    ],
)
def test_a_bad_level_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


MIXED = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([torch.zeros(2)], "param group 0: got no parameter that requires grad"),
        (MIXED, r"group 0: got parameters of torch\.float32 on cpu, torch\.float64 on cpu"),
        ([{"params": MIXED[:1], "lr": -1.0}], r"SGD lr: got -1\.0"),
        (
            [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
            "param group 0: got parameters that are not real floating-point numbers",
        ),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Hyperoptimizer(params, SGD())


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [torch.zeros(2)]}, "param group 1: got no parameter that requires grad"),
        ({"params": [parameter(1.0)], "lr": -1.0}, r"SGD lr: got -1\.0"),
        (
            {"params": [parameter(1.0)], "betas": (0.5, 0.6), "maximize": True},
            r"param group 1: got \['betas', 'maximize'\], expected some of the tower's own",
        ),
    ],
)
def test_a_group_that_is_refused_is_not_added(group, message):
    optimizer = Hyperoptimizer([parameter(1.0)], SGD(0.1, optimizer=SGD(0.1)))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(optimizer.hyperparameters) == 1
    accepted = {"params": [parameter(1.0)], "lr": 0.5, "name": "head", "maximize": False}
    optimizer.add_param_group(accepted)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.1, 0.5])


def test_a_step_without_a_dense_gradient_is_refused():
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), SGD(optimizer=SGD()))
    message = r"step: got no gradient in any parameter, expected loss.backward\(\) before"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Hyperoptimizer(embedding.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="step: got a sparse gradient, expected dense ones"):
        optimizer.step()


@pytest.mark.parametrize("tower", [Adam(0.1), Adam(0.1, optimizer=SGD(0.1))])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta1", 1.0, r"Adam beta1: got 1\.0, expected a number in \[0, 1\)"),
        ("lr", -0.1, r"Adam lr: got -0\.1, expected a finite number ≥ 0"),
        ("lr", math.nan, "Adam lr: got nan, expected a finite number ≥ 0"),
    ],
)
def test_a_bad_value_written_into_a_group_is_refused(tower, name, value, message):
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), tower)
    optimizer.param_groups[0][name] = value
    loss(model, 0).backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_step_size_that_becomes_negative_stops_before_the_parameters_move():
    """The first step passes the minimum, so the next gradient points back and lr shrinks."""
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = Hyperoptimizer([w], SGD(3.0, optimizer=SGD(100.0), domains=LR))
    (w * w).sum().backward()
    optimizer.step()
    before = w.detach().clone()
    optimizer.zero_grad()
    (w * w).sum().backward()
    message = (
        r"SGD lr: got -\d.* after 1 steps.*step size of the SGD above is too large.*"
        "No parameter was moved"
    )
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step()
    assert torch.equal(w.detach(), before)


def test_a_step_size_that_becomes_infinite_stops_before_the_parameters_move():
    w = nn.Parameter(torch.tensor([1.0]))
    tower = SGD(3.0, optimizer=SGD(1e38), domains={"lr": Positive()})
    optimizer = Hyperoptimizer([w], tower)
    step_with(optimizer, 2.0)
    before = w.detach().clone()
    message = r"SGD lr: got (inf|nan).* after 1 steps.*step size of the SGD above is too large"
    with pytest.raises(FloatingPointError, match=message):
        step_with(optimizer, 1e30)
    assert torch.equal(w.detach(), before)


def test_no_group_moves_if_the_hyperparameters_of_one_fail():
    a = parameter(1.0)
    b = parameter(1.0)
    tower = SGD(0.1, optimizer=SGD(1.0), domains=LR)
    optimizer = Hyperoptimizer([{"params": [a]}, {"params": [b]}], tower)
    step_with(optimizer, 1.0, 1.0)
    before = a.item()
    message = r"SGD lr: got -0\.9 after 1 steps, expected a number in \[0, inf\)"
    with pytest.raises(FloatingPointError, match=message):
        step_with(optimizer, 1.0, -1.0)
    assert a.item() == before


def test_a_beta_that_becomes_one_is_an_error():
    tower = Adam(
        0.1,
        optimizer=SGD(1e3),
        learn=("beta1",),
        domains={"beta1": Box(0.0, 1.0)},
    )
    optimizer = Hyperoptimizer([parameter(1.0)], tower)
    step_with(optimizer, 1.0)
    step_with(optimizer, -1.0)
    message = r"Adam beta1: got 1\.0 after 2 steps, expected .* in \[0, 1\)"
    with pytest.raises(FloatingPointError, match=message):
        step_with(optimizer, 1.0)


def test_a_failure_of_many_step_sizes_names_the_worst():
    tower = SGD(
        0.1,
        optimizer=SGD(1.0),
        learn={"lr": "per-element"},
        domains=LR,
    )
    p = nn.Parameter(torch.ones(1000, dtype=torch.float64))
    optimizer = Hyperoptimizer([p], tower)
    step_with(optimizer, 1.0)
    p.grad = torch.linspace(1.0, -2.0, 1000, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"SGD lr: got -1\.9 after") as error:
        optimizer.step()
    assert len(str(error.value)) < 300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_moved_to_another_device_is_refused():
    model = nn.Linear(2, 1)
    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    model.to("cuda")
    model(torch.ones(3, 2, device="cuda")).sum().backward()
    message = r"step: got parameters on cuda:0, expected them on cpu, .*after model.to\(device\)"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
