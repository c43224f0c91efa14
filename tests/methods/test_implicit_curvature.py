"""Implicit methods with a curvature or a preconditioner that is not the Hessian."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import largest_error, randn, relative_error
from tanh_network import DATA, INITIAL, TASKS, forward, network, outer
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import jacobian as jacobian_of

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    Dense,
    GradientDescent,
    Implicit,
    Neumann,
    Proximal,
    hypergradient,
)
from metaimplicit.operators import GGN, Diagonal, Fisher, Hessian, invertible_curvatures
from metaimplicit.solvers import Factored

THREE_STEPS = GradientDescent(steps=3, lr=0.1)


def run_network(method):
    inner = GradientDescent(steps=5, lr=0.1)
    return hypergradient(
        network(Proximal(0.5)), INITIAL, DATA, inner=inner, method=method, batched=True
    )


# Gauss–Newton and Fisher.


def test_the_fisher_matrix_is_a_curvature():
    curvature = partial(Fisher, likelihood="gaussian")
    fisher = run_network(Implicit(Dense(), curvature=curvature))
    assert fisher.report.curvature == "fisher"
    assert fisher.report.error_bound is not None

    # The mean square counts each output with a weight of its own, not as a unit variance would.
    gauss_newton = run_network(Implicit(Dense(), curvature="gauss-newton"))
    assert relative_error(fisher.grads["0.weight"], gauss_newton.grads["0.weight"]) < 1e-12


def test_a_class_of_curvature_that_has_a_flag_is_the_same_as_its_flag():
    for flag, kind in (("hessian", Hessian), ("gauss-newton", GGN), ("diagonal", Diagonal)):
        assert Implicit(curvature=kind) == Implicit(curvature=partial(kind))
        assert Implicit(curvature=kind) == Implicit(curvature=flag)


def test_a_class_that_is_called_hessian_is_not_taken_for_the_hessian():
    impostor = type("Hessian", (GGN,), {})
    assert not Implicit(curvature=impostor).is_hessian
    assert Implicit(curvature=partial(Hessian, products="double-backward")).is_hessian
    assert Implicit().is_hessian


def split(flat):
    """The parameters of the network, from one vector."""
    sizes = [p.numel() for p in INITIAL.values()]
    parts = flat.split(sizes)
    return {name: x.view_as(p) for (name, p), x in zip(INITIAL.items(), parts, strict=True)}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_on_request_the_report_has_the_residual_in_the_system_of_the_hessian(vectorize):
    """‖v − Hu‖/‖v‖ with (G + σI) u = v, by dense matrices of one task after another."""
    method = Implicit(Dense(), curvature="gauss-newton", check_curvature=True)
    result = hypergradient(
        network(Proximal(0.5)),
        INITIAL,
        DATA,
        inner=THREE_STEPS,
        method=method,
        batched=True,
        vectorize=vectorize,
    )
    start = torch.cat([p.flatten() for p in INITIAL.values()])
    expected = []
    for task in range(TASKS):
        x, y, x_query, y_query = (tensor[task] for tensor in DATA)
        end = torch.cat([p[task].flatten() for p in result.params.values()])

        def inner_loss(theta, x=x, y=y):
            return F.mse_loss(forward(split(theta), x), y) + 0.25 * (theta - start).square().sum()

        jacobian = jacobian_of(lambda theta, x=x: forward(split(theta), x).flatten(), end)
        identity = torch.eye(len(end), dtype=torch.float64)
        gauss_newton = 2 / len(x) * jacobian.T @ jacobian + 0.5 * identity
        variable = end.clone().requires_grad_()
        F.mse_loss(forward(split(variable), x_query), y_query).backward()
        u = torch.linalg.solve(gauss_newton, variable.grad)
        left = variable.grad - hessian_of(inner_loss, end) @ u
        expected.append(left.norm() / variable.grad.norm())
    assert relative_error(result.report.hessian_residual, torch.stack(expected)) < 1e-10
    assert (result.report.residual < 1e-12).all()


def test_the_hessian_solves_its_own_system_and_nobody_checks_it_unasked():
    method = Implicit(Dense(), check_curvature=True)
    assert (run_network(method).report.hessian_residual < 1e-12).all()
    assert run_network(Implicit(Dense())).report.hessian_residual is None


def test_the_empirical_fisher_matrix_differs_from_the_expected_one():
    expected, empirical = (
        Implicit(Dense(), curvature=partial(Fisher, likelihood="gaussian", expectation=expectation))
        for expectation in ("exact", "empirical")
    )
    weights = [run_network(method).grads["0.weight"] for method in (expected, empirical)]
    assert relative_error(*weights) > 1e-3


def test_the_draws_of_a_monte_carlo_fisher_matrix_are_not_taken_for_dropout():
    curvature = partial(Fisher, likelihood="gaussian", expectation="monte-carlo")
    sampled = run_network(Implicit(Dense(), curvature=curvature))
    assert sampled.grads["0.weight"].isfinite().all()


@pytest.mark.parametrize(
    "penalty",
    [
        pytest.param(Proximal(0.1), id="A is indefinite"),
        pytest.param(Proximal(50.0), id="A is positive definite and its core is not"),
        pytest.param(
            lambda params, meta: 0.05 * (params["w"] - meta["w"]).square().sum(),
            id="penalty that is not Proximal",
        ),
    ],
)
def test_gauss_newton_of_a_loss_that_is_not_convex_is_refused(penalty):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            outputs=lambda params, meta, data: data @ params["w"],
            loss=lambda z, data: -z.square().mean(),
            penalty=penalty,
        ),
        outer_loss=lambda params, meta, data: params["w"].square().sum(),
    )
    message = r"Gauss–Newton: got a loss that is not convex in the outputs \(curvature -"
    with pytest.raises(ValueError, match=message):
        hypergradient(
            problem,
            {"w": randn(4, seed=1)},
            randn(6, 4, seed=2),
            inner=GradientDescent(1, 0.01),
            method=Implicit(CG(3), curvature="gauss-newton"),
        )


# K-FAC.


def run_softmax_regression(method):
    """Tasks of one example, for which K-FAC of the linear layer is its Gauss–Newton matrix."""
    model = torch.nn.Linear(2, 3).double()

    def outputs(params, x):
        return torch.func.functional_call(model, params, (x,))

    problem = BilevelProblem(
        init=lambda meta, data: {name: meta[name] for name in ("weight", "bias")},
        inner_loss=Composite(
            outputs=lambda p, m, d: outputs(p, d[0]),
            loss=lambda z, d: F.cross_entropy(z, d[1]),
            penalty=Proximal(0.3),
            module=model,
        ),
        outer_loss=lambda p, m, d: outputs(p, d[2]).square().mean(),
    )
    meta = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    data = (
        randn(TASKS, 1, 2, seed=1),
        torch.zeros(TASKS, 1, dtype=torch.long),
        randn(TASKS, 4, 2, seed=2),
    )
    return hypergradient(problem, meta, data, inner=THREE_STEPS, method=method, batched=True)


@pytest.mark.parametrize("flag", ["kfac", "ekfac"])
def test_kfac_is_gauss_newton_for_a_linear_layer_and_one_example(flag):
    exact = run_softmax_regression(Implicit(Dense(), curvature="gauss-newton"))
    factored = run_softmax_regression(flag)
    assert largest_error(factored.grads, exact.grads) < 1e-10
    assert factored.report.curvature == flag
    assert factored.report.products == 1
    assert factored.report.error_bound is not None


@pytest.mark.parametrize("flag", ["kfac", "ekfac"])
def test_cg_with_an_exact_preconditioner_converges_in_one_step(flag):
    exact = run_softmax_regression(Implicit(Dense(), curvature="gauss-newton"))
    one_step = run_softmax_regression(
        Implicit(CG(1), curvature="gauss-newton", preconditioner=flag)
    )
    assert largest_error(one_step.grads, exact.grads) < 1e-9


def test_kfac_of_a_loss_without_a_module_is_refused():
    with pytest.raises(ValueError, match="KFAC: got an inner loss that hides its layers"):
        run_network("kfac")


def test_kfac_of_a_plain_function_is_refused():
    problem = BilevelProblem(network().init, lambda p, m, d: d[0].sum(), outer)
    message = "curvature='kfac': got an inner_loss that is a plain function"
    with pytest.raises(ValueError, match=message):
        hypergradient(problem, INITIAL, DATA, inner=THREE_STEPS, method="kfac", batched=True)


def test_an_unknown_preconditioner_is_refused():
    known = ", ".join(invertible_curvatures())
    message = f"preconditioner: got 'jacobi', expected one of {known}, or a class"
    with pytest.raises(ValueError, match=message):
        Implicit(CG(), preconditioner="jacobi")


def test_a_solver_without_preconditioning_refuses_a_preconditioner():
    method = Implicit(Neumann(), preconditioner="kfac", curvature="gauss-newton")
    with pytest.raises(ValueError, match="preconditioner: Neumann takes none"):
        run_softmax_regression(method)


# The diagonal.


def run_scaled(method):
    """Squared error of w ⊙ x for inputs of very different size. Gauss–Newton is diagonal."""
    x = torch.logspace(-2, 2, 9).double()
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            outputs=lambda params, meta, data: (x * params["w"]).unsqueeze(0),
            loss=lambda z, data: 0.5 * (z - data).square().sum(),
            penalty=Proximal(0.5),
        ),
        outer_loss=lambda params, meta, data: params["w"].square().sum() + params["w"].sum(),
    )
    meta = {"w": randn(9, seed=1)}
    inner = GradientDescent(1, 1e-4)
    return hypergradient(problem, meta, randn(1, 9, seed=2), inner=inner, method=method)


def test_the_diagonal_solves_a_diagonal_problem():
    exact = run_scaled(Implicit(Dense(), curvature="gauss-newton"))
    diagonal = run_scaled(Implicit(Factored(), curvature="diagonal"))
    assert largest_error(diagonal.grads, exact.grads) < 1e-10
    assert diagonal.report.curvature == "diagonal"


def test_the_diagonal_preconditions_a_badly_scaled_problem():
    exact = run_scaled(Implicit(Dense(), curvature="gauss-newton"))
    plain, preconditioned = (
        run_scaled(Implicit(CG(2), curvature="gauss-newton", preconditioner=preconditioner))
        for preconditioner in (None, "diagonal")
    )
    assert largest_error(plain.grads, exact.grads) > 1e-2
    assert largest_error(preconditioned.grads, exact.grads) < 1e-10
