"""Reverse-mode methods against finite differences, each other, and a plain per-task loop of `higher`."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from learnt_numbers import NUMBERS
from oracles import finite_difference, randn, relative_error
from tanh_network import DATA, INITIAL, POINTS, TASKS, XQ, YQ, X, Y, forward, network, outer
from torch import nn

from metaimplicit import (
    BilevelProblem,
    FirstOrder,
    FromMeta,
    GradientDescent,
    Proximal,
    Reptile,
    TorchOptimizer,
    Truncated,
    Unrolled,
    hypergradient,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    import higher


@pytest.mark.parametrize("name", NUMBERS)
def test_unrolled_equals_finite_differences_of_the_whole_procedure(name):
    inner, numbers = NUMBERS[name]
    penalty = Proximal(FromMeta("proximal"))
    meta = (
        INITIAL
        | {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        | {"proximal": torch.tensor(0.3, dtype=torch.float64)}
    )
    run = partial(
        hypergradient, network(penalty), data=DATA, inner=inner, method="unrolled", batched=True
    )
    grads = run(meta).grads
    for key, value in meta.items():
        direction = torch.ones_like(value) if value.dim() == 0 else randn(*value.shape, seed=20)
        step = 2e-5 if key in numbers else 1e-3
        expected = finite_difference(
            lambda v, key=key: run(meta | {key: v}).outer_loss, value, direction, step
        )
        assert float((grads[key] * direction).sum()) == pytest.approx(
            float(expected), rel=1e-6, abs=1e-9
        ), key


def test_step_sizes_per_tensor_and_per_element():
    inner = GradientDescent(steps=3, lr=FromMeta("lr"))
    tensors = {
        f"lr.{name}": torch.tensor(0.1 + 0.01 * i).double() for i, name in enumerate(INITIAL)
    }
    elements = {key: value.expand(INITIAL[key[3:]].shape) for key, value in tensors.items()}
    run = partial(hypergradient, network(), data=DATA, inner=inner, method="unrolled", batched=True)
    one, each = run(INITIAL | tensors), run(INITIAL | elements)
    assert relative_error(one.outer_loss, each.outer_loss) < 1e-14
    for key in tensors:
        assert each.grads[key].shape == INITIAL[key[3:]].shape
        assert relative_error(one.grads[key], each.grads[key].sum()) < 1e-12


def test_truncated_spans_first_order_to_unrolled():
    inner = GradientDescent(steps=5, lr=0.1, momentum=0.4)
    run = partial(hypergradient, network(Proximal(0.3)), INITIAL, DATA, inner=inner, batched=True)
    for a, b in ((Truncated(5), Unrolled()), (Truncated(0), FirstOrder())):
        for name in INITIAL:
            assert relative_error(run(method=a).grads[name], run(method=b).grads[name]) < 1e-12
    between = [run(method=Truncated(k)).grads["0.weight"] for k in (0, 2, 5)]
    assert relative_error(between[0], between[1]) > 1e-3 < relative_error(between[1], between[2])


def test_truncated_is_the_unrolled_gradient_of_the_last_steps():
    """K = 2 of 5: the derivative of two steps taken at θ₃ as if it were the initialisation, momentum carried over."""
    inner = GradientDescent(steps=5, lr=FromMeta("lr"))
    meta = INITIAL | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    run = partial(hypergradient, network(), data=DATA, batched=True)
    truncated = run(meta, inner=inner, method=Truncated(2))
    third = run(INITIAL, inner=GradientDescent(steps=3, lr=0.1), method="first-order")
    # start the last two steps at θ₃ of each task, which is data now, displaced by φ
    problem = BilevelProblem(
        init=lambda meta, data: {name: data[4][name] + meta[name] for name in INITIAL},
        inner_loss=network().inner_loss,
        outer_loss=outer,
    )
    zero = {name: torch.zeros_like(p) for name, p in INITIAL.items()} | {"lr": meta["lr"]}
    expected = hypergradient(
        problem,
        zero,
        (*DATA, third.params),
        inner=inner.updated(steps=2),
        method="unrolled",
        batched=True,
    )
    for name in meta:
        assert relative_error(truncated.grads[name], expected.grads[name]) < 1e-12


def test_multi_step_losses_see_every_iterate():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def over_iterates(params, meta, data):
        losses = torch.stack(
            [outer({n: p[t] for n, p in params.items()}, meta, data) for t in range(4)]
        )
        return weights @ losses

    problem = BilevelProblem(network().init, network().inner_loss, over_iterates)
    inner = GradientDescent(steps=3, lr=0.1)
    got = hypergradient(
        problem, INITIAL, DATA, inner=inner, method=Unrolled(iterates=True), batched=True
    )
    expected = sum(
        weights[t]
        * hypergradient(
            network(),
            INITIAL,
            DATA,
            inner=GradientDescent(steps=t, lr=0.1),
            method="unrolled",
            batched=True,
        ).grads["0.weight"]
        for t in (1, 2, 3)
    )
    at_start = torch.func.grad(
        lambda w: torch.stack(
            [outer(INITIAL | {"0.weight": w}, {}, [d[i] for d in DATA]) for i in range(3)]
        ).mean()
    )
    assert (
        relative_error(got.grads["0.weight"], expected + weights[0] * at_start(INITIAL["0.weight"]))
        < 1e-12
    )
    assert got.params["0.weight"].shape == (TASKS, 4, 4, 2)


# `higher` adds Adam's ε before the bias correction, torch (and we) after it: they are one function at ε = 0
HIGHER = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), GradientDescent(steps=4, lr=0.1)),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        GradientDescent(steps=4, lr=0.1, momentum=0.9),
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, lr=0.05, eps=0.0),
        TorchOptimizer(torch.optim.Adam, steps=4, lr=0.05, eps=0.0),
    ),
}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", HIGHER)
def test_batched_equals_a_plain_loop_of_higher(name, vectorize):
    optimizer, inner = HIGHER[name]
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.load_state_dict(INITIAL)
    for task in range(TASKS):
        with higher.innerloop_ctx(
            model, optimizer(model.parameters()), copy_initial_weights=False
        ) as (
            fmodel,
            diffopt,
        ):
            for _ in range(4):
                diffopt.step(F.mse_loss(fmodel(X[task]), Y[task]))
            (F.mse_loss(fmodel(XQ[task]), YQ[task]) / TASKS).backward()
    result = hypergradient(
        network(), INITIAL, DATA, inner=inner, method="unrolled", batched=True, vectorize=vectorize
    )
    for key, p in model.named_parameters():
        assert relative_error(result.grads[key], p.grad) < 1e-10


@pytest.mark.parametrize("method", ["first-order", Truncated(1), Truncated(3)], ids=str)
def test_shortcuts_change_the_derivative_and_not_the_iterate(method):
    run = partial(
        hypergradient,
        network(),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=3, lr=0.1, momentum=0.5),
        batched=True,
    )
    cut, whole = run(method=method), run(method="unrolled")
    for name in INITIAL:
        assert relative_error(cut.params[name], whole.params[name]) < 1e-14


def test_reptile_moves_towards_the_adapted_parameters():
    result = hypergradient(
        network(),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=3, lr=0.1),
        method=Reptile(),
        batched=True,
    )
    for name, p in INITIAL.items():
        assert relative_error(result.grads[name], (p - result.params[name]).mean(0)) < 1e-13


def test_auxiliary_outputs_come_back_detached():
    problem = BilevelProblem(
        network().init,
        network().inner_loss,
        lambda p, m, d: (outer(p, m, d), {"outputs": forward(p, d[2])}),
    )
    result = hypergradient(
        problem,
        INITIAL,
        DATA,
        inner=GradientDescent(steps=2, lr=0.1),
        method="first-order",
        batched=True,
    )
    assert result.aux["outputs"].shape == (TASKS, POINTS, 1)
    assert not result.aux["outputs"].requires_grad
    assert relative_error((result.aux["outputs"] - YQ).square().mean(), result.outer_loss) < 1e-14
