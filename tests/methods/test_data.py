"""What the losses see: streams, the batch of an implicit method, and the forms that data take."""

from collections import UserDict
from dataclasses import replace
from enum import Enum
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import finite_difference, largest_error, randn, relative_error
from small_problems import number, zero
from tanh_network import DATA, INITIAL, XQ, YQ, X, Y, forward, network, outer
from torch import nn

from metaimplicit import (
    BilevelProblem,
    Dense,
    GradientDescent,
    Implicit,
    Proximal,
    Stream,
    Unrolled,
    hypergradient,
)
from metaimplicit.labels import SHORT_INTEGERS
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import SAMA, ValueFunction

TWO_STEPS = GradientDescent(steps=2, lr=0.1)
THREE_STEPS = GradientDescent(steps=3, lr=0.1)
# What the two steps and the outer loss see: support sets by number, shifted query inputs.
PARTS = [(randn(3, 6, 2, seed=40 + t), randn(3, 6, 1, seed=50 + t), XQ + t, YQ) for t in range(3)]

# Streams.


def test_the_gradient_of_a_stream_agrees_with_finite_differences():
    run = partial(
        hypergradient,
        network(Proximal(0.5)),
        data=Stream(lambda t: (X[:, t % 3 : t % 3 + 3], Y[:, t % 3 : t % 3 + 3], XQ, YQ)),
        inner=THREE_STEPS,
        method="unrolled",
        batched=True,
    )
    direction = randn(4, 2, seed=30)
    expected = finite_difference(
        lambda w: run(INITIAL | {"0.weight": w}).outer_loss,
        at=INITIAL["0.weight"],
        direction=direction,
    )
    slope = (run(INITIAL).grads["0.weight"] * direction).sum()
    assert float(slope) == pytest.approx(float(expected), rel=1e-7)


def test_init_sees_the_first_part_each_step_its_own_and_the_outer_loss_the_last():
    steps_seen = []

    def part(t):
        steps_seen.append(t)
        return PARTS[t]

    problem = BilevelProblem(
        lambda meta, data: {n: meta[n] + 0.1 * data[0].mean() for n in INITIAL},
        network(Proximal(0.5)).inner_loss,
        outer,
    )
    result = hypergradient(
        problem, INITIAL, Stream(part), inner=TWO_STEPS, method="unrolled", batched=True
    )
    assert set(steps_seen) == {0, 1, 2}

    # The same procedure in plain torch.
    shift = 0.1 * PARTS[0][0].mean((1, 2))
    params = {n: p + shift.reshape(-1, *[1] * p.dim()) for n, p in INITIAL.items()}
    inner_loss = torch.vmap(problem.inner_loss, in_dims=(0, None, 0))
    for t in range(2):
        grads = torch.func.grad(lambda p, t=t: inner_loss(p, INITIAL, PARTS[t]).sum())(params)
        params = {n: p - 0.1 * grads[n] for n, p in params.items()}
    expected = torch.vmap(outer, in_dims=(0, None, 0))(params, {}, PARTS[2]).mean()
    assert relative_error(result.outer_loss, expected) < 1e-12


def test_the_curvature_sees_the_batch_at_the_parameters_that_the_stream_led_to():
    support = PARTS[1][:2]
    problem = network(Proximal(0.5))
    result = hypergradient(
        problem,
        INITIAL,
        Stream(lambda t: PARTS[t]),
        inner=TWO_STEPS,
        method=Implicit(Dense(), batch=PARTS[1]),
        batched=True,
    )

    # The same θ* and the same query set as plain data, with an inner loop that does not move.
    at_solution = BilevelProblem(
        lambda meta, data: {n: data[2][n] + 0 * meta[n] for n in INITIAL},
        problem.inner_loss,
        lambda p, m, d: outer(p, m, (None, None, d[3], d[4])),
    )
    expected = hypergradient(
        at_solution,
        INITIAL,
        (*support, result.params, *PARTS[2][2:]),
        inner=GradientDescent(steps=1, lr=1e-300),
        method="dense",
        batched=True,
    )
    assert largest_error(result.grads, expected.grads) < 1e-12


@pytest.mark.parametrize(
    "method", ["cg", SAMA(), ValueFunction()], ids=["implicit", "sama", "f2sa"]
)
def test_a_stream_needs_a_batch_for_derivatives_at_the_solution(method):
    run = partial(hypergradient, network(Proximal(0.5)), INITIAL, Stream(lambda t: DATA))
    with pytest.raises(ValueError, match="batch: got none with a Stream"):
        run(inner=THREE_STEPS, method=method, batched=True)


def test_a_batch_beside_plain_data_is_refused():
    run = partial(hypergradient, network(Proximal(0.1)), INITIAL, DATA, inner=THREE_STEPS)
    with pytest.raises(ValueError, match="Implicit batch: got one with data that is not a Stream"):
        run(method=Implicit(Dense(), batch=DATA), batched=True)


# Data.

PROBLEM = BilevelProblem(
    zero,
    lambda p, m, d: (p["w"] - m["a"] * d["x"].sum()).square(),
    lambda p, m, d: p["w"],
)


class Colour(Enum):
    RED = 1


def test_objects_without_tensors_may_be_part_of_the_data():
    others = [Path("."), Colour.RED, slice(2), range(3), np.bool_(True), nn.Linear(1, 1)]
    run = partial(
        hypergradient,
        PROBLEM,
        {"a": number(1.0)},
        inner=THREE_STEPS,
        method=Implicit(batch=None),
        batched=True,
    )
    x = randn(3, 2, seed=1)
    assert run({"x": x, "others": others}).grads["a"] == run({"x": x}).grads["a"]


def test_a_container_that_hides_its_tensors_is_refused():
    data = (torch.ones(3), UserDict(x=randn(3, 2, seed=1)))
    with pytest.raises(ValueError, match="data: got UserDict, which cannot be split by task"):
        hypergradient(
            PROBLEM, {"a": number(1.0)}, data, inner=THREE_STEPS, method="cg", batched=True
        )


def test_an_array_is_refused():
    data = (X, Y.numpy(), XQ, YQ)
    with pytest.raises(ValueError, match="data: got ndarray, which cannot be split by task"):
        hypergradient(network(), INITIAL, data, inner=THREE_STEPS, method="unrolled", batched=True)


def test_tensors_with_different_numbers_of_tasks_are_refused():
    data = (X, Y[:2], XQ, YQ)
    with pytest.raises(ValueError, match="expected every tensor to carry one task axis"):
        hypergradient(network(), INITIAL, data, inner=THREE_STEPS, method="unrolled", batched=True)


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Dense ended with NON_FINITE:RuntimeWarning")
@pytest.mark.parametrize(
    "method", ["unrolled", Unrolled(memory="replay"), "forward", "sama", "dense"], ids=repr
)
def test_a_task_that_is_not_finite_makes_the_gradient_nan(method):
    """A tolerance does not stop it as if it were solved: NaN is not below the tolerance."""
    problem = BilevelProblem(
        zero, lambda p, m, d: d["x"] * (p["w"] - m["a"]).square(), lambda p, m, d: p["w"]
    )
    run = partial(
        hypergradient,
        problem,
        {"a": number(1.0)},
        {"x": torch.tensor([1.0, torch.nan], dtype=torch.float64)},
        inner=GradientDescent(steps=3, tol=1e-3),
        batched=True,
    )
    result = run(method=method)
    assert result.grads["a"].isnan()
    assert result.losses[1].isnan()
    assert result.report.inner_steps.tolist() == [3, 3]


# Labels of short integer types, which torch's transformations refuse.


class CrossEntropy(nn.Module):
    """A loss module of the user that calls torch's loss by keyword."""

    def forward(self, outputs, targets):
        return torch.nn.functional.nll_loss(input=outputs.log_softmax(1), target=targets)


CROSS_ENTROPY = CrossEntropy()
LABELS = torch.tensor([[0, 1, 2, 2, 0, 1], [1, 1, 0, 2, 0, 2]])


# All types by one method. Others take them through derivatives of other kinds, for which two types
# suffice, and in a loop.
LABELLED = [("unrolled", t, "vmap") for t in SHORT_INTEGERS]
LABELLED += [
    (method, t, vectorize)
    for method in ("forward", "dense", "first-order", "f2sa", "sama")
    for t, vectorize in ((torch.uint8, "vmap"), (torch.uint16, "loop"))
]
LABELLED += [("unrolled", torch.uint8, "loop"), ("dense", torch.uint16, "vmap")]


@pytest.mark.parametrize(("method", "dtype", "vectorize"), LABELLED, ids=str)
def test_labels_of_every_integer_type_have_the_hypergradient_of_int64(dtype, method, vectorize):
    for loss in (torch.nn.functional.cross_entropy, CROSS_ENTROPY):
        short = with_labels(LABELS.to(dtype), loss, method, vectorize)
        assert torch.equal(short, with_int64(loss, method, vectorize))


def with_labels(labels, loss, method, vectorize):
    """The hypergradient of a linear classifier whose labels are of some integer type."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda params, meta, data: (
            loss(data[0] @ params["w"], data[1]) + (params["w"] - meta["w"]).square().sum()
        ),
        outer_loss=lambda params, meta, data: loss(data[0] @ params["w"], data[1]),
    )
    data = (randn(2, 6, 4, seed=3), labels)
    inner = GradientDescent(steps=1, lr=0.1)
    options = {"inner": inner, "method": method, "vectorize": vectorize}
    meta = {"w": randn(4, 3, seed=4)}
    return hypergradient(problem, meta, data, batched=True, **options).grads["w"]


@cache
def with_int64(loss, method, vectorize):
    return with_labels(LABELS, loss, method, vectorize)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_data_that_require_grad_are_constants_unless_they_are_entries_of_phi(vectorize):
    data = (X.clone().requires_grad_(), *DATA[1:])
    problem = LiftedProblem(network(), data, batched=True, vectorize=vectorize)
    theta = problem.init(INITIAL)
    assert not problem.inner(theta, INITIAL, problem.data).requires_grad
    with_entries = INITIAL | problem.entries.tensors
    assert problem.inner(theta, with_entries, problem.data).requires_grad


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_the_functions_without_data_take_the_tasks_that_they_are_given(vectorize):
    problem = LiftedProblem(network(), DATA, batched=True, vectorize=vectorize)
    theta = problem.init(INITIAL)
    expected = problem.inner(theta, INITIAL, problem.data)
    assert torch.equal(problem.without_data().inner(theta, INITIAL, DATA), expected)


def slope_by_a_leaf(params, x):
    """∂(sum of the outputs)/∂x by `torch.autograd.grad`, for which the loss makes a leaf."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(forward(params, x).sum(), x, create_graph=True)[0]


@torch.enable_grad()
def slope_in_place(params, x):
    x.requires_grad_()
    return torch.autograd.grad(forward(params, x).sum(), x, create_graph=True)[0]


def slope_by_a_transform(params, x):
    return torch.func.grad(lambda x: forward(params, x).sum())(x)


@pytest.mark.compared
@pytest.mark.parametrize("method", ["unrolled", Unrolled(memory="replay"), "dense"], ids=repr)
def test_a_loss_may_differentiate_in_its_inputs(method):
    def grads(slope):
        def penalised(params, meta, data):
            roughness = slope(params, data[0]).square().mean()
            return network().inner_loss(params, meta, data) + meta["strength"] * roughness

        problem = BilevelProblem(network().init, penalised, network().outer_loss)
        meta = INITIAL | {"strength": number(0.5)}
        if method == "dense":  # a start does not move the argmin
            problem = replace(problem, init=lambda meta, data: INITIAL)
            meta = {"strength": number(0.5)}
        options = {"inner": TWO_STEPS, "method": method, "batched": True}
        return hypergradient(problem, meta, DATA, **options).grads

    assert largest_error(grads(slope_by_a_leaf), grads(slope_by_a_transform)) < 1e-12


@pytest.mark.parametrize(
    "method",
    ["unrolled", Unrolled(memory="replay"), "dense", Implicit(Dense(), microbatch=4)],
    ids=["unrolled", "replay", "dense", "microbatch"],
)
def test_inputs_that_a_loss_makes_require_grad_are_new_in_every_call(method):
    """As models of energies do, whose outputs are forces, without a batch of tasks."""

    def grads(slope):
        def roughness(params, meta, data):
            return slope(params, data).square().mean() + meta["decay"] * sum(
                p.square().sum() for p in params.values()
            )

        problem = BilevelProblem(lambda meta, data: INITIAL, roughness, roughness)
        data = X[0].clone()
        options = {"inner": TWO_STEPS, "method": method}
        found = hypergradient(problem, {"decay": number(0.5)}, data, **options).grads
        assert not data.requires_grad
        return found

    assert largest_error(grads(slope_in_place), grads(slope_by_a_transform)) < 1e-12
