"""The derivative of a root or minimum that was found elsewhere, against closed forms."""

import numpy as np
import pytest
import torch
from oracles import randn, relative_error
from scipy import optimize
from sklearn.linear_model import LogisticRegression, Ridge
from torch.autograd import forward_ad

from metaimplicit import CG, argmin, root
from metaimplicit.solvers import GMRES

N = 4


def mixing(x, matrix, phi):
    """A nonlinear map whose Jacobian M + 0.3 diag(1 − tanh²) is not symmetric."""
    return matrix @ x + 0.3 * torch.tanh(x) - phi


def jacobian_of(x, matrix):
    return matrix + 0.3 * torch.diag(1 - torch.tanh(x) ** 2)


@pytest.fixture
def nonlinear():
    matrix = randn(N, N, seed=1) + 3 * torch.eye(N, dtype=torch.float64)
    phi = randn(N, seed=2)
    found = optimize.root(
        lambda x: mixing(torch.tensor(x), matrix, phi).numpy(), np.zeros(N), tol=1e-14
    )
    return matrix, phi, torch.tensor(found.x)


def test_a_root_that_scipy_found_has_the_derivative_of_its_jacobian(nonlinear):
    matrix, phi, x = nonlinear
    phi.requires_grad_()
    matrix.requires_grad_()
    params = root(
        lambda params, meta, data: {"x": mixing(params["x"], meta["matrix"], meta["phi"])},
        {"x": x},
        {"phi": phi, "matrix": matrix},
        solver=GMRES(max_steps=N, tol=1e-13),
    )
    v = randn(N, seed=3)
    (params["x"] @ v).backward()
    adjoint = torch.linalg.solve(jacobian_of(x, matrix.detach()).T, v)
    assert torch.equal(params["x"], x)
    assert relative_error(phi.grad, adjoint) < 1e-10
    assert relative_error(matrix.grad, -torch.outer(adjoint, x)) < 1e-10


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_roots_of_a_batch_are_solved_task_by_task(vectorize):
    phi = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    data = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    params = root(
        lambda params, meta, c: {"x": params["x"].square() - meta["phi"] * c},
        {"x": (2 * data).sqrt()},
        {"phi": phi},
        data,
        batched=True,
        vectorize=vectorize,
    )
    params["x"].sum().backward()
    assert relative_error(phi.grad, 0.5 * (data / 2.0).sqrt().sum()) < 1e-12


def test_several_tensors_are_one_system(nonlinear):
    matrix, phi, x = nonlinear
    phi.requires_grad_()

    def residual(params, meta, data):
        value = mixing(torch.cat([params["a"], params["b"][None]]), matrix, meta["phi"])
        return {"a": value[:3], "b": value[3]}

    params = root(
        residual, {"a": x[:3], "b": x[3]}, {"phi": phi}, solver=GMRES(max_steps=N, tol=1e-13)
    )
    (params["a"].sum() + 2 * params["b"]).backward()
    v = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    assert relative_error(phi.grad, torch.linalg.solve(jacobian_of(x, matrix).T, v)) < 1e-10


def test_a_root_that_does_not_depend_on_an_entry_has_a_zero_gradient(nonlinear):
    matrix, phi, x = nonlinear
    other = torch.ones((), dtype=torch.float64, requires_grad=True)
    params = root(
        lambda params, meta, data: {"x": mixing(params["x"], matrix, meta["phi"])},
        {"x": x},
        {"phi": phi.requires_grad_(), "other": other},
    )
    params["x"].sum().backward()
    assert other.grad is None


def test_a_singular_jacobian_is_reported(nonlinear):
    _, phi, _ = nonlinear
    phi.requires_grad_()
    params = root(
        lambda params, meta, data: {"x": 0 * params["x"] + meta["phi"]},
        {"x": torch.zeros(N, dtype=torch.float64)},
        {"phi": phi},
    )
    with pytest.warns(RuntimeWarning, match="GMRES ended with BREAKDOWN"):
        params["x"].sum().backward()


@pytest.mark.parametrize(
    "residual",
    [lambda x: {"y": x}, lambda x: {"x": x[:1]}, lambda x: {"x": 1.0}, lambda x: {"x": None}],
    ids=["another name", "another shape", "a number", "None"],
)
def test_a_residual_of_another_form_is_refused(residual):
    with pytest.raises(ValueError, match=r"residual: got .*expected a dict of tensors"):
        root(
            lambda params, meta, data: residual(params["x"]),
            {"x": torch.ones(2)},
            {"phi": torch.ones(1)},
        )


def test_a_solver_of_symmetric_systems_is_refused():
    with pytest.raises(ValueError, match="root solver: got CG, which needs a symmetric matrix"):
        root(
            lambda params, meta, data: params,
            {"x": torch.ones(2)},
            {"a": torch.ones(1)},
            solver=CG(),
        )


# Minima that were found elsewhere.


META = {"phi": torch.tensor(9.0, requires_grad=True)}


def square_root(meta, x):
    return root(
        lambda params, meta, data: {"x": params["x"].square() - meta["phi"]}, {"x": x}, meta
    )


def test_a_solution_of_inference_mode_is_differentiated():
    with torch.inference_mode():
        x = torch.tensor(3.0)
    for found in (
        square_root(META, x),
        argmin(
            lambda params, meta, data: params["x"].pow(3) / 3 - meta["phi"] * params["x"],
            lambda meta, data: {"x": torch.ones(())},
            META,
            None,
            solution={"x": x},
            method="dense",
        ),
    ):
        (slope,) = torch.autograd.grad(found["x"], META["phi"])
        assert slope.item() == pytest.approx(1 / 6)
    with torch.inference_mode():
        assert not square_root(META, x)["x"].requires_grad


def test_data_that_are_changed_in_place_before_backward_are_refused():
    data = torch.tensor(1.0)
    found = root(
        lambda params, meta, c: {"x": params["x"].square() - c * meta["phi"]},
        {"x": torch.tensor(3.0)},
        META,
        data,
    )
    data.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found["x"].backward()


def test_a_solution_may_be_overwritten_before_backward():
    """As by a solver that writes each solution to the memory of the one it starts from."""

    def cube_root(phi, x):
        return argmin(
            lambda params, meta, data: params["x"].pow(4) / 4 - meta["phi"] * params["x"],
            lambda meta, data: {"x": torch.ones(())},
            {"phi": phi},
            None,
            solution={"x": x},
            method="dense",
        )

    phi = torch.tensor(64.0, requires_grad=True)
    for solve, power in ((lambda phi, x: square_root({"phi": phi}, x), 2), (cube_root, 3)):
        buffer = phi.detach() ** (1 / power)
        found = solve(phi, buffer)["x"]
        buffer.fill_(1.0)
        (slope,) = torch.autograd.grad(found, phi)
        assert slope.item() == pytest.approx(64 ** (1 / power - 1) / power, rel=1e-4)


def test_what_vmap_cannot_transform_is_refused_with_what_to_do():
    data = torch.tensor([1.0, 4.0])
    with pytest.raises(ValueError, match="use vectorize='loop'"):
        root(
            lambda params, meta, c: {"x": params["x"] - meta["phi"] * float(c)},
            {"x": 9 * data},
            META,
            data,
            batched=True,
        )


def test_tangents_are_refused_by_the_name_of_the_function():
    with forward_ad.dual_level():
        phi = forward_ad.make_dual(torch.tensor(9.0), torch.tensor(1.0))
        with pytest.raises(RuntimeError, match=r"^root has no .* GMRES\(.*\); use reverse mode$"):
            square_root({"phi": phi}, torch.tensor(3.0))


def test_ridge_of_scikit_learn_has_its_derivative_in_the_decay():
    x, y = randn(30, N, seed=4), randn(30, seed=5)
    w = torch.tensor(Ridge(alpha=2.0, fit_intercept=False).fit(x, y).coef_)
    decay = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    params = argmin(
        lambda params, meta, data: (
            (x @ params["w"] - y).square().sum() + meta["decay"] * params["w"].square().sum()
        ),
        init=lambda meta, data: {"w": torch.zeros(N, dtype=torch.float64)},
        meta={"decay": decay},
        data=None,
        method="dense",
        solution={"w": w},
    )
    params["w"].sum().backward()
    # dw/dα = −(XᵀX + αI)⁻¹ w
    a = x.T @ x + 2 * torch.eye(N, dtype=torch.float64)
    assert torch.equal(params["w"], w)
    assert relative_error(decay.grad, -torch.linalg.solve(a, w).sum()) < 1e-10


def test_logistic_regression_of_scikit_learn_agrees_with_differences_of_its_fits():
    x = randn(60, 2, seed=6)
    y = (x.sum(1) + randn(60, seed=7) > 0).double()

    def fit(c):
        model = LogisticRegression(C=c, fit_intercept=False, tol=1e-12, max_iter=10_000)
        return torch.tensor(model.fit(x.numpy(), y.numpy()).coef_[0])

    c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    params = argmin(
        lambda params, meta, data: (
            meta["c"] * torch.nn.functional.softplus(-(2 * y - 1) * (x @ params["w"])).sum()
            + 0.5 * params["w"].square().sum()
        ),
        init=lambda meta, data: {"w": torch.zeros(2, dtype=torch.float64)},
        meta={"c": c},
        data=None,
        method="dense",
        solution={"w": fit(0.5)},
    )
    params["w"].sum().backward()
    slope = (fit(0.501).sum() - fit(0.499).sum()) / 0.002
    assert relative_error(c.grad, slope) < 1e-5


def test_a_minimum_of_scipy_is_differentiated_for_each_task():
    data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    phi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def minimum(c):
        return optimize.minimize_scalar(lambda w: np.cosh(w) - 0.7 * c * w, tol=1e-14).x

    w = torch.tensor([minimum(float(c)) for c in data])
    params = argmin(
        lambda params, meta, c: torch.cosh(params["w"]) - meta["phi"] * c * params["w"],
        init=lambda meta, data: {"w": torch.zeros((), dtype=torch.float64)},
        meta={"phi": phi},
        data=data,
        method="dense",
        solution={"w": w},
        batched=True,
    )
    params["w"].sum().backward()
    assert relative_error(phi.grad, (data / torch.cosh(w)).sum()) < 1e-12


@pytest.mark.parametrize("method", ["unrolled", "forward", "fixed-point", "sama"])
def test_methods_that_need_the_way_to_a_solution_are_refused(method):
    meta = {"t": torch.ones((), requires_grad=True)}
    with pytest.raises(ValueError, match=r"^solution|function of its iterate|not differentiable"):
        argmin(
            lambda params, meta, data: (params["w"] - meta["t"]).square(),
            init=lambda meta, data: {"w": torch.zeros(())},
            meta=meta,
            data=None,
            method=method,
            solution={"w": torch.ones(())},
        )["w"].backward()


def test_argmin_takes_a_loop_or_a_solution():
    with pytest.raises(ValueError, match="expected either an inner loop or a solution"):
        argmin(lambda *_: None, lambda *_: {}, {"t": torch.ones(())}, None, method="cg")


def test_a_solution_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="solution: got the shapes"):
        argmin(
            lambda params, meta, data: params["w"].square().sum() * meta["t"],
            init=lambda meta, data: {"w": torch.zeros(2)},
            meta={"t": torch.ones(())},
            data=None,
            method="cg",
            solution={"w": torch.ones(3)},
        )
