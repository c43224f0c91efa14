"""Gradients with respect to the tensors of data, against closed forms that torch differentiates."""

import pytest
import torch
from oracles import largest_error, randn, relative_error, ridge
from small_problems import number

from metaimplicit import (
    CG,
    BilevelProblem,
    FixedPoint,
    Forward,
    GradientDescent,
    Implicit,
    Stream,
    Unrolled,
    argmin,
    hypergradient,
    root,
)

TASKS, M, N = 3, 7, 2
RIDGE = ridge(TASKS, M, N)
META = {"log_decay": number(2.5)}
TO_CONVERGENCE = GradientDescent(steps=14, lr=0.0727)
EXACT = {
    "unrolled": Unrolled(),
    "forward": Forward(),
    "cg": Implicit(CG(max_steps=N)),
    "gauss-newton": Implicit(CG(max_steps=N), curvature="gauss-newton"),
    "fixed-point": FixedPoint(),
}
# Forward mode takes as many tangents as there are numbers in the data.
QUICK = {name: method for name, method in EXACT.items() if name != "forward"}
NAMES = ("x", "y", "x_val", "y_val")


def require_grad(data, *numbers):
    """Copies of the tensors, of which those with these numbers require grad (all by default)."""
    numbers = numbers or range(len(data))
    return tuple(t.detach().clone().requires_grad_(i in numbers) for i, t in enumerate(data))


def solve_ridge(x, y, log_decay):
    """argmin ‖Xw − y‖²/2m + eᵠ‖w‖²/2 of each task."""
    m, n = x.shape[-2:]
    a = x.mT @ x / m + log_decay.exp() * torch.eye(n, dtype=x.dtype)
    return torch.linalg.solve(a, x.mT @ y.unsqueeze(-1) / m).squeeze(-1)


def exact_gradients(data):
    """Those of mean_tasks g by plain autograd through the closed form, and that of φ."""
    x, y, x_val, y_val = data = require_grad(data)
    log_decay = META["log_decay"].clone().requires_grad_()
    w = solve_ridge(x, y, log_decay)
    distance = (x_val @ w.unsqueeze(-1)).squeeze(-1) - y_val
    loss = 0.5 * distance.square().mean()
    return torch.autograd.grad(loss, (*data, log_decay))


@pytest.mark.parametrize(
    ("method", "vectorize"),
    [
        *((method, "vmap") for method in EXACT.values()),
        (EXACT["unrolled"], "loop"),
        (EXACT["forward"], "loop"),
        (EXACT["cg"], "loop"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.flag,
)
def test_the_gradient_in_the_data_is_that_of_the_closed_form(method, vectorize):
    result = hypergradient(
        RIDGE.problem,
        META,
        require_grad(RIDGE.data),
        inner=TO_CONVERGENCE,
        method=method,
        batched=True,
        vectorize=vectorize,
    )
    *expected, of_decay = exact_gradients(RIDGE.data)
    actual = dict(zip(NAMES, result.data_grads, strict=True))
    assert largest_error(actual, dict(zip(NAMES, expected, strict=True))) < 1e-11
    assert relative_error(result.grads["log_decay"], of_decay) < 1e-11


@pytest.mark.parametrize("method", [EXACT["unrolled"], EXACT["cg"]], ids=["unrolled", "cg"])
def test_a_batch_is_the_mean_over_its_tasks(method):
    options = {"inner": TO_CONVERGENCE, "method": method}
    data = require_grad(RIDGE.data)
    batch = hypergradient(RIDGE.problem, META, data, batched=True, **options)
    for task in range(TASKS):
        one = hypergradient(RIDGE.problem, META, require_grad([x[task] for x in data]), **options)
        for of_batch, of_task in zip(batch.data_grads, one.data_grads, strict=True):
            assert relative_error(TASKS * of_batch[task], of_task) < 1e-12


@pytest.mark.parametrize("batched", [True, False])
def test_other_leaves_of_the_data_have_no_gradient(batched):
    """The data are nested, and hold integers, a string and tensors that do not require grad."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"] + data["support"][0].sum()},
        inner_loss=lambda p, m, d: (p["w"] - d["support"][0].sum() * d["support"][1]).square(),
        outer_loss=lambda p, m, d: p["w"] * d["query"],
    )
    x = randn(2, 3, seed=0).requires_grad_()
    k = torch.tensor([2, 3])
    query = randn(2, seed=1)
    data = {"support": [x, k], "query": query, "name": "toy"}
    if not batched:
        x = x[0].detach().requires_grad_()
        data = {"support": [x, k[0]], "query": query[0], "name": "toy"}
    result = hypergradient(
        problem,
        {"w": number(2.0)},
        data,
        inner=GradientDescent(steps=1, lr=0.25),
        method="unrolled",
        batched=batched,
    )
    # One step takes w to ½ (w₀ + Σx) + ½ k Σx.
    slope = query * (1 + k) / 4
    expected = slope[:, None].expand(2, 3) if batched else 2 * slope[0].expand(3)
    assert result.data_grads["support"][1] is None
    assert result.data_grads["query"] is None
    assert result.data_grads["name"] is None
    assert relative_error(result.data_grads["support"][0], expected) < 1e-14


def test_a_tensor_that_nothing_reads_has_a_gradient_of_zero():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda p, m, d: (p["w"] - m["w"]).square(),
        outer_loss=lambda p, m, d: p["w"],
    )
    data = torch.ones(2, requires_grad=True)
    result = hypergradient(problem, {"w": torch.ones(())}, data, inner=TO_CONVERGENCE, method="cg")
    assert result.data_grads.tolist() == [0.0, 0.0]
    assert data.grad is None


# argmin and root.


@pytest.mark.parametrize("method", QUICK.values(), ids=QUICK)
def test_backward_through_argmin_reaches_the_data(method):
    """The data are functions of one vector, as are features of a network."""

    def head(solve):
        scale = torch.linspace(0.8, 1.0, N, dtype=torch.float64).requires_grad_()
        x, y, x_val, y_val = RIDGE.data
        w = solve(x * scale, y)
        ((x_val * scale) @ w.unsqueeze(-1) - y_val.unsqueeze(-1)).square().sum().backward()
        return scale.grad

    def by_argmin(x, y):
        params = argmin(
            RIDGE.problem.inner_loss,
            RIDGE.problem.init,
            META,
            (x, y),
            inner=TO_CONVERGENCE,
            method=method,
            batched=True,
        )
        return params["w"]

    expected = head(lambda x, y: solve_ridge(x, y, META["log_decay"]))
    assert relative_error(head(by_argmin), expected) < 1e-11


def test_backward_through_a_root_reaches_the_data():
    x, y, *_ = require_grad(RIDGE.data, 0, 1)
    solution = solve_ridge(x, y, META["log_decay"])
    gradient = torch.func.grad(RIDGE.problem.inner_loss)
    params = root(gradient, {"w": solution.detach()}, META, (x, y), batched=True)
    weights = randn(TASKS, N, seed=5)
    actual = torch.autograd.grad((weights * params["w"]).sum(), (x, y))
    expected = torch.autograd.grad((weights * solution).sum(), (x, y))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-12


# Refusals.


def test_first_order_keeps_the_direct_gradient_and_refuses_the_rest():
    options = {"inner": GradientDescent(steps=3, lr=0.1), "method": "first-order"}
    problem = BilevelProblem(
        RIDGE.problem.init,
        lambda p, m, d: (d[0] @ p["w"] - d[1]).square().mean(),
        RIDGE.problem.outer_loss,
    )

    def run(data):
        return hypergradient(problem, META, data, batched=True, **options)

    result = run(require_grad(RIDGE.data, 3))
    x_val, y_val = RIDGE.data[2:]
    distance = (x_val @ result.params["w"].unsqueeze(-1)).squeeze(-1) - y_val
    assert relative_error(result.data_grads[3], -distance / (M * TASKS)) < 1e-14

    with pytest.raises(ValueError, match="first-order cannot give the gradient of data tensor 1"):
        run(require_grad(RIDGE.data, 1))


def test_a_stream_of_tensors_that_require_grad_is_refused():
    data = require_grad(RIDGE.data)
    with pytest.raises(ValueError, match="requires grad and is captured by a loss"):
        hypergradient(
            RIDGE.problem,
            META,
            Stream(lambda t: data),
            inner=GradientDescent(steps=2),
            method="unrolled",
            batched=True,
        )


def test_the_names_of_data_tensors_are_reserved():
    with pytest.raises(ValueError, match="meta: got an entry 'data tensor 0', expected another"):
        hypergradient(
            RIDGE.problem,
            META | {"data tensor 0": torch.ones(())},
            RIDGE.data,
            inner=TO_CONVERGENCE,
            method="cg",
            batched=True,
        )
