"""`argmin` as a function that autograd knows."""

from functools import partial

import pytest
import torch
from oracles import quadratic, relative_error, ridge

from metaimplicit import CG, Dense, GradientDescent, Implicit, argmin, hypergradient

QUADRATIC, RIDGE = quadratic([[0.5, 1.0, 2.0], [1.0, 1.5, 3.0]]), ridge()
SOLVE = partial(argmin, inner=GradientDescent(steps=400, lr=0.3))


def solved(oracle, meta, **kwargs):
    return SOLVE(
        oracle.problem.inner_loss, oracle.problem.init, meta, oracle.data, batched=True, **kwargs
    )


@pytest.mark.parametrize("method", ["unrolled", "dense", Implicit(CG(max_steps=20))], ids=str)
@pytest.mark.parametrize("oracle", [QUADRATIC, RIDGE], ids=["quadratic", "ridge"])
def test_backward_through_argmin_is_the_hypergradient(oracle, method):
    meta = {name: m.clone().requires_grad_() for name, m in oracle.meta.items()}
    params = solved(oracle, meta, method=method)
    torch.vmap(lambda p, d: oracle.problem.outer_loss(p, meta, d))(
        params, oracle.data
    ).mean().backward()
    for name, exact in oracle.exact.items():
        assert relative_error(meta[name].grad, exact) < 1e-8


@pytest.mark.parametrize("method", ["unrolled", "dense"])
def test_it_composes_with_code_before_and_after(method):
    raw = QUADRATIC.meta["phi"].clone().requires_grad_()
    params = solved(QUADRATIC, {"phi": raw.exp()}, method=method)
    params["theta"].square().sum().backward()
    h, b, _ = QUADRATIC.data
    free = raw.detach().clone().requires_grad_()
    torch.linalg.solve(h, b @ free.exp()).square().sum().backward()
    assert relative_error(raw.grad, free.grad) < 1e-8


def test_unrolled_is_differentiable_twice_and_implicit_says_it_is_not():
    meta = {"phi": QUADRATIC.meta["phi"].clone().requires_grad_()}
    h, b, _ = QUADRATIC.data
    exact = 2 * torch.einsum("tij,tik->jk", torch.linalg.solve(h, b), torch.linalg.solve(h, b))

    def first(method):
        params = solved(QUADRATIC, meta, method=method)
        return torch.autograd.grad(params["theta"].square().sum(), meta["phi"], create_graph=True)[
            0
        ]

    rows = [torch.autograd.grad(first("unrolled")[i], meta["phi"])[0] for i in range(3)]
    assert relative_error(torch.stack(rows), exact) < 1e-8
    with pytest.raises(
        RuntimeError, match=r"differentiable once under an implicit method.*unrolled"
    ):
        first("dense").sum().backward()


def test_one_problem_has_no_task_axis_and_other_inputs_no_gradient():
    h, b, t = (x[0] for x in QUADRATIC.data)
    meta = {"phi": QUADRATIC.meta["phi"].clone().requires_grad_(), "constant": torch.ones(2)}
    params = SOLVE(
        QUADRATIC.problem.inner_loss, QUADRATIC.problem.init, meta, (h, b, t), method="dense"
    )
    assert params["theta"].shape == (3,)
    params["theta"].sum().backward()
    assert (
        relative_error(meta["phi"].grad, b.T @ torch.linalg.solve(h, torch.ones(3).double())) < 1e-8
    )
    assert meta["constant"].grad is None
    with torch.no_grad():
        params = SOLVE(
            QUADRATIC.problem.inner_loss, QUADRATIC.problem.init, meta, (h, b, t), method="dense"
        )
    assert not params["theta"].requires_grad


@pytest.mark.parametrize("method", ["first-order", "dense"])
def test_gradients_that_cannot_be_given_are_refused(method):
    meta = {name: m.clone().requires_grad_() for name, m in RIDGE.meta.items()} | {
        "w": torch.zeros(6).double().requires_grad_()
    }
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['(w|log_decay)'\]"):
        SOLVE(
            RIDGE.problem.inner_loss,
            lambda m, d: {"w": m["w"]},
            meta,
            RIDGE.data,
            method=method,
            batched=True,
        )["w"].sum().backward()
    with pytest.raises(ValueError, match="got 'reptile', which is no derivative"):
        solved(RIDGE, meta, method="reptile")


def test_warning_free_backward_twice_with_a_retained_graph():
    meta = {"phi": QUADRATIC.meta["phi"].clone().requires_grad_()}
    loss = solved(QUADRATIC, meta, method=Implicit(Dense()))["theta"].sum()
    loss.backward(retain_graph=True)
    once = meta["phi"].grad.clone()
    loss.backward()
    assert relative_error(meta["phi"].grad, 2 * once) < 1e-15


def test_hypergradient_leaves_the_callers_tensors_alone():
    meta = {"phi": QUADRATIC.meta["phi"].clone().requires_grad_()}
    hypergradient(
        QUADRATIC.problem,
        meta,
        QUADRATIC.data,
        inner=GradientDescent(steps=5, lr=0.1),
        method="cg",
        batched=True,
    )
    assert meta["phi"].grad is None


@pytest.mark.parametrize("method", ["unrolled", "dense"])
@pytest.mark.parametrize(
    "second", [lambda a: a, lambda a: 3 * a, torch.exp], ids=["same", "thrice", "exp"]
)
def test_entries_of_meta_may_depend_on_one_another(second, method):
    """f = ½‖θ − a·b‖²:  θ* = a·b."""
    a = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    params = argmin(
        lambda p, m, d: 0.5 * (p["theta"] - m["a"] * m["b"]).square().sum(),
        lambda m, d: {"theta": torch.zeros(3, dtype=torch.float64)},
        {"a": a, "b": second(a)},
        None,
        inner=GradientDescent(steps=80, lr=0.5),
        method=method,
    )
    params["theta"].sum().backward()
    free = a.detach().clone().requires_grad_()
    (free * second(free)).sum().backward()
    assert relative_error(a.grad, free.grad) < 1e-12


def test_the_cotangent_cannot_be_differentiated_unnoticed():
    meta = {"phi": QUADRATIC.meta["phi"].clone().requires_grad_()}
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = w * solved(QUADRATIC, meta, method="dense")["theta"].sum() + w * meta["phi"].sum()
    gradient = torch.autograd.grad(loss, meta["phi"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), w)


@pytest.mark.parametrize("method", ["unrolled", "dense"])
def test_no_graph_is_left_under_no_grad(method):
    meta = {"phi": QUADRATIC.meta["phi"].clone().requires_grad_()}
    with torch.no_grad():
        assert not solved(QUADRATIC, meta, method=method)["theta"].requires_grad
