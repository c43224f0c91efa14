"""Implicit methods against unrolling to convergence; their reports, bounds and data."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, randn, relative_error
from tanh_network import DATA, GAUSS_NEWTON, INITIAL, TASKS, XQ, YQ, X, Y, network, outer

from metaimplicit import (
    CG,
    MINRES,
    BilevelProblem,
    Composite,
    Dense,
    Factored,
    Fisher,
    FromMeta,
    GradientDescent,
    Implicit,
    Neumann,
    NystromCG,
    Proximal,
    Status,
    Stream,
    hypergradient,
)


def test_implicit_agrees_with_unrolled_where_the_inner_problem_is_solved():
    problem = network(Proximal(1.0))
    run = partial(
        hypergradient,
        problem,
        INITIAL,
        DATA,
        inner=GradientDescent(steps=600, lr=0.2),
        batched=True,
    )
    exact = run(method="unrolled").grads
    implicit = run(method=Implicit(CG(max_steps=60, tol=1e-12)))
    for name in INITIAL:
        assert relative_error(implicit.grads[name], exact[name]) < 1e-7
    assert implicit.report.inner_gradient_norm.max() < 1e-9


def test_gauss_newton_differs_from_the_hessian_and_bounds_its_error():
    problem = network(Proximal(0.5))
    run = partial(
        hypergradient,
        problem,
        INITIAL,
        DATA,
        inner=GradientDescent(steps=300, lr=0.2),
        batched=True,
    )
    exact = run(method=Implicit(Dense(), curvature="gauss-newton"))
    rough = run(method=Implicit(CG(max_steps=2), curvature="gauss-newton"))
    hessian = run(method=Implicit(Dense()))
    assert relative_error(exact.grads["0.weight"], hessian.grads["0.weight"]) > 1e-3
    assert hessian.report.error_bound is None
    # with the proximal term the mixed derivative is −λI: u shows through the gradient, task by task, up to λ
    difference = (
        torch.cat([(exact.grads[n] - rough.grads[n]).flatten() for n in INITIAL]).norm() / 0.5
    )
    assert 0 < float(difference) <= float(rough.report.error_bound.sum())
    assert rough.report.products == 2
    assert rough.report.share(Status.MAX_STEPS) == 1.0


def test_an_arbitrary_penalty_has_its_exact_hessian():
    def quartic(params, meta):
        return 0.5 * sum(
            (p - meta[name]).square().sum() + 0.1 * p.pow(4).sum() for name, p in params.items()
        )

    run = partial(
        hypergradient,
        network(quartic),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=600, lr=0.1),
        batched=True,
    )
    exact = run(method="unrolled").grads
    for name in INITIAL:
        assert relative_error(run(method=Implicit(Dense())).grads[name], exact[name]) < 1e-7
    linear = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            lambda p, m, d: d[0] @ p["w"],
            lambda z, d: F.mse_loss(z, d[1][:, 0]),
            lambda p, m: quartic({"w": p["w"]}, m),
        ),
        outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
    )
    run = partial(
        hypergradient,
        linear,
        {"w": randn(2, seed=3)},
        DATA,
        inner=GradientDescent(steps=600, lr=0.1),
        batched=True,
    )
    gauss_newton = run(method=Implicit(Dense(), curvature="gauss-newton"))
    assert relative_error(gauss_newton.grads["w"], run(method="unrolled").grads["w"]) < 1e-8
    assert gauss_newton.report.error_bound is None


def test_the_error_bound_is_the_residual_norm_over_sigma_for_each_task():
    run = partial(
        hypergradient,
        network(Proximal(0.4)),
        INITIAL,
        inner=GradientDescent(steps=3, lr=0.1),
        method=GAUSS_NEWTON,
        batched=True,
    )
    scaled = (X, Y, XQ, YQ * torch.tensor([1.0, 30.0, 1.0], dtype=torch.float64)[:, None, None])
    result = run(scaled)
    v = torch.func.vmap(torch.func.grad(lambda p, d: outer(p, {}, d)))(result.params, scaled)
    norms = torch.cat([g.flatten(1) for g in v.values()], dim=1).norm(dim=1) / TASKS
    assert relative_error(result.report.error_bound, result.report.residual * norms / 0.4) < 1e-12


def test_no_bound_is_claimed_where_the_penalty_may_bend_down():
    def concave(params, meta):
        return sum(-0.01 * (p - meta[n]).square().sum() for n, p in params.items())

    method = Implicit(CG(), curvature="gauss-newton", damping=0.5)
    result = hypergradient(
        network(concave),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=3, lr=0.1),
        method=method,
        batched=True,
    )
    assert result.report.error_bound is None
    assert result.report.sigma == 0.5


def test_the_inner_gradient_norm_is_that_of_the_last_iterate():
    result = hypergradient(
        network(Proximal(0.4)),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=2, lr=0.1),
        method=GAUSS_NEWTON,
        batched=True,
    )
    gradient = torch.func.vmap(
        torch.func.grad(lambda p, d: network(Proximal(0.4)).inner_loss(p, INITIAL, d))
    )(result.params, DATA)
    norms = torch.cat([g.flatten(1) for g in gradient.values()], dim=1).norm(dim=1)
    assert relative_error(result.report.inner_gradient_norm, norms) < 1e-12


def test_streams_show_each_step_its_own_data():
    stream = Stream(lambda t: (X[:, t % 3 : t % 3 + 3], Y[:, t % 3 : t % 3 + 3], XQ, YQ))
    inner = GradientDescent(steps=3, lr=0.1)
    run = partial(hypergradient, network(Proximal(0.5)), inner=inner, batched=True)
    grads = run(INITIAL, stream, method="unrolled").grads["0.weight"]
    direction = randn(4, 2, seed=30)
    expected = finite_difference(
        lambda w: run(INITIAL | {"0.weight": w}, stream, method="unrolled").outer_loss,
        INITIAL["0.weight"],
        direction,
    )
    assert float((grads * direction).sum()) == pytest.approx(float(expected), rel=1e-7)
    with pytest.raises(ValueError, match="Implicit batch: got none with a Stream"):
        run(INITIAL, stream, method="cg")
    fixed = run(INITIAL, stream, method=Implicit(Dense(), batch=DATA))
    assert fixed.grads["0.weight"].isfinite().all()


def test_streams_and_batches_go_where_they_are_said_to():
    inner = GradientDescent(steps=2, lr=0.1)
    parts = [
        (randn(3, 6, 2, seed=40 + t), randn(3, 6, 1, seed=50 + t), XQ + t, YQ) for t in range(3)
    ]
    seen = []

    def fn(t):
        seen.append(t)
        return parts[t]

    problem = BilevelProblem(
        lambda meta, data: {n: meta[n] + 0.1 * data[0].mean() for n in INITIAL},
        network(Proximal(0.5)).inner_loss,
        outer,
    )
    stream = hypergradient(
        problem, INITIAL, Stream(fn), inner=inner, method="unrolled", batched=True
    )
    assert set(seen) == {0, 1, 2}
    start = {
        n: p + 0.1 * parts[0][0].mean((1, 2)).reshape(-1, *[1] * p.dim())
        for n, p in INITIAL.items()
    }
    params = {n: p.requires_grad_() for n, p in start.items()}
    for t in range(2):
        losses = torch.vmap(problem.inner_loss, in_dims=(0, None, 0))(params, INITIAL, parts[t])
        grads = torch.autograd.grad(losses.sum(), list(params.values()))
        params = {
            n: (p - 0.1 * g).detach().requires_grad_()
            for (n, p), g in zip(params.items(), grads, strict=True)
        }
    expected = torch.vmap(outer, in_dims=(0, None, 0))(params, {}, parts[2]).mean()
    assert relative_error(stream.outer_loss, expected.detach()) < 1e-12

    # the curvature sees the batch it is told, at the parameters that the stream led to
    fixed = parts[1]
    problem = network(Proximal(0.5))
    got = hypergradient(
        problem,
        INITIAL,
        Stream(lambda t: parts[t]),
        inner=inner,
        method=Implicit(Dense(), batch=fixed),
        batched=True,
    )
    frozen = BilevelProblem(
        lambda meta, data: {n: data[4][n] + 0 * meta[n] for n in INITIAL},
        problem.inner_loss,
        lambda p, m, d: outer(p, m, (d[0], d[1], d[5], d[6])),
    )
    expected = hypergradient(
        frozen,
        INITIAL,
        (*fixed, got.params, parts[2][2], parts[2][3]),
        inner=GradientDescent(steps=1, lr=1e-300),
        method="dense",
        batched=True,
    )
    for name in INITIAL:
        assert relative_error(got.grads[name], expected.grads[name]) < 1e-12


@pytest.mark.parametrize("products", ["forward-over-reverse", "finite-differences"])
def test_products_may_be_taken_otherwise(products):
    run = partial(
        hypergradient,
        network(Proximal(FromMeta("strength"))),
        INITIAL | {"strength": torch.tensor(1.5, dtype=torch.float64)},
        DATA,
        inner=GradientDescent(steps=5, lr=0.1),
        batched=True,
    )
    solver = CG(max_steps=60, tol=1e-9)
    exact, got = (
        run(method=Implicit(solver)).grads,
        run(method=Implicit(solver, products=products)).grads,
    )
    for name in exact:
        assert relative_error(got[name], exact[name]) < 1e-7


def test_finite_differences_need_first_derivatives_only():
    class Once(torch.autograd.Function):
        """tanh, without a second derivative."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.tanh())
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * (1 - ctx.saved_tensors[0].square())

    def problem(tanh):
        return BilevelProblem(
            init=lambda meta, data: {"w": meta["w"]},
            inner_loss=lambda p, m, d: (
                F.mse_loss(tanh(d[0] @ p["w"]), d[1][:, 0]) + 0.2 * (p["w"] - m["w"]).square().sum()
            ),
            outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
        )

    run = partial(
        hypergradient,
        meta={"w": randn(2, seed=3)},
        data=DATA,
        inner=GradientDescent(steps=3, lr=0.1),
        batched=True,
    )
    exact = run(problem(torch.tanh), method="dense").grads["w"]
    for method in (
        "dense",
        "unrolled",
    ):  # to autograd their second derivative is zero, and it does not say so
        with pytest.raises(
            ValueError,
            match="inner loss: it uses an operation whose backward is once_differentiable",
        ):
            run(problem(Once.apply), method=method, vectorize="loop")
    assert (
        run(problem(Once.apply), method="first-order", vectorize="loop").grads["w"].isfinite().all()
    )
    got = run(
        problem(Once.apply),
        method=Implicit(Dense(), products="finite-differences"),
        vectorize="loop",
    ).grads["w"]
    assert relative_error(got, exact) < 1e-7


def test_any_generalised_curvature_fits():
    run = partial(
        hypergradient,
        network(Proximal(0.5)),
        INITIAL,
        DATA,
        inner=GradientDescent(steps=5, lr=0.1),
        batched=True,
    )
    fisher = run(method=Implicit(Dense(), curvature=partial(Fisher, likelihood="gaussian")))
    gauss_newton = run(method=Implicit(Dense(), curvature="gauss-newton"))
    empirical = run(
        method=Implicit(
            Dense(), curvature=partial(Fisher, likelihood="gaussian", expectation="empirical")
        )
    )
    sampled = run(
        method=Implicit(
            Dense(), curvature=partial(Fisher, likelihood="gaussian", expectation="monte-carlo")
        )
    )
    assert sampled.grads["0.weight"].isfinite().all()  # its own draws are no dropout
    assert fisher.report.curvature == "fisher"
    assert fisher.report.error_bound is not None
    # the loss is the mean square, twice the negative log-likelihood of a unit variance: A differs, by this factor
    assert relative_error(fisher.grads["0.weight"], gauss_newton.grads["0.weight"]) > 1e-3
    assert relative_error(fisher.grads["0.weight"], empirical.grads["0.weight"]) > 1e-3


@pytest.mark.parametrize(
    "solver", [CG(4, 0.0), MINRES(4, 0.0), NystromCG(rank=3, max_steps=4, tol=0.0, refresh=9)]
)
def test_a_solver_goes_on_from_the_report_of_the_call_before(solver):
    torch.manual_seed(0)
    run = partial(
        hypergradient,
        network(Proximal(0.5)),
        data=DATA,
        inner=GradientDescent(steps=5, lr=0.1),
        method=Implicit(solver, curvature="gauss-newton"),
        batched=True,
    )
    first = run(meta=INITIAL)
    moved = {name: p + 1e-5 * randn(*p.shape, seed=5) for name, p in INITIAL.items()}
    cold, warm = run(meta=moved), run(meta=moved, state=first.report.state)
    assert (warm.report.residual < 0.5 * first.report.residual).all()
    assert (warm.report.residual < 0.5 * cold.report.residual).all()


def test_a_model_that_draws_random_numbers_is_refused():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda p, m, d: (
            F.mse_loss(F.dropout(d[0], 0.5) @ p["w"], d[1][:, 0]) + (p["w"] - m["w"]).square().sum()
        ),
        outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
    )
    run = partial(
        hypergradient,
        problem,
        {"w": randn(2, seed=3)},
        DATA,
        inner=GradientDescent(steps=3, lr=0.1),
        batched=True,
    )
    assert run(method="unrolled").grads["w"].isfinite().all()
    with pytest.raises(ValueError, match=r"inner loss: it draws random numbers \(dropout\?\)"):
        run(method="cg")


def kronecker(**options):
    """A softmax regression that adapts: of one example, K-FAC of a linear layer is its Gauss–Newton matrix."""
    model = torch.nn.Linear(2, 3).double()
    data = (
        randn(TASKS, 1, 2, seed=1),
        torch.zeros(TASKS, 1, dtype=torch.long),
        randn(TASKS, 4, 2, seed=2),
    )
    problem = BilevelProblem(
        init=lambda meta, d: {n: meta[n] for n in ("weight", "bias")},
        inner_loss=Composite(
            lambda p, m, d: torch.func.functional_call(model, p, (d[0],)),
            lambda z, d: F.cross_entropy(z, d[1]),
            Proximal(0.3),
            module=model,
        ),
        outer_loss=lambda p, m, d: torch.func.functional_call(model, p, (d[2],)).square().mean(),
    )
    meta = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    run = partial(
        hypergradient, problem, meta, data, inner=GradientDescent(steps=3, lr=0.1), batched=True
    )
    return run(**options)


@pytest.mark.parametrize("flag", ["kfac", "ekfac"])
def test_kronecker_factors_where_they_are_exact(flag):
    exact = kronecker(method=Implicit(Dense(), curvature="gauss-newton"))
    factored = kronecker(method=flag)
    for name in exact.grads:
        assert relative_error(factored.grads[name], exact.grads[name]) < 1e-10
    assert (factored.report.curvature, factored.report.products) == (flag, 1)
    assert factored.report.error_bound is not None
    # an exact preconditioner solves in one step
    helped = kronecker(method=Implicit(CG(1), curvature="gauss-newton", preconditioner=flag))
    for name in exact.grads:
        assert relative_error(helped.grads[name], exact.grads[name]) < 1e-9


def test_kronecker_factors_are_refused_where_there_are_none():
    run = partial(hypergradient, data=DATA, inner=GradientDescent(steps=3, lr=0.1), batched=True)
    with pytest.raises(ValueError, match="KFAC: got an inner loss that hides its layers"):
        run(network(Proximal(0.5)), INITIAL, method="kfac")
    with pytest.raises(
        ValueError, match="curvature='kfac': got an inner_loss that is a plain function"
    ):
        run(
            BilevelProblem(network().init, lambda p, m, d: d[0].sum(), outer),
            INITIAL,
            method="kfac",
        )
    with pytest.raises(ValueError, match="preconditioner: got 'jacobi'"):
        Implicit(CG(), preconditioner="jacobi")
    with pytest.raises(ValueError, match="preconditioner: Neumann takes none"):
        kronecker(method=Implicit(Neumann(), preconditioner="kfac", curvature="gauss-newton"))


def test_a_diagonal_curvature_solves_a_diagonal_problem_and_preconditions_a_scaled_one():
    """Squared error of w ⊙ x on inputs of very different size: Gauss–Newton is diagonal."""
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
    run = partial(hypergradient, problem, meta, randn(1, 9, seed=2), inner=GradientDescent(1, 1e-4))
    exact = run(method=Implicit(Dense(), curvature="gauss-newton")).grads["w"]
    got = run(method=Implicit(Factored(), curvature="diagonal"))
    assert relative_error(got.grads["w"], exact) < 1e-10
    assert got.report.curvature == "diagonal"
    few = [
        relative_error(
            run(method=Implicit(CG(2), curvature="gauss-newton", preconditioner=p)).grads["w"],
            exact,
        )
        for p in (None, "diagonal")
    ]
    assert few[1] < 1e-10 < 1e-2 < few[0]


@pytest.mark.parametrize(
    "penalty",
    [  # A indefinite; A positive definite, and its core not; another penalty
        Proximal(0.1),
        Proximal(50.0),
        lambda params, meta: 0.05 * (params["w"] - meta["w"]).square().sum(),
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
    with pytest.raises(
        ValueError,
        match=r"Gauss–Newton: got a loss that is not convex in the outputs \(curvature -",
    ):
        hypergradient(
            problem,
            {"w": randn(4, seed=1)},
            randn(6, 4, seed=2),
            inner=GradientDescent(1, 0.01),
            method=Implicit(CG(3), curvature="gauss-newton"),
        )
