"""`argmin` as a function that autograd differentiates."""

import threading
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from oracles import largest_error, quadratic, relative_error, ridge
from rank_group import run_on_ranks
from small_problems import number, zero
from torch.autograd.function import once_differentiable

from metaimplicit import (
    CG,
    BilevelProblem,
    Dense,
    FirstOrder,
    Forward,
    GradientDescent,
    Implicit,
    Truncated,
    Unrolled,
    argmin,
    hypergradient,
)
from metaimplicit.methods import SAMA

QUADRATIC = quadratic([[1.0, 1.2, 1.4], [1.0, 1.3, 1.5]])
RIDGE = ridge(m=600)
TO_CONVERGENCE = GradientDescent(steps=16, lr=0.75)
ONE_NEWTON_STEP = GradientDescent(steps=1, lr=1.0)  # for f = ½(w − …)²


def flag_of(method):
    return method.flag


def solve(oracle, meta, method, **options):
    return argmin(
        oracle.problem.inner_loss,
        oracle.problem.init,
        meta,
        oracle.data,
        inner=TO_CONVERGENCE,
        method=method,
        batched=True,
        **options,
    )


def variable(meta):
    return {name: m.clone().requires_grad_() for name, m in meta.items()}


@pytest.mark.parametrize("method", ["unrolled", "dense", Implicit(CG(20, 1e-12))], ids=str)
@pytest.mark.parametrize("oracle", [QUADRATIC, RIDGE], ids=["quadratic", "ridge"])
def test_backward_through_argmin_is_the_hypergradient(oracle, method):
    meta = variable(oracle.meta)
    params = solve(oracle, meta, method)
    outer_losses = torch.vmap(lambda p, d: oracle.problem.outer_loss(p, meta, d))
    outer_losses(params, oracle.data).mean().backward()
    assert largest_error({name: m.grad for name, m in meta.items()}, oracle.exact) < 1e-8


@pytest.mark.parametrize("method", ["unrolled", "dense"])
def test_it_composes_with_code_before_and_after_it(method):
    phi = QUADRATIC.meta["phi"].clone().requires_grad_()
    params = solve(QUADRATIC, {"phi": phi.exp()}, method)
    params["theta"].square().sum().backward()

    h, b, _ = QUADRATIC.data
    same_phi = phi.detach().clone().requires_grad_()
    torch.linalg.solve(h, b @ same_phi.exp()).square().sum().backward()
    assert relative_error(phi.grad, same_phi.grad) < 1e-8


@pytest.mark.parametrize("method", ["unrolled", "dense"])
@pytest.mark.parametrize(
    "function", [lambda a: a, lambda a: 3 * a, torch.exp], ids=["same", "triple", "exp"]
)
def test_an_entry_of_meta_may_be_a_function_of_another(function, method):
    """f = ½‖θ − a·b‖², so θ* = a·b."""
    a = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    params = argmin(
        lambda p, m, d: 0.5 * (p["theta"] - m["a"] * m["b"]).square().sum(),
        lambda m, d: {"theta": torch.zeros(3, dtype=torch.float64)},
        {"a": a, "b": function(a)},
        None,
        inner=GradientDescent(steps=3, lr=1.0),
        method=method,
    )
    params["theta"].sum().backward()

    same_a = a.detach().clone().requires_grad_()
    (same_a * function(same_a)).sum().backward()
    assert relative_error(a.grad, same_a.grad) < 1e-12


@pytest.mark.parametrize("method", [SAMA(), Forward(), Implicit(), Unrolled()], ids=flag_of)
def test_every_pullback_handles_an_entry_that_is_a_function_of_another(method):
    """f = ½(w − a − b)² with b = 2a, so θ* = 3a."""
    a = number(0.5).requires_grad_()
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"] - m["b"]).square(),
        zero,
        {"a": a, "b": 2 * a},
        None,
        inner=ONE_NEWTON_STEP,
        method=method,
    )
    assert params["w"].item() == 1.5
    params["w"].backward()
    assert a.grad.item() == pytest.approx(3.0, rel=1e-9)


def test_one_problem_has_no_task_axis():
    data = tuple(x[0] for x in QUADRATIC.data)
    params = argmin(
        QUADRATIC.problem.inner_loss,
        QUADRATIC.problem.init,
        QUADRATIC.meta,
        data,
        inner=TO_CONVERGENCE,
        method="dense",
    )
    assert params["theta"].shape == (3,)


def test_an_entry_that_does_not_require_grad_gets_no_gradient():
    h, b, _ = QUADRATIC.data
    meta = variable(QUADRATIC.meta) | {"constant": torch.ones(2)}
    solve(QUADRATIC, meta, "dense")["theta"].sum().backward()
    u = torch.linalg.solve(h, torch.ones(2, 3).double())
    assert relative_error(meta["phi"].grad, torch.einsum("tij,ti->j", b, u)) < 1e-8
    assert meta["constant"].grad is None


@pytest.mark.parametrize("method", ["unrolled", "dense"])
def test_there_is_no_graph_under_no_grad(method):
    meta = variable(QUADRATIC.meta)
    with torch.no_grad():
        params = solve(QUADRATIC, meta, method)
    assert not params["theta"].requires_grad


@pytest.mark.parametrize("method", ["unrolled", "dense"])
def test_there_is_no_graph_where_nothing_requires_grad(method):
    params = solve(QUADRATIC, QUADRATIC.meta, method)
    assert not any(p.requires_grad for p in params.values())


def test_backward_twice_through_a_retained_graph_doubles_the_gradient():
    meta = variable(QUADRATIC.meta)
    loss = solve(QUADRATIC, meta, Implicit(Dense()))["theta"].sum()
    loss.backward(retain_graph=True)
    once = meta["phi"].grad.clone()
    loss.backward()
    assert relative_error(meta["phi"].grad, 2 * once) < 1e-15


# Second derivatives.


def first_derivative(meta, method, loss=lambda theta: theta.square().sum()):
    value = loss(solve(QUADRATIC, meta, method)["theta"])
    (gradient,) = torch.autograd.grad(value, meta["phi"], create_graph=True)
    return gradient


@pytest.mark.parametrize("method", [pytest.param("unrolled", marks=pytest.mark.slow), "dense"])
def test_unrolled_and_implicit_can_be_differentiated_twice(method):
    meta = variable(QUADRATIC.meta)
    gradient = first_derivative(meta, method)
    rows = [torch.autograd.grad(g, meta["phi"], retain_graph=True)[0] for g in gradient]
    h, b, _ = QUADRATIC.data
    jacobian = torch.linalg.solve(h, b)
    expected = 2 * torch.einsum("tij,tik->jk", jacobian, jacobian)
    assert relative_error(torch.stack(rows), expected) < 1e-8


SQUARE = pytest.param(lambda theta: theta.square().sum(), id="square")
LINEAR = pytest.param(torch.sum, id="linear")


@pytest.mark.parametrize("method", ["forward", "fixed-point", "sama"])
@pytest.mark.parametrize("loss", [SQUARE, LINEAR])
def test_a_second_derivative_of_another_method_is_refused(loss, method):
    """For a linear loss, the gradient depends on φ through the pullback alone."""
    gradient = first_derivative(variable(QUADRATIC.meta), method, loss)
    with pytest.raises(RuntimeError, match=r"argmin is differentiable once under .*unrolled"):
        gradient.sum().backward()


@pytest.mark.parametrize("method", ["dense", "forward"])
def test_the_gradient_is_differentiable_in_the_vector_that_is_pulled_back(method):
    """It is linear in that vector, here a function of w: w Σθ* + w Σφ."""
    meta = variable(QUADRATIC.meta)
    w = number(2.0).requires_grad_()
    loss = w * solve(QUADRATIC, meta, method)["theta"].sum() + w * meta["phi"].sum()
    (gradient,) = torch.autograd.grad(loss, meta["phi"], create_graph=True)
    if method == "forward":
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(gradient.sum(), w)
        return
    (actual,) = torch.autograd.grad(gradient.sum(), w)
    h, b, _ = QUADRATIC.data
    assert relative_error(actual, torch.linalg.solve(h, b).sum() + len(meta["phi"])) < 1e-8


# Refusals.


@pytest.mark.parametrize("method", ["first-order", "dense"])
def test_a_gradient_that_the_method_cannot_give_is_refused(method):
    meta = variable(RIDGE.meta | {"w": torch.zeros(6).double()})
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['(w|log_decay)'\]"):
        argmin(
            RIDGE.problem.inner_loss,
            lambda m, d: {"w": m["w"]},
            meta,
            RIDGE.data,
            inner=TO_CONVERGENCE,
            method=method,
            batched=True,
        )["w"].sum().backward()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("reptile", "got 'reptile', which is no derivative"),
        ("f2sa", "got 'f2sa', which is no derivative without its outer loss"),
    ],
)
def test_a_method_that_does_not_differentiate_the_argmin_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        solve(RIDGE, RIDGE.meta, method)


@pytest.mark.parametrize("method", [SAMA(), Forward(), Implicit()], ids=flag_of)
def test_a_tensor_that_is_not_in_meta_is_refused(method):
    a = number(0.5).requires_grad_()
    captured = 2 * a
    with pytest.raises(ValueError, match="requires grad and is captured by a loss"):
        argmin(
            lambda p, m, d: 0.5 * (p["w"] - m["a"] - captured).square(),
            zero,
            {"a": a},
            None,
            inner=ONE_NEWTON_STEP,
            method=method,
        )


@pytest.mark.parametrize(
    "transform", [torch.vmap, torch.func.jacrev, torch.func.jacfwd], ids=["vmap", "rev", "fwd"]
)
def test_a_call_within_a_transform_says_what_to_do(transform):
    def minimum(a):
        return argmin(
            lambda p, m, d: (p["w"] - m["a"]).square().sum(),
            lambda m, d: {"w": torch.zeros(3)},
            {"a": a},
            None,
            inner=ONE_NEWTON_STEP,
            method="dense",
        )["w"]

    with pytest.raises(RuntimeError, match=r"within a transform of torch\.func.*batched=True"):
        transform(minimum)(torch.ones(3, 3))


@pytest.mark.parametrize("method", [SAMA(), Implicit(), Forward(), Unrolled()], ids=flag_of)
def test_meta_that_is_changed_in_place_before_backward_is_refused(method):
    a = number(1.0).requires_grad_()
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"].square()).square(),
        zero,
        {"a": a},
        None,
        inner=ONE_NEWTON_STEP,
        method=method,
    )
    with torch.no_grad():
        a.add_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        params["w"].backward()


@dataclass
class Batch:
    """Data in an object that no pytree knows."""

    x: torch.Tensor
    names: list

    def __getitem__(self, name):
        return getattr(self, name)


@pytest.mark.parametrize("container", [dict, Batch])
@pytest.mark.parametrize("method", [SAMA(), Implicit(), Forward(), Unrolled()], ids=flag_of)
def test_data_that_are_changed_in_place_before_backward_are_refused(method, container):
    a = number(1.0).requires_grad_()
    data = container(x=number(2.0), names=["x"])
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"] * d["x"]).square(),
        zero,
        {"a": a},
        data,
        inner=ONE_NEWTON_STEP,
        method=method,
    )
    data["x"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        params["w"].backward()


@pytest.mark.parametrize(
    "method", [Implicit(), Unrolled(), Truncated(1), FirstOrder()], ids=flag_of
)
def test_meta_may_be_made_in_inference_mode(method):
    with torch.inference_mode():
        a = number(3.0)
        params = argmin(
            lambda p, m, d: 0.5 * (p["w"] - m["a"].square()).square(),
            zero,
            {"a": a},
            None,
            inner=ONE_NEWTON_STEP,
            method=method,
        )
    assert params["w"] == 9


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_a_batch_of_vectors_is_refused(strategy):
    a = number(1.0).requires_grad_()
    with pytest.raises(RuntimeError, match="leave out is_grads_batched=True"):
        torch.autograd.functional.jacobian(
            lambda a: argmin(
                lambda p, m, d: 0.5 * (p["w"] - m["a"]).square(),
                zero,
                {"a": a},
                None,
                inner=ONE_NEWTON_STEP,
                method="dense",
            )["w"],
            a,
            vectorize=True,
            strategy=strategy,
        )


def test_complex_numbers_are_refused():
    message = r"meta\['a'\]: got torch.complex64, expected real numbers"
    with pytest.raises(ValueError, match=message):
        argmin(
            lambda p, m, d: p["w"].square(),
            zero,
            {"a": torch.ones((), dtype=torch.complex64, requires_grad=True)},
            None,
            inner=ONE_NEWTON_STEP,
            method="cg",
        )


def test_features_that_are_no_function_are_refused():
    loss = torch.nn.functional.mse_loss
    with pytest.raises(TypeError, match=r"^features: got int, expected a function \(meta, data\)"):
        BilevelProblem(lambda meta, data: {}, loss, loss, features=3)


def test_a_start_that_is_no_function_is_refused():
    message = r"^init: got dict, expected a function \(meta, data\) -> params"
    with pytest.raises(TypeError, match=message):
        argmin(
            lambda p, m, d: (p["w"] - m["a"]).square(),
            {"w": torch.zeros(())},
            {"a": torch.ones(())},
            None,
            inner=ONE_NEWTON_STEP,
            method="cg",
        )


def test_hypergradient_does_not_touch_the_grad_of_meta():
    meta = variable(QUADRATIC.meta)
    run = partial(hypergradient, QUADRATIC.problem, meta, QUADRATIC.data, batched=True)
    run(inner=GradientDescent(steps=5, lr=0.1), method="cg")
    assert meta["phi"].grad is None


def free_a_graph_of_two_long_loops(rank):
    """The derivative, which is nearly 1. The process ends here if its stack overflows."""

    def approach(target):
        return argmin(
            lambda params, meta, data: (params["w"] - meta["target"]).square(),
            init=lambda meta, data: {"w": torch.zeros(())},
            meta={"target": target},
            data=None,
            inner=GradientDescent(steps=400, lr=0.02),
            method="unrolled",
        )["w"]

    def differentiate():
        target = torch.tensor(3.0, requires_grad=True)
        approach(approach(target)).backward()
        derivatives.append(round(target.grad.item(), 4))

    derivatives = []
    threading.stack_size(2**19)  # that of threads on macOS
    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    return derivatives


def test_the_graph_of_a_long_loop_can_be_freed():
    """Torch overflows the stack when it frees a long graph whose nodes were looked at."""
    assert run_on_ranks(free_a_graph_of_two_long_loops, 1, join=False) == [[1.0]]


def test_what_computed_an_entry_of_meta_need_not_be_differentiable_twice():
    class Triple(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        @once_differentiable
        def backward(ctx, gradient):
            return 3 * gradient

    x = torch.tensor(2.0, requires_grad=True)
    (slope,) = torch.autograd.grad(Triple.apply(x).square(), x, create_graph=True)
    scale = torch.tensor(0.5, requires_grad=True)
    target = argmin(
        lambda params, meta, data: 0.5 * (params["w"] - meta["scale"] * meta["slope"]).square(),
        lambda meta, data: {"w": torch.zeros(())},
        {"scale": scale, "slope": slope},
        None,
        inner=ONE_NEWTON_STEP,
        method="unrolled",
    )
    target["w"].backward(inputs=[scale])
    assert scale.grad == 36.0
