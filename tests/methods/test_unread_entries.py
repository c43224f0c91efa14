"""What the inner loss does not read keeps its value, also where the outer loss reads it."""

import pytest
import torch
from oracles import relative_error

from metaimplicit import BilevelProblem, GradientDescent, argmin, compilation, hypergradient
from metaimplicit.methods import FixedPoint, Implicit, ValueFunction
from metaimplicit.solvers import CG, MINRES, Dense, Lanczos, NystromCG, Status

pytestmark = pytest.mark.usefixtures("float64")

INNER = GradientDescent(steps=40, lr=0.8)
SOLVERS = [CG(max_steps=50, tol=1e-12), Dense(), Lanczos(max_steps=9), MINRES(max_steps=50)]
METHODS = [
    *map(Implicit, SOLVERS),
    Implicit(NystromCG(rank=3, max_steps=50, tol=1e-10)),
    Implicit(CG(max_steps=50, tol=1e-12), damping=1e-12),
    Implicit(CG(max_steps=50, tol=1e-8), products="finite-differences"),
    FixedPoint(),
]


def quadratic():
    """f = ½ wᵀA w − cᵀw, beside four numbers that g alone reads, and its dg/dc."""
    root = torch.randn(8, 6)
    a = root.mT @ root / 24 + 0.6 * torch.eye(6)
    meta = {"c": torch.randn(6)}

    def outer(params, meta, data):
        idle = params["idle"]
        return params["w"].sum() ** 2 + idle.sum() * params["w"][0] + 7 * idle.pow(3).sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(6), "idle": torch.ones(4)},
        inner_loss=lambda params, meta, data: (
            0.5 * params["w"] @ a @ params["w"] - meta["c"] @ params["w"]
        ),
        outer_loss=outer,
    )
    c = meta["c"].clone().requires_grad_()
    w = torch.linalg.solve(a, c)
    (expected,) = torch.autograd.grad(outer({"w": w, "idle": torch.ones(4)}, {}, None), c)
    return problem, meta, expected


def words():
    """A number for each of six words, of which the training set has four, and weights of examples.

    A word that is in training has the weighted mean of its targets.
    """
    train, validation = torch.arange(20) % 4, torch.arange(12) % 6
    y, y_validation = torch.randn(20), torch.randn(12)
    meta = {"log_weights": 0.3 * torch.randn(20)}

    def outer(params, meta, data):
        return (params["table"][validation] - y_validation).square().mean()

    problem = BilevelProblem(
        init=lambda meta, data: {"table": torch.zeros(6)},
        inner_loss=lambda params, meta, data: (
            meta["log_weights"].exp() @ (params["table"][train] - y).square() / 20
        ),
        outer_loss=outer,
    )
    log_weights = meta["log_weights"].clone().requires_grad_()
    shares = torch.stack([log_weights.masked_fill(train != k, -torch.inf) for k in range(4)])
    table = torch.cat([shares.softmax(1) @ y, torch.zeros(2)])
    (expected,) = torch.autograd.grad(outer({"table": table}, {}, None), log_weights)
    return problem, meta, expected


@pytest.mark.parametrize("make", [quadratic, words])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_hypergradient_is_that_of_the_rest(make, method):
    """A warning would be an error here: the solve is as good as without these entries."""
    torch.manual_seed(0)
    problem, meta, expected = make()
    result = hypergradient(problem, meta, None, inner=INNER, method=method)
    (gradient,) = result.grads.values()
    assert relative_error(gradient, expected) < 1e-6
    assert result.report.status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize("products", ["double-backward", "finite-differences"])
def test_an_entry_that_a_weight_of_zero_hides_is_read(products):
    """With damping δ, its part of A u = v is δ u = v. Without, there is no solution."""
    y = torch.randn(3)
    meta = {"weights": torch.tensor([0.7, 0.0, 1.2])}
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.ones(3)},
        inner_loss=lambda params, meta, data: meta["weights"] @ (params["w"] - y).square() / 2,
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    method = Implicit(Dense(), damping=0.1, products=products)
    result = hypergradient(problem, meta, None, inner=INNER, method=method)
    expected = -(result.params["w"] - y) / (meta["weights"] + 0.1)
    torch.testing.assert_close(result.grads["weights"], expected, rtol=1e-7, atol=1e-9)


@pytest.fixture
def _uncompiled(monkeypatch):
    """The functions that would be compiled run as they are."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("compile", [False, True])
def test_an_entry_with_a_slope_is_read(compile):
    """|w₁ − 7| has no curvature, but the loop has not come to its minimum."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2)},
        inner_loss=lambda params, meta, data: (
            (params["w"][0] - meta["a"]).square() + (params["w"][1] - 7).abs()
        ),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    meta = {"a": torch.tensor(1.0)}
    options = {"inner": GradientDescent(steps=2, lr=0.3), "method": Implicit(MINRES())}
    with pytest.warns(RuntimeWarning, match="ended with BREAKDOWN"):
        hypergradient(problem, meta, None, compile=compile, **options)


@pytest.mark.usefixtures("_uncompiled")
def test_a_compiled_system_knows_them():
    torch.manual_seed(0)
    problem, meta, expected = quadratic()
    method = Implicit(CG(max_steps=50, tol=1e-12))
    result = hypergradient(problem, meta, None, inner=INNER, method=method, compile=True)
    assert relative_error(result.grads["c"], expected) < 1e-9
    assert result.report.status.tolist() == [Status.CONVERGED]


def test_the_penalty_method_holds_them():
    """Here y = w* + O(1/λ) and g is linear in w, so that the bias vanishes with 1/λ."""
    torch.manual_seed(0)
    problem, meta, expected = quadratic()
    result = hypergradient(problem, meta, None, inner=INNER, method=ValueFunction(strength=1e5))
    assert relative_error(result.grads["c"], expected) < 1e-3
    assert result.report.status.tolist() == [Status.CONVERGED]


def test_the_second_derivative_of_an_argmin_knows_them():
    torch.manual_seed(0)
    problem, meta, _ = quadratic()

    def g(c):
        meta = {"c": c}
        options = {"meta": meta, "data": None, "inner": INNER, "method": Implicit(Dense())}
        params = argmin(problem.inner_loss, init=problem.init, **options)
        return problem.outer_loss(params, meta, None)

    second = torch.autograd.functional.hessian(g, meta["c"])
    a = torch.func.hessian(lambda w: problem.inner_loss({"w": w}, meta, None))(torch.zeros(6))
    slope = torch.linalg.inv(a).sum(0)  # d(Σw)/dc, and g has 2 (Σw) Σw beside what is linear
    assert relative_error(second, 2 * torch.outer(slope, slope)) < 1e-9


def test_the_penalty_method_refuses_an_outer_loss_that_draws_random_numbers():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(())},
        inner_loss=lambda params, meta, data: (params["w"] - meta["c"]).square(),
        outer_loss=lambda params, meta, data: params["w"] + torch.randn(()) * meta["s"],
    )
    meta = {"c": torch.tensor(1.0), "s": torch.tensor(0.5)}
    with pytest.raises(ValueError, match="outer loss: it draws random numbers"):
        hypergradient(problem, meta, None, inner=INNER, method="f2sa")
