"""Implicit methods against unrolling to convergence; their reports, bounds and products."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import largest_error, randn, relative_error
from small_problems import scalar_problem
from tanh_network import DATA, GAUSS_NEWTON, INITIAL, TASKS, XQ, YQ, X, Y, network, outer

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    Dense,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    Unrolled,
    hypergradient,
)
from metaimplicit.methods import SAMA
from metaimplicit.solvers import MINRES, NystromCG, Status

THREE_STEPS = GradientDescent(steps=3, lr=0.1)
TO_CONVERGENCE = GradientDescent(steps=20, lr=0.042)  # with a penalty of Hessian 20 I or more


def run_network(penalty, method, inner=THREE_STEPS, meta=INITIAL, data=DATA, **options):
    return hypergradient(
        network(penalty), meta, data, inner=inner, method=method, batched=True, **options
    )


def quartic(params, meta):
    """A convex penalty that is no multiple of the identity."""
    return 10 * sum(
        (p - meta[name]).square().sum() + 0.01 * p.pow(4).sum() for name, p in params.items()
    )


def norms(gradients):
    """The norm of each task, `[tasks]`."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)


# Values.


def test_it_agrees_with_unrolled_where_the_inner_problem_is_solved():
    exact = run_network(Proximal(20.0), "unrolled", TO_CONVERGENCE)
    implicit = run_network(Proximal(20.0), Implicit(CG(max_steps=60, tol=1e-12)), TO_CONVERGENCE)
    assert largest_error(implicit.grads, exact.grads) < 1e-7
    assert implicit.report.inner_gradient_norm.max() < 1e-9


def test_the_hessian_of_any_penalty_is_exact():
    exact = run_network(quartic, "unrolled", TO_CONVERGENCE)
    assert largest_error(run_network(quartic, "dense", TO_CONVERGENCE).grads, exact.grads) < 1e-7


def test_the_hessian_of_any_penalty_is_added_to_gauss_newton():
    """For a linear model, Gauss–Newton is the Hessian of the loss."""
    linear = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            outputs=lambda p, m, d: d[0] @ p["w"],
            loss=lambda z, d: F.mse_loss(z, d[1][:, 0]),
            penalty=quartic,
        ),
        outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
    )
    run = partial(
        hypergradient,
        linear,
        {"w": randn(2, seed=3)},
        DATA,
        inner=TO_CONVERGENCE,
        batched=True,
    )
    gauss_newton = run(method=Implicit(Dense(), curvature="gauss-newton"))
    assert largest_error(gauss_newton.grads, run(method="unrolled").grads) < 1e-8
    assert gauss_newton.report.error_bound is None


@pytest.mark.parametrize("products", ["forward-over-reverse", "finite-differences"])
def test_the_ways_to_take_products_agree(products):
    strength = torch.tensor(1.5, dtype=torch.float64)
    run = partial(
        run_network,
        Proximal(FromMeta("strength")),
        inner=GradientDescent(steps=5, lr=0.1),
        meta=INITIAL | {"strength": strength},
    )
    solver = CG(max_steps=60, tol=1e-9)
    double_backward = run(method=Implicit(solver))
    assert (
        largest_error(run(method=Implicit(solver, products=products)).grads, double_backward.grads)
        < 1e-7
    )


class OnceDifferentiableTanh(torch.autograd.Function):
    """tanh without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (tanh,) = ctx.saved_tensors
        return grad * (1 - tanh.square())


class OnceDifferentiableSquare(torch.autograd.Function):
    """The square without a second derivative, as a fused loss may have it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def run_without_second_derivative(method, tanh=OnceDifferentiableTanh.apply):
    def inner_loss(params, meta, data):
        fit = F.mse_loss(tanh(data[0] @ params["w"]), data[1][:, 0])
        return fit + 0.2 * (params["w"] - meta["w"]).square().sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=inner_loss,
        outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
    )
    result = hypergradient(
        problem,
        {"w": randn(2, seed=3)},
        DATA,
        inner=THREE_STEPS,
        method=method,
        batched=True,
        vectorize="loop",
    )
    return result.grads["w"]


def test_finite_differences_need_first_derivatives_only():
    exact = run_without_second_derivative("dense", tanh=torch.tanh)
    by_differences = run_without_second_derivative(Implicit(Dense(), products="finite-differences"))
    assert relative_error(by_differences, exact) < 1e-7
    assert run_without_second_derivative("first-order").isfinite().all()


@pytest.mark.parametrize("method", ["dense", "unrolled"])
def test_a_missing_second_derivative_is_refused(method):
    """Autograd itself takes it for zero and says nothing."""
    message = "inner loss: it uses an operation whose backward is once_differentiable"
    with pytest.raises(ValueError, match=message):
        run_without_second_derivative(method)


BY_DIFFERENCES = Implicit(Dense(), products="finite-differences")
TWICE = {
    **{method: method for method in ("dense", "unrolled", "fixed-point")},
    "replay": Unrolled(memory="replay"),
    "gauss-newton": Implicit(Dense(), curvature="gauss-newton"),
}


def decay_gradient(method, *, loss_square=torch.square, penalty_square=torch.square, **options):
    """That of the strength of a penalty, in ridge regression from zero."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(1, 2).double()},
        inner_loss=Composite(
            outputs=lambda params, meta, data: F.linear(data[0], params["w"]) - data[1],
            loss=lambda z, data: loss_square(z).mean(),
            penalty=lambda params, meta: penalty_square(meta["decay"]) * params["w"].square().sum(),
        ),
        outer_loss=lambda params, meta, data: F.mse_loss(F.linear(data[2], params["w"]), data[3]),
    )
    meta = {"decay": torch.tensor(0.3).double()}
    result = hypergradient(
        problem, meta, DATA, inner=THREE_STEPS, method=method, batched=True, **options
    )
    return result.grads["decay"]


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("method", TWICE.values(), ids=TWICE)
def test_an_operation_right_below_the_loss_needs_its_second_derivative(method, vectorize):
    """What it returns there is a constant, so nothing in the gradient's graph tells of it."""
    once = OnceDifferentiableSquare.apply
    with pytest.raises(ValueError, match="whose backward is once_differentiable"):
        decay_gradient(method, loss_square=once, vectorize=vectorize)


@pytest.mark.parametrize("method", TWICE.values(), ids=TWICE)
def test_an_operation_on_meta_parameters_needs_its_first_derivative_only(method):
    once = decay_gradient(method, penalty_square=OnceDifferentiableSquare.apply)
    assert relative_error(once, decay_gradient(method)) < 1e-12


def test_differences_need_the_first_derivative_only_of_an_operation_right_below_the_loss():
    once = decay_gradient(BY_DIFFERENCES, loss_square=OnceDifferentiableSquare.apply)
    assert relative_error(once, decay_gradient("dense")) < 1e-6


def test_a_model_that_draws_random_numbers_is_refused():
    def inner_loss(params, meta, data):
        outputs = F.dropout(data[0], 0.5) @ params["w"]
        return F.mse_loss(outputs, data[1][:, 0]) + (params["w"] - meta["w"]).square().sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=inner_loss,
        outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
    )
    run = partial(
        hypergradient, problem, {"w": randn(2, seed=3)}, DATA, inner=THREE_STEPS, batched=True
    )
    assert run(method="unrolled").grads["w"].isfinite().all()
    with pytest.raises(ValueError, match=r"inner loss: it draws random numbers \(dropout\?\)"):
        run(method="cg")


# Reports.


def test_gauss_newton_differs_from_the_hessian():
    inner = GradientDescent(steps=5, lr=0.1)
    gauss_newton = run_network(Proximal(0.5), Implicit(Dense(), curvature="gauss-newton"), inner)
    hessian = run_network(Proximal(0.5), "dense", inner)
    assert relative_error(gauss_newton.grads["0.weight"], hessian.grads["0.weight"]) > 1e-3
    assert hessian.report.error_bound is None


def test_the_error_bound_bounds_the_error_of_the_solve():
    inner = GradientDescent(steps=5, lr=0.1)
    strength = 0.5
    exact = run_network(Proximal(strength), Implicit(Dense(), curvature="gauss-newton"), inner)
    rough = run_network(Proximal(strength), Implicit(CG(2), curvature="gauss-newton"), inner)
    # The mixed derivative of the proximal term is −λI, so the gradient is that of u, times λ.
    differences = [(exact.grads[name] - rough.grads[name]).flatten() for name in INITIAL]
    error = torch.cat(differences).norm() / strength
    assert 0 < float(error) <= float(rough.report.error_bound.sum())
    assert rough.report.products == 2
    assert rough.report.share(Status.MAX_STEPS) == 1.0


def test_the_error_bound_is_the_residual_norm_over_sigma_for_each_task():
    scales = torch.tensor([1.0, 30.0, 1.0], dtype=torch.float64)[:, None, None]
    data = (X, Y, XQ, YQ * scales)
    result = run_network(Proximal(0.4), GAUSS_NEWTON, data=data)
    v = torch.vmap(torch.func.grad(lambda p, d: outer(p, {}, d)))(result.params, data)
    expected = result.report.residual * norms(v) / TASKS / 0.4
    assert relative_error(result.report.error_bound, expected) < 1e-12


def test_there_is_no_error_bound_where_the_penalty_may_be_concave():
    def concave(params, meta):
        return sum(-0.01 * (p - meta[n]).square().sum() for n, p in params.items())

    report = run_network(concave, Implicit(CG(), curvature="gauss-newton", damping=0.5)).report
    assert report.error_bound is None
    assert report.sigma == 0.5


@pytest.mark.parametrize(
    "solver",
    [CG(4, 0.0), MINRES(4, 0.0), NystromCG(rank=3, max_steps=4, tol=0.0, refresh=9)],
    ids=lambda solver: type(solver).__name__,
)
def test_a_solver_continues_from_the_report_of_the_last_call(solver):
    torch.manual_seed(0)
    method = Implicit(solver, curvature="gauss-newton")
    run = partial(run_network, Proximal(0.5), method, GradientDescent(steps=5, lr=0.1))
    first = run().report
    moved = {name: p + 1e-5 * randn(*p.shape, seed=5) for name, p in INITIAL.items()}
    cold = run(meta=moved).report
    warm = run(meta=moved, state=first.state).report
    assert (warm.residual < 0.5 * first.residual).all()
    assert (warm.residual < 0.5 * cold.residual).all()


@pytest.mark.parametrize(
    "method",
    [Implicit(Dense(), products="finite-differences"), SAMA()],
    ids=["finite-differences", "sama"],
)
def test_differences_are_of_the_type_of_what_is_learnt(method):
    """f = (w − c)²/2 + 20 eᶜ, whose derivative in c is large and does not depend on w."""
    problem = scalar_problem(
        lambda w, meta: 0.5 * (w - meta["c"]).square() + 20 * meta["c"].exp(),
        lambda w, meta: w.square(),
    )
    meta = {"c": torch.tensor(0.7, dtype=torch.float32)}
    inner = GradientDescent(steps=40, lr=1.0)
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    assert result.grads["c"].item() == pytest.approx(1.4, rel=1e-3)
