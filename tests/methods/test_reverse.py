"""Reverse-mode methods against finite differences, each other, and a plain loop of `higher`."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from learnt_numbers import LEARNT_LOOPS
from oracles import largest_error, randn, relative_error
from tanh_network import DATA, INITIAL, POINTS, TASKS, XQ, YQ, X, Y, forward, network, outer
from torch import nn

from metaimplicit import (
    BilevelProblem,
    FirstOrder,
    FromMeta,
    GradientDescent,
    Proximal,
    TorchOptimizer,
    Truncated,
    Unrolled,
    argmin,
    hypergradient,
)
from metaimplicit.methods import Reptile

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    import higher


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNT_LOOPS)
def test_unrolled_equals_finite_differences_of_the_whole_procedure(name):
    loop = LEARNT_LOOPS[name]
    proximal = torch.tensor(0.3, dtype=torch.float64)
    meta = INITIAL | loop.meta | {"proximal": proximal}
    problem = network(Proximal(FromMeta("proximal")))
    options = {"inner": loop.inner, "method": "unrolled", "batched": True}
    result = hypergradient(problem, meta, DATA, **options)
    # The whole initialisation is displaced at once, in a direction without a zero.
    shift = {
        key: randn(*value.shape, seed=20 + i) for i, (key, value) in enumerate(INITIAL.items())
    }
    directions = {"the initialisation": shift}
    directions |= {key: {key: torch.tensor(1.0)} for key in meta if key not in INITIAL}
    for name, direction in directions.items():

        def outer_loss(h, direction=direction):
            displaced = {key: meta[key] + h * d for key, d in direction.items()}
            params = argmin(problem.inner_loss, problem.init, meta | displaced, DATA, **options)
            return torch.vmap(outer, in_dims=(0, None, 0))(params, {}, DATA).mean().detach()

        expected = float(outer_loss(2e-6) - outer_loss(-2e-6)) / 4e-6
        slope = sum(float((result.grads[key] * d).sum()) for key, d in direction.items())
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_a_step_size_per_tensor_is_one_per_element_that_is_shared():
    per_tensor = {
        f"lr.{name}": torch.tensor(0.1 + 0.01 * i).double() for i, name in enumerate(INITIAL)
    }
    per_element = {
        key: value.expand(INITIAL[key.removeprefix("lr.")].shape)
        for key, value in per_tensor.items()
    }
    run = partial(
        hypergradient,
        network(),
        data=DATA,
        inner=GradientDescent(steps=3, lr=FromMeta("lr")),
        method="unrolled",
        batched=True,
    )
    by_tensor = run(INITIAL | per_tensor)
    by_element = run(INITIAL | per_element)
    assert relative_error(by_tensor.outer_loss, by_element.outer_loss) < 1e-14
    for key, elements in per_element.items():
        assert by_element.grads[key].shape == elements.shape
        assert relative_error(by_tensor.grads[key], by_element.grads[key].sum()) < 1e-12


def test_truncated_is_first_order_at_k_0_and_unrolled_at_k_t():
    inner = GradientDescent(steps=5, lr=0.1, momentum=0.4)
    run = partial(hypergradient, network(Proximal(0.3)), INITIAL, DATA, inner=inner, batched=True)
    for truncated, limit in ((Truncated(5), Unrolled()), (Truncated(0), FirstOrder())):
        assert largest_error(run(method=truncated).grads, run(method=limit).grads) < 1e-12
    none, two, all_steps = (run(method=Truncated(k)).grads["0.weight"] for k in (0, 2, 5))
    assert relative_error(none, two) > 1e-3
    assert relative_error(two, all_steps) > 1e-3


def test_truncated_is_the_unrolled_gradient_of_the_last_steps():
    """With K = 2 of 5, two steps that start at θ₃, as if θ₃ were the initialisation."""
    inner = GradientDescent(steps=5, lr=FromMeta("lr"))
    lr = torch.tensor(0.1, dtype=torch.float64)
    truncated = hypergradient(
        network(), INITIAL | {"lr": lr}, DATA, inner=inner, method=Truncated(2), batched=True
    )

    three_steps = GradientDescent(steps=3, lr=0.1)
    third = hypergradient(
        network(), INITIAL, DATA, inner=three_steps, method="first-order", batched=True
    )
    # θ₃ of each task is data now, and φ displaces it.
    from_third = BilevelProblem(
        init=lambda meta, data: {name: data[4][name] + meta[name] for name in INITIAL},
        inner_loss=network().inner_loss,
        outer_loss=outer,
    )
    zeros = {name: torch.zeros_like(p) for name, p in INITIAL.items()}
    expected = hypergradient(
        from_third,
        zeros | {"lr": lr},
        (*DATA, third.params),
        inner=inner.updated(steps=2),
        method="unrolled",
        batched=True,
    )
    assert largest_error(truncated.grads, expected.grads) < 1e-12


def test_a_multi_step_loss_receives_every_iterate():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def weighted_sum(params, meta, data):
        losses = [outer({n: p[t] for n, p in params.items()}, meta, data) for t in range(4)]
        return weights @ torch.stack(losses)

    result = hypergradient(
        BilevelProblem(network().init, network().inner_loss, weighted_sum),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=3, lr=0.1),
        method=Unrolled(iterates=True),
        batched=True,
    )
    assert result.params["0.weight"].shape == (TASKS, 4, 4, 2)

    def loss_at_start(weight):
        initial = INITIAL | {"0.weight": weight}
        return torch.stack([outer(initial, {}, [d[i] for d in DATA]) for i in range(TASKS)]).mean()

    expected = weights[0] * torch.func.grad(loss_at_start)(INITIAL["0.weight"])
    for t in (1, 2, 3):
        inner = GradientDescent(steps=t, lr=0.1)
        of_step = hypergradient(
            network(), INITIAL, DATA, inner=inner, method="unrolled", batched=True
        )
        expected = expected + weights[t] * of_step.grads["0.weight"]
    assert relative_error(result.grads["0.weight"], expected) < 1e-12


# `higher` adds Adam's ε before the bias correction. Torch adds it afterwards, and so do we. Both
# are one function at ε = 0.
HIGHER = {
    "sgd": (
        partial(torch.optim.SGD, lr=0.1),
        GradientDescent(steps=4, lr=0.1),
    ),
    "momentum": (
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        GradientDescent(steps=4, lr=0.1, momentum=0.9),
    ),
    "adam": (
        partial(torch.optim.Adam, lr=0.05, eps=0.0),
        TorchOptimizer(torch.optim.Adam, steps=4, lr=0.05, eps=0.0),
    ),
}


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [("sgd", "loop"), ("momentum", "vmap"), ("adam", "vmap"), ("adam", "loop")],
)
def test_unrolled_equals_a_plain_loop_of_higher(name, vectorize):
    make_optimizer, inner = HIGHER[name]
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.load_state_dict(INITIAL)
    for task in range(TASKS):
        optimizer = make_optimizer(model.parameters())
        context = higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)
        with context as (functional_model, stepper):
            for _ in range(4):
                stepper.step(F.mse_loss(functional_model(X[task]), Y[task]))
            (F.mse_loss(functional_model(XQ[task]), YQ[task]) / TASKS).backward()

    result = hypergradient(
        network(), INITIAL, DATA, inner=inner, method="unrolled", batched=True, vectorize=vectorize
    )
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert largest_error(result.grads, expected) < 1e-10


@pytest.mark.parametrize("method", ["first-order", Truncated(1), Truncated(3)], ids=str)
def test_truncation_changes_the_derivative_and_not_the_iterate(method):
    inner = GradientDescent(steps=3, lr=0.1, momentum=0.5)
    run = partial(hypergradient, network(), INITIAL, DATA, inner=inner, batched=True)
    assert largest_error(run(method=method).params, run(method="unrolled").params) < 1e-14


def test_reptile_moves_towards_the_adapted_parameters():
    inner = GradientDescent(steps=3, lr=0.1)
    result = hypergradient(network(), INITIAL, DATA, inner=inner, method=Reptile(), batched=True)
    expected = {name: (p - result.params[name]).mean(0) for name, p in INITIAL.items()}
    assert largest_error(result.grads, expected) < 1e-13


def test_auxiliary_outputs_are_returned_detached():
    problem = BilevelProblem(
        network().init,
        network().inner_loss,
        lambda p, m, d: (outer(p, m, d), {"outputs": forward(p, d[2])}),
    )
    inner = GradientDescent(steps=2, lr=0.1)
    result = hypergradient(problem, INITIAL, DATA, inner=inner, method="first-order", batched=True)
    outputs = result.aux["outputs"]
    assert outputs.shape == (TASKS, POINTS, 1)
    assert not outputs.requires_grad
    assert relative_error((outputs - YQ).square().mean(), result.outer_loss) < 1e-14
