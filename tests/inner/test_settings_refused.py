"""Numbers of an inner loop that are no numbers, and options that have another name here."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaimplicit import (
    BilevelProblem,
    FromMeta,
    GradientDescent,
    MetaLearner,
    ProximalGradient,
    TorchOptimizer,
    hypergradient,
)
from metaimplicit.inner import L1Norm

REFUSED = {
    "a function": ({"lr": lambda t: 0.1}, "lr: got <function"),
    "text": ({"lr": "0.1"}, "lr: got '0.1', expected a number, a tensor or FromMeta, a dict"),
    "text by step": ({"lr": ["0.1"] * 5}, "lr: got '0.1'"),
    "an array": ({"lr": np.array([0.1, 0.2])}, "lr: got array"),
    "modules": ({"lr": {nn.Linear(1, 1): 0.1}}, r"lr: got a dict with the key Linear\(.*names of"),
    "momentum": ({"momentum": None}, "momentum: got None"),
    "limits by step": ({"max_grad_norm": [1.0, 2.0]}, "max_grad_norm: got .*, expected one"),
    "limits by layer": (
        {"max_grad_norm": {"*": 1.0}},
        "max_grad_norm: got .*, expected one",
    ),
}
ELSEWHERE = [
    (torch.optim.Adam, {"decoupled_weight_decay": True}, "use torch.optim.AdamW"),
    (torch.optim.SGD, {"maximize": True}, "negate the loss"),
    (torch.optim.Adam, {"foreach": True}, "leave it out"),
    (torch.optim.Adam, {"fused": True}, "leave it out"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_is_named(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        GradientDescent(**options)


@pytest.mark.parametrize("lr", [np.float32(0.1), np.float64(0.1), np.int64(1), 1, True])
def test_every_kind_of_number_will_do(lr):
    assert GradientDescent(lr=lr).lr == lr


@pytest.mark.parametrize(("optimizer", "options", "advice"), ELSEWHERE)
def test_an_option_that_is_missing_has_a_replacement(optimizer, options, advice):
    with pytest.raises(ValueError, match=advice):
        TorchOptimizer(optimizer, lr=0.1, **options)


@pytest.mark.parametrize("method", ["unrolled", "forward", "cg"])
@pytest.mark.parametrize("inner", [GradientDescent, partial(ProximalGradient, L1Norm(0.1))])
def test_a_step_size_of_another_shape_than_a_parameter_is_refused(inner, method):
    """With three tasks, each would have its own step size for b."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3), "b": torch.zeros(())},
        inner_loss=lambda p, m, d: (p["w"] + p["b"] - d).square().sum(),
        outer_loss=lambda p, m, d: p["b"].square(),
    )
    message = r"lr: got shape \(3,\) for the parameter 'b' of shape \(\), expected one number"
    with pytest.raises(ValueError, match=message):
        hypergradient(
            problem,
            {"lr": torch.tensor([0.1, 0.2, 0.3])},
            torch.ones(3),
            inner=inner(steps=2, lr=FromMeta("lr")),
            method="fixed-point" if method == "cg" and inner is not GradientDescent else method,
            batched=True,
        )


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_number_with_an_axis_is_one_for_a_parameter_without(shape):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3), "b": torch.zeros(())},
        inner_loss=lambda p, m, d: (p["w"].sum() + p["b"] - d).square(),
        outer_loss=lambda p, m, d: p["b"].square(),
    )
    result = hypergradient(
        problem,
        {"lr": torch.full(shape, 0.1)},
        torch.ones(3),
        inner=GradientDescent(steps=1, lr=FromMeta("lr")),
        method="unrolled",
        batched=True,
    )
    assert torch.allclose(result.params["b"], torch.full((3,), 0.2))


def test_an_infinite_limit_of_the_norm_is_none():
    x = torch.randn(2, 6, 3).double()
    y = torch.randn(2, 6, 1).double()
    gradients = []
    for limit in (None, float("inf")):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        inner = GradientDescent(steps=2, lr=0.1, max_grad_norm=limit)
        # A choice by time could differ between the two, and so the order of the sums.
        learner = MetaLearner(model, F.mse_loss, inner=inner, vectorize="vmap")
        learner.backward(((x, y), (x, y)))
        gradients.append(model.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
