"""Inputs that are refused, and what the errors say."""

import random
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_problems import number, scalar_problem
from tanh_network import DATA, GAUSS_NEWTON, INITIAL, XQ, YQ, X, Y, forward, network, outer
from torch import nn

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    Dense,
    FixedPoint,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    Stream,
    Truncated,
    Tuner,
    Unrolled,
    check_hypergradient,
    hypergradient,
)
from metaimplicit.diagnostics import compare
from metaimplicit.methods.linearize import reject_random_numbers
from metaimplicit.tuning import HOAG

THREE_STEPS = GradientDescent(steps=3, lr=0.1)
PROXIMAL = network(Proximal(0.1))
run = partial(hypergradient, data=DATA, inner=THREE_STEPS, batched=True)


@pytest.mark.parametrize("method", ["unrolled", "cg", "forward", "fixed-point", "reptile", "sama"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda params, meta, data: meta["0.weight"].square().mean(),
        lambda params, meta, data: F.mse_loss(forward(params, data[0]).detach(), data[1]),
    ],
    ids=["of the meta-parameters alone", "detached"],
)
def test_an_inner_loss_that_depends_on_no_parameter_is_refused(loss, method):
    problem = BilevelProblem(network().init, loss, outer)
    with pytest.raises(ValueError, match="inner loss: it depends on no adapted parameter, such as"):
        run(problem, INITIAL, method=method)


# Tensors that a function captures.

SECRET = torch.ones(1).double().requires_grad_()
MODULE = nn.Linear(2, 1).double()


def loss_with_a_captured_tensor(params, meta, data):
    return F.mse_loss(forward(params, data[0]) * SECRET, data[1])


def loss_with_a_captured_module(params, meta, data):
    return F.mse_loss(forward(params, data[0]) + MODULE(data[0]), data[1])


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (loss_with_a_captured_tensor, "tensor 'SECRET'"),
        (loss_with_a_captured_module, r"parameter 'MODULE\.(weight|bias)'"),
    ],
)
def test_a_tensor_that_a_loss_captures_is_named(loss, name):
    as_inner_loss = BilevelProblem(network().init, loss, outer)
    as_outer_loss = BilevelProblem(network().init, network().inner_loss, loss)
    message = f"{name} requires grad and is captured"
    with pytest.raises(ValueError, match=message):
        run(as_inner_loss, INITIAL, method="unrolled")
    with pytest.raises(ValueError, match=message):
        run(as_outer_loss, INITIAL, method="first-order")


@pytest.mark.parametrize("method", ["unrolled", "first-order"])
def test_a_tensor_that_init_captures_is_named(method):
    problem = BilevelProblem(
        lambda m, d: {n: m[n] + SECRET for n in INITIAL}, network().inner_loss, outer
    )
    with pytest.raises(ValueError, match="tensor 'SECRET' requires grad and is captured"):
        run(problem, INITIAL, method=method)


def test_a_tensor_that_a_later_step_of_a_stream_captures_is_refused():
    stream = Stream(lambda t: DATA if t == 0 else (X * SECRET, Y, XQ, YQ))
    with pytest.raises(ValueError, match="requires grad and is captured"):
        run(network(), INITIAL, data=stream, method="unrolled")


def test_a_step_size_that_requires_grad_is_refused():
    lr = number(0.1).requires_grad_()
    message = r"lr: got a tensor that requires grad, expected FromMeta\('lr'\)"
    with pytest.raises(ValueError, match=message):
        run(network(), INITIAL, inner=GradientDescent(lr=lr), method="unrolled")


# What the functions of a problem return.


def test_an_inner_loss_that_is_no_scalar_is_refused():
    problem = BilevelProblem(network().init, lambda p, m, d: forward(p, d[0]), outer)
    message = r"inner_loss: got shape \(6, 1\) per task, expected a scalar"
    with pytest.raises(ValueError, match=message):
        run(problem, INITIAL, method="unrolled")


def test_an_outer_loss_that_is_no_tensor_is_refused():
    problem = BilevelProblem(network().init, network().inner_loss, lambda p, m, d: 1.0)
    with pytest.raises(ValueError, match="outer_loss: got float per task"):
        run(problem, INITIAL, method="unrolled", batched=False)


def test_an_init_without_parameters_is_refused():
    problem = BilevelProblem(lambda m, d: {}, PROXIMAL.inner_loss, outer)
    message = "expected a non-empty dict of floating-point tensors"
    with pytest.raises(ValueError, match=message):
        run(problem, INITIAL, method="cg")


def test_a_curvature_that_reads_outputs_of_several_tensors_is_refused():
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros(2)},
        Composite(
            outputs=lambda p, m, d: (p["w"], m["a"]),
            loss=lambda z, d: (z[0] - z[1]).square().sum(),
        ),
        lambda p, m, d: p["w"].sum(),
    )
    meta = {"a": torch.ones(2)}
    method = Implicit(curvature="gauss-newton")
    with pytest.raises(ValueError, match="outputs: got tuple, expected one tensor"):
        hypergradient(problem, meta, None, inner=THREE_STEPS, method=method)
    # The Hessian does not read them: θ* = a, so g = Σ a.
    gradient = hypergradient(problem, meta, None, inner=THREE_STEPS, method="cg").grads["a"]
    torch.testing.assert_close(gradient, torch.ones(2))


def test_gauss_newton_of_a_plain_function_is_refused():
    problem = BilevelProblem(PROXIMAL.init, lambda p, m, d: PROXIMAL.inner_loss(p, m, d), outer)
    with pytest.raises(ValueError, match="expected a Composite"):
        run(problem, INITIAL, method=Implicit(curvature="gauss-newton"))


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "sgd"},
            "method: got 'sgd', expected one of unrolled, truncated, forward, real-time, "
            "first-order",
        ),
        ({"method": Truncated(4)}, "Truncated steps: got 4, expected at most 3"),
        (
            {"method": Truncated(1), "inner": GradientDescent(steps=3, tol=0.1)},
            "Truncated: got an inner loop with tol=0.1",
        ),
        (
            {"method": Unrolled(iterates=True), "inner": GradientDescent(tol=0.1)},
            "Unrolled iterates: got an inner loop with tol=0.1",
        ),
        ({"vectorize": "fast"}, "vectorize: got 'fast'"),
        ({"meta": {}}, "meta: got dict"),
        (
            {"inner": GradientDescent(lr=FromMeta("nowhere"))},
            r"FromMeta\('nowhere'\): meta has no such entry",
        ),
    ],
)
def test_a_bad_argument_of_hypergradient_is_refused(arguments, message):
    arguments = {"problem": PROXIMAL, "meta": INITIAL, "method": "unrolled"} | arguments
    with pytest.raises(ValueError, match=message):
        run(**arguments)


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (partial(Truncated, -1), "Truncated steps: got -1, expected at least 0"),
        (partial(Truncated, 1.5), "Truncated steps: got 1.5, expected a whole number"),
        (
            partial(CG, max_steps=10.0),
            "CG max_steps: got 10.0, expected a whole number, at least 1",
        ),
        (partial(Dense, chunk=0), "Dense chunk: got 0, expected at least 1"),
        (partial(Implicit, "cg"), r"solver: got 'cg', expected a solver, such as CG\(\)"),
        (
            partial(FixedPoint, "gmres"),
            "FixedPoint solver: got 'gmres', expected a solver, such as",
        ),
        (partial(FixedPoint, radius_steps=-1), "radius_steps: got -1, expected at least 0"),
        (partial(Implicit, curvature="fisher"), "curvature: got 'fisher', expected one of"),
        (partial(Implicit, damping=-1.0), "damping: got -1.0, expected a number ≥ 0"),
        (partial(Proximal, -1.0), "Proximal strength: got -1.0, expected a number ≥ 0"),
        (partial(Proximal, 1.0, center="mean"), "Proximal center: got 'mean', expected 'meta'"),
    ],
)
def test_a_bad_argument_of_a_constructor_is_refused(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


@pytest.mark.parametrize(
    "enter",
    [
        run,
        partial(check_hypergradient, data=DATA, inner=THREE_STEPS, method="cg"),
        partial(compare, data=DATA, inner=THREE_STEPS),
        partial(Tuner, inner=THREE_STEPS),
        partial(HOAG, train=DATA, validation=DATA),
    ],
    ids=["hypergradient", "check_hypergradient", "compare", "Tuner", "HOAG"],
)
def test_a_problem_that_is_none_is_refused(enter):
    options = {"method": "cg"} if enter is run else {}
    with pytest.raises(ValueError, match=r"problem: got str, expected a BilevelProblem$"):
        enter("problem", meta=INITIAL, **options)
    tuning = SimpleNamespace(problem=PROXIMAL)
    with pytest.raises(ValueError, match=r"got SimpleNamespace.*; pass its \.problem$"):
        enter(tuning, meta=INITIAL, **options)


def test_a_negative_proximal_strength_from_meta_is_refused():
    meta = INITIAL | {"proximal": number(-0.5)}
    problem = network(Proximal(FromMeta("proximal")))
    with pytest.raises(ValueError, match=r"proximal strength: got -0.5 from meta"):
        run(problem, meta, method=GAUSS_NEWTON)


def test_a_proximal_center_without_an_entry_for_a_parameter_is_refused():
    message = "Proximal center: meta has no entry 'w', expected one for each parameter"
    with pytest.raises(ValueError, match=message):
        Proximal(1.0)({"w": torch.zeros(2)}, {"a": torch.ones(2)})


def test_the_value_function_of_a_loss_that_draws_random_numbers_is_refused():
    """Its difference of two losses would be that of their draws."""
    noisy = scalar_problem(
        lambda w, meta: (w - meta["c"] + 0.1 * torch.randn(())).square(), lambda w, meta: w
    )
    with pytest.raises(ValueError, match=r"inner loss: it draws random numbers \(dropout\?\)"):
        hypergradient(noisy, {"c": number(2.0)}, None, inner=THREE_STEPS, method="f2sa")


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
@pytest.mark.parametrize("method", ["cg", "dense", "f2sa", "fixed-point"])
def test_a_loss_that_draws_random_numbers_of_the_host_is_refused(method, draw):
    noisy = scalar_problem(
        lambda w, meta: (w - meta["c"] + 0.1 * draw()).square(), lambda w, meta: w
    )
    with pytest.raises(ValueError, match=r"inner loss: it draws random numbers \(dropout\?\)"):
        hypergradient(noisy, {"c": number(2.0)}, None, inner=THREE_STEPS, method=method)


@pytest.mark.parametrize(
    "result",
    [
        lambda p: p["w"][: random.randrange(1, 100)],
        lambda p: torch.tensor(10**6 + random.randrange(100)),
    ],
    ids=["shape", "integers"],
)
def test_results_that_differ_by_more_than_round_off_are_refused(result):
    """Integers have none, and neither has the number of rows that are drawn."""
    params = {"w": torch.zeros(100)}
    with pytest.raises(ValueError, match=r"inner loss: it draws random numbers"):
        reject_random_numbers(result)(params)


@pytest.fixture
def another_thread():
    """There is a thread that may draw random numbers, and waits."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_beside_another_thread_are_refused_and_go_on(draw):
    """The generators are not seeded, as the other thread may draw from them."""
    drawn = []

    def noise():
        drawn.append(draw())
        return 0.1 * drawn[-1]

    def seed():
        random.seed(5)
        np.random.seed(5)

    seed()
    noisy = scalar_problem(lambda w, meta: (w - meta["c"] + noise()).square(), lambda w, meta: w)
    with pytest.raises(ValueError, match=r"inner loss: it draws random numbers \(dropout\?\)"):
        hypergradient(noisy, {"c": number(2.0)}, None, inner=THREE_STEPS, method="cg")
    assert len(drawn) > 4
    seed()
    assert drawn == [draw() for _ in drawn]  # one stream, as without a check


@pytest.mark.usefixtures("another_thread")
def test_random_numbers_that_change_nothing_beside_another_thread_are_no_matter():
    test_random_numbers_of_the_host_that_change_nothing_are_no_matter()


def test_random_numbers_of_the_host_that_change_nothing_are_no_matter():
    """As where they are drawn for a log, or by another thread."""

    def inner_loss(w, meta):
        random.random()
        np.random.rand()
        return (w - meta["c"]).square()

    problem = scalar_problem(inner_loss, lambda w, meta: w)
    result = hypergradient(problem, {"c": number(2.0)}, None, inner=THREE_STEPS, method="cg")
    assert result.grads["c"].item() == pytest.approx(1)


def test_the_value_function_of_what_is_in_half_precision_is_refused():
    problem = scalar_problem(lambda w, meta: (w - meta["c"]).square(), lambda w, meta: w)
    meta = {"c": torch.tensor(2.0, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"f2sa: got 'c' in torch\.bfloat16, expected"):
        hypergradient(problem, meta, None, inner=THREE_STEPS, method="f2sa")
