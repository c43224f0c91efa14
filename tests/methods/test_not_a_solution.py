"""What `argmin`, `root` and a report say of a θ that does not solve its equation."""

import warnings

import numpy as np
import pytest
import torch
from oracles import randn, relative_error
from scipy import optimize
from sklearn.linear_model import Lasso

from metaimplicit import (
    BilevelProblem,
    Dense,
    GradientDescent,
    Implicit,
    TorchOptimizer,
    argmin,
    hypergradient,
    root,
)
from metaimplicit.methods import FixedPoint
from metaimplicit.methods.report import Report, relative_leftover
from metaimplicit.solvers import GMRES, Status

N = 4
X, Y = randn(30, N, seed=1), randn(30, seed=2)
DECAY = torch.tensor(0.3, dtype=torch.float64)
FAR = "argmin: the solution is inexact"


def ridge(params, meta, data):
    return (X @ params["w"] - Y).square().mean() + meta["decay"] * params["w"].square().sum()


def ridge_numbers(w):
    return float(ridge({"w": torch.tensor(w)}, {"decay": DECAY}, None))


def lasso(params, meta, data):
    error = (X @ params["w"] - Y).square().mean() / 2
    return error + meta["decay"] * params["w"].abs().sum()


def free_intercept(params, meta, data):
    """A loss in which all is penalised, while the solution below leaves the last entry free."""
    return ridge(params, meta, data) + meta["decay"] * params["w"][-1] ** 2


def gram():
    return X.T @ X / len(X) + DECAY * torch.eye(N, dtype=torch.float64)


def exact():
    return torch.linalg.solve(gram(), X.T @ Y / len(X))


def zeros(meta, data):
    return {"w": torch.zeros(N, dtype=torch.float64)}


def solutions():
    loose = optimize.minimize(ridge_numbers, np.ones(N), options={"gtol": 1.0}).x
    bounded = optimize.minimize(ridge_numbers, np.ones(N), bounds=[(0, 0.05)] * N, tol=1e-12).x
    sparse = Lasso(alpha=0.05, fit_intercept=False, tol=1e-12).fit(X, Y).coef_
    return {
        "a loose tolerance": (ridge, {"solution": {"w": loose}}),
        "active bounds": (ridge, {"solution": {"w": bounded}}),
        "a kink": (lasso, {"solution": {"w": sparse}, "decay": 0.05}),
        "another loss": (free_intercept, {"solution": {"w": exact()}}),
        "three steps": (ridge, {"inner": GradientDescent(steps=3, lr=0.1)}),
        "another rule": (
            ridge,
            {"inner": TorchOptimizer(torch.optim.AdamW, steps=50, lr=0.02, weight_decay=0.5)},
        ),
    }


def norm_of_argmin(loss, method="dense", decay=DECAY, **options):
    decay = torch.as_tensor(decay, dtype=torch.float64).clone().requires_grad_()
    params = argmin(loss, zeros, {"decay": decay}, None, method=method, **options)
    return params["w"].square().sum(), decay


@pytest.mark.parametrize("name", solutions())
def test_argmin_warns_of_a_point_that_is_not_stationary(name):
    loss, options = solutions()[name]
    norm, decay = norm_of_argmin(loss, **options)
    with pytest.warns(RuntimeWarning, match=FAR):
        norm.backward()
    again, decay = norm_of_argmin(loss, **options)
    with pytest.warns(RuntimeWarning, match=FAR):  # also where higher derivatives may follow
        torch.autograd.grad(again, decay, create_graph=True)


def test_the_warning_names_what_keeps_the_loop_from_settling():
    inner = TorchOptimizer(torch.optim.AdamW, steps=50, lr=0.02, weight_decay=0.5)
    norm, _ = norm_of_argmin(ridge, inner=inner)
    with pytest.warns(RuntimeWarning, match="the decoupled weight decay of AdamW keeps the loop"):
        norm.backward()


def test_a_fixed_point_that_is_none_is_named():
    inner = GradientDescent(steps=3, lr=0.1)
    norm, _ = norm_of_argmin(ridge, method=FixedPoint(GMRES(max_steps=N, tol=1e-12)), inner=inner)
    with pytest.warns(RuntimeWarning, match=FAR):
        norm.backward()


@pytest.mark.parametrize(
    "solution",
    [
        exact(),
        exact().numpy(),
        exact().tolist(),
        optimize.minimize(ridge_numbers, np.ones(N), tol=1e-8).x,
    ],
    ids=["tensor", "numpy", "list", "scipy"],
)
def test_a_solution_of_any_type_is_differentiated_without_a_word(solution):
    norm, decay = norm_of_argmin(ridge, solution={"w": solution})
    norm.backward()
    expected = -2 * exact() @ torch.linalg.solve(gram(), exact())
    assert decay.grad.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_leftover_is_the_newton_step_beside_the_parameters():
    """In one dimension it is |δ| / |θ|, and for a linear f + ½θ² none of the scales matters."""
    theta, minimum = torch.tensor([[1.1], [-3.0]]), torch.tensor([[1.0], [-2.0]])
    slope = 2.5 * (theta - minimum)
    v = torch.tensor([[1.0], [1e-6]])
    measure = relative_leftover(v / 2.5, slope, v=v, params={"w": theta})
    torch.testing.assert_close(measure, torch.tensor([0.1 / 1.1, 1 / 3]))
    zero = torch.zeros(2, 1)
    assert relative_leftover(zero, slope, v=zero, params={"w": theta}).tolist() == [0, 0]


@pytest.mark.parametrize("method", ["cg", "fixed-point"])
def test_the_leftover_is_what_the_outer_loss_of_each_task_still_changes_by(method):
    """To first order, which for a linear g and a quadratic f is all."""
    targets = torch.tensor([2.0, -1.0], dtype=torch.float64)
    problem = BilevelProblem(
        init=lambda meta, target: {"w": torch.zeros((), dtype=torch.float64)},
        inner_loss=lambda params, meta, target: meta["h"] * (params["w"] - target).square(),
        outer_loss=lambda params, meta, target: 3 * params["w"],
    )
    meta = {"h": torch.tensor(0.7, dtype=torch.float64)}
    inner = GradientDescent(steps=3, lr=0.1)
    result = hypergradient(problem, meta, targets, inner=inner, method=method, batched=True)
    left = 3 * (targets - result.params["w"])
    assert left[0] > 1 > -1 > left[1]
    torch.testing.assert_close(result.report.leftover, left)


@pytest.mark.parametrize(
    ("drift", "of_theta", "of_loss"), [("", 1e-4, 1e-3), ("decoupled decay", 1e-6, 1e-6)]
)
def test_a_solve_is_judged_beside_the_parameters_and_the_loss(drift, of_theta, of_loss):
    """The documented limits: a tenth above one of them is too far, a tenth below both is near."""
    below, above = 0.9, 1.1
    shares = [(below, below), (above, below), (below, above), (float("nan"), below)]
    theta, loss = torch.tensor(shares).double().unbind(1)
    report = Report(
        "cg",
        inner_steps=torch.ones(4),
        inner_gradient_norm=torch.ones(4),
        drift=drift,
        status=torch.full((4,), int(Status.CONVERGED)),
        relative_leftover=of_theta * theta,
        leftover=-5.0 * of_loss * loss,
    )
    statuses = report.judged(torch.full((4,), 5.0)).status.tolist()
    assert [Status(x).name for x in statuses] == ["CONVERGED"] + 3 * ["NOT_STATIONARY"]
    alone = report.judged().status.tolist()
    far = "NOT_STATIONARY"
    assert [Status(x).name for x in alone] == ["CONVERGED", far, "CONVERGED", far]


def test_parts_that_cancel_are_seen():
    """g is flat along the step that is left, and so is the leftover, but not the derivative."""
    u, slope = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    assert (u * slope).sum() == 0
    measure = relative_leftover(u, slope, v=u, params={"w": torch.ones(1, 2)})
    assert measure.item() == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [0.0, 1e3, -1e8])
@pytest.mark.parametrize(("steps", "status"), [(4, "NOT_STATIONARY"), (60, "CONVERGED")])
def test_a_constant_that_is_added_to_g_changes_no_verdict(constant, steps, status):
    problem = BilevelProblem(
        zeros, ridge, lambda params, meta, data: params["w"].square().sum() + constant
    )
    inner = GradientDescent(steps=steps, lr=0.2)
    result = hypergradient(problem, {"decay": DECAY}, None, inner=inner, method=Implicit(Dense()))
    assert result.report.share(Status[status]) == 1


# `root`.


def cubic(params, meta, data):
    return {"x": params["x"] ** 3 + 2 * params["x"] - meta["phi"]}


def test_root_warns_where_the_residual_does_not_vanish():
    phi = randn(N, seed=3).requires_grad_()
    off = root(cubic, {"x": torch.ones(N, dtype=torch.float64)}, {"phi": phi})
    with pytest.warns(RuntimeWarning, match="root: the solution is inexact"):
        off["x"].sum().backward()
    x = optimize.fsolve(lambda x: x**3 + 2 * x - phi.detach().numpy(), np.ones(N), xtol=1e-12)
    phi.grad = None
    root(cubic, {"x": x}, {"phi": phi})["x"].sum().backward()
    assert relative_error(phi.grad, 1 / (3 * torch.tensor(x) ** 2 + 2)) < 1e-6


def test_root_warns_of_a_system_that_was_not_solved():
    matrix = randn(30, 30, seed=4)
    b = randn(30, seed=5).requires_grad_()
    x = torch.linalg.solve(matrix, b.detach())
    params = root(
        lambda params, meta, data: {"x": matrix @ params["x"] - meta["b"]},
        {"x": x},
        {"b": b},
        solver=GMRES(max_steps=5),
    )
    with pytest.warns(RuntimeWarning, match="root: the linear system was left with a residual"):
        params["x"].sum().backward()


def test_root_refuses_what_it_cannot_differentiate():
    phi = torch.ones(N, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    x = {"x": torch.ones(N)}

    def captured(params, meta, data):
        return {"x": params["x"] * scale - meta["phi"]}

    def random(params, meta, data):
        return {"x": params["x"] - torch.dropout(meta["phi"], 0.5, train=True)}

    with pytest.raises(ValueError, match="tensor 'scale' requires grad and is captured"):
        root(captured, x, {"phi": phi})
    with pytest.raises(ValueError, match="residual: it draws random numbers"):
        root(random, x, {"phi": phi})


BAD = {
    "a tensor": (torch.ones(N), "solution: got Tensor, expected a dict"),
    "text": ({"x": "ones"}, r"solution\['x'\]: got str, expected a tensor"),
    "complex": ({"x": torch.ones(N) + 0j}, "got torch.complex64, expected real numbers"),
    "complex numpy": ({"x": np.ones(N) + 0j}, "got torch.complex128, expected real numbers"),
    "NaN": ({"x": torch.full((N,), torch.nan)}, "that are not finite, expected the solution"),
}


@pytest.mark.parametrize(("solution", "message"), BAD.values(), ids=BAD)
def test_a_solution_that_is_none_is_refused(solution, message):
    meta = {"phi": torch.ones(N, requires_grad=True)}
    with pytest.raises(ValueError, match=message):
        root(cubic, solution, meta)
    with pytest.raises(ValueError, match=message):
        argmin(ridge, zeros, meta, None, method="dense", solution=solution)


def test_integers_take_the_type_of_phi():
    phi = torch.full((N,), 3.0, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = root(cubic, {"x": np.ones(N, dtype=int)}, {"phi": phi})
        params["x"].sum().backward()
    assert params["x"].dtype == torch.float32
    torch.testing.assert_close(phi.grad, torch.full((N,), 0.2))
