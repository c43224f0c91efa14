"""Which gradients a method gives, and that it refuses those that it cannot give."""

from functools import partial

import pytest
import torch
from small_problems import number, scalar_problem
from tanh_network import DATA, GAUSS_NEWTON, INITIAL, network, outer

from metaimplicit import (
    BilevelProblem,
    FirstOrder,
    FromMeta,
    GradientDescent,
    Proximal,
    Truncated,
    hypergradient,
)

THREE_STEPS = GradientDescent(steps=3, lr=0.1)
LEARNT_LR = GradientDescent(steps=3, lr=FromMeta("lr"))
FIRST_ORDER = [Truncated(0), FirstOrder()]

run_network = partial(hypergradient, data=DATA, inner=THREE_STEPS, batched=True)


def flag_of(method):
    return method if isinstance(method, str) else method.flag


def start_at_a(meta, data):
    return {"w": meta["a"]}


# Gradients that a method cannot give.


@pytest.mark.parametrize(
    "method", [GAUSS_NEWTON, "first-order", "reptile", Truncated(0)], ids=flag_of
)
def test_a_step_size_is_refused_by_methods_that_do_not_differentiate_the_loop(method):
    meta = INITIAL | {"lr": number(0.1)}
    message = r"cannot give the gradient of meta\['lr'\].*(unrolled|implicit)"
    with pytest.raises(ValueError, match=message):
        run_network(network(Proximal(0.1)), meta, inner=LEARNT_LR, method=method)


def test_a_direct_gradient_of_a_step_size_does_not_hide_the_missing_one():
    problem = BilevelProblem(
        network().init, network().inner_loss, lambda p, m, d: outer(p, m, d) + 1e-3 * m["lr"]
    )
    meta = INITIAL | {"lr": number(0.1)}
    with pytest.raises(ValueError, match=r"first-order cannot give the gradient of meta\['lr'\]"):
        run_network(problem, meta, inner=LEARNT_LR, method="first-order")


def test_a_regulariser_is_refused_by_first_order():
    meta = INITIAL | {"proximal": number(0.1)}
    message = r"first-order cannot give the gradient of meta\['proximal'\]"
    with pytest.raises(ValueError, match=message):
        run_network(network(Proximal(FromMeta("proximal"))), meta, method="first-order")


def test_a_start_that_the_inner_loss_does_not_read_is_refused_by_implicit():
    message = r"implicit cannot give the gradient of meta\['0.weight'\].*proximal term"
    refused = pytest.raises(ValueError, match=message)
    # Without a penalty, A is singular as well.
    warned = pytest.warns(RuntimeWarning, match="NEGATIVE_CURVATURE")
    with warned, refused:
        run_network(network(), INITIAL, method=GAUSS_NEWTON)


@pytest.mark.parametrize("method", ["cg", "sama", "f2sa", "t1-t2"])
@pytest.mark.parametrize("direct", [0.0, 0.1])
def test_a_direct_gradient_of_a_start_does_not_hide_the_missing_one(direct, method):
    problem = scalar_problem(
        lambda w, m: (w - 1).square(), lambda w, m: w + direct * m["a"].square(), start_at_a
    )
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['a'\]"):
        hypergradient(problem, {"a": number(2.0)}, None, inner=THREE_STEPS, method=method)


@pytest.mark.parametrize("direct", [0.0, 0.1])
def test_unrolled_adds_the_direct_gradient_of_a_start(direct):
    """w₃ = 1 + 0.8³ (a − 1)."""
    problem = scalar_problem(
        lambda w, m: (w - 1).square(), lambda w, m: w + direct * m["a"].square(), start_at_a
    )
    result = hypergradient(problem, {"a": number(2.0)}, None, inner=THREE_STEPS, method="unrolled")
    assert result.grads["a"].item() == pytest.approx(0.8**3 + 2 * direct * 2.0, rel=1e-12)


@pytest.mark.parametrize("method", FIRST_ORDER, ids=flag_of)
def test_first_order_refuses_what_the_inner_loss_alone_reads(method):
    problem = scalar_problem(
        lambda w, m: (w - m["c"]).square(), lambda w, m: w.square(), start_at_a
    )
    meta = {"a": number(1.0), "c": number(3.0)}
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['c'\]"):
        hypergradient(problem, meta, None, inner=THREE_STEPS, method=method)


@pytest.mark.parametrize("method", FIRST_ORDER, ids=flag_of)
def test_first_order_gives_the_direct_gradient_of_what_both_losses_read(method):
    """w₁ = 1 − 0.1 · 2(1 − 3) = 1.4, so dg/dw = 2(w₁ − 3) = −3.2, and ∂g/∂c = 3.2."""
    problem = scalar_problem(
        lambda w, m: (w - m["c"]).square(), lambda w, m: (w - m["c"]).square(), start_at_a
    )
    meta = {"a": number(1.0), "c": number(3.0)}
    inner = GradientDescent(steps=1, lr=0.1)
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    grads = {name: g.item() for name, g in result.grads.items()}
    assert grads == pytest.approx({"a": -3.2, "c": 3.2})


# Gradients of zero.


def test_what_nothing_reads_has_a_gradient_of_zero():
    meta = INITIAL | {"unused": torch.ones(3).double(), "an integer": torch.tensor(3)}
    result = run_network(network(Proximal(0.1)), meta, method=GAUSS_NEWTON)
    assert torch.equal(result.grads["unused"], torch.zeros(3).double())
    assert result.grads["an integer"] == 0


@pytest.mark.parametrize("method", ["cg", "sama", "f2sa", "unrolled", "forward", "t1-t2"])
@pytest.mark.parametrize("direct", [0.0, 1.0])
def test_a_term_of_the_inner_loss_without_parameters_does_not_move_the_argmin(direct, method):
    """f = (w − a)² + b²: θ* does not depend on b, which has its direct gradient alone."""
    problem = scalar_problem(
        lambda w, m: (w - m["a"]).square() + m["b"].square(),
        lambda w, m: w.square() + direct * m["b"].square(),
    )
    meta = {"a": number(1.0), "b": number(2.0)}
    inner = GradientDescent(steps=12, lr=0.45)
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    assert result.grads["b"].item() == 4.0 * direct


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_the_step_size_of_a_parameter_that_does_not_move_has_a_gradient_of_zero(method):
    problem = BilevelProblem(
        lambda m, d: {"a": m["a"], "b": m["b"]},
        lambda p, m, d: p["a"].square(),
        lambda p, m, d: p["a"] + p["b"],
    )
    meta = {"a": number(1.0), "b": number(1.0), "lr.a": number(0.1), "lr.b": number(0.1)}
    inner = GradientDescent(steps=1, lr=FromMeta("lr"))
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    grads = {name: g.item() for name, g in result.grads.items()}
    assert grads == {"a": 0.8, "b": 1.0, "lr.a": -2.0, "lr.b": 0.0}
