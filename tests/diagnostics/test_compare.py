"""Methods side by side: a row of `compare` is `hypergradient` with the solver spelt out."""

import statistics
import warnings
from collections import Counter
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from oracles import quadratic, relative_error
from solver_cases import FACTORED_METHODS

from metaimplicit import (
    CG,
    METHODS,
    BilevelProblem,
    Composite,
    Dense,
    GradientDescent,
    Implicit,
    Neumann,
    NewtonCG,
    Nystrom,
    Proximal,
    hypergradient,
)
from metaimplicit.diagnostics import comparable_methods, compare
from metaimplicit.solvers import MINRES, Factored, Lanczos, NystromCG, Status

SPECTRA = [[0.5, 1, 2, 3, 5, 8, 9, 10], [1, 1, 1, 2, 2, 2, 4, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
SOLVED = NewtonCG(tol=1e-12)
SHORT = GradientDescent(steps=3, lr=0.05)

AT_BUDGET = set(comparable_methods()) - FACTORED_METHODS
SKETCHES = {"nystrom", "nystrom-gaussian", "nystrom-cg"}


def compare_quadratic(inner=SOLVED, **options):
    oracle = quadratic(SPECTRA)
    return compare(oracle.problem, oracle.meta, oracle.data, inner=inner, batched=True, **options)


def problem_of_one(outer):
    """A problem of one number, with its φ and data."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(())},
        inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square(),
        outer_loss=lambda params, meta, data: outer(params["w"]),
    )
    return problem, {"target": torch.ones(())}, None


def methods_of(comparison, products):
    return {row.method for row in comparison.rows if row.products == products}


def test_every_implicit_method_is_compared_unless_its_solver_takes_no_budget():
    implicit = {flag: method for flag, method in METHODS.items() if isinstance(method, Implicit)}
    without_budget = {
        flag
        for flag, method in implicit.items()
        if method.solver.with_budget(5) is None and not isinstance(method.solver, Factored)
    }
    assert without_budget == {"dense", "t1-t2", "soba", "amigo"}
    assert set(comparable_methods()) == set(implicit) - without_budget


@pytest.mark.slow
def test_errors_are_those_of_the_hypergradients():
    oracle = quadratic(SPECTRA)
    comparison = compare_quadratic(products=(2, 4), methods=["neumann", "auto", "cg"])
    run = partial(
        hypergradient, oracle.problem, oracle.meta, oracle.data, inner=SOLVED, batched=True
    )
    for products in (2, 4):
        for flag, solver in (("cg", CG(products, tol=0.0)), ("neumann", Neumann(terms=1))):
            result = run(method=Implicit(solver))
            expected = relative_error(result.grads["phi"], oracle.exact["phi"])
            assert comparison.error(flag, products) == pytest.approx(expected, rel=1e-6)
        error_of_cg = comparison.error("cg", products)
        assert comparison.error("auto", products) == pytest.approx(error_of_cg)
        errors = [row.error for row in comparison.rows if row.products == products]
        assert errors == sorted(errors)
    with pytest.raises(KeyError):
        comparison.error("cg", 3)


def test_a_comparison_describes_the_problem():
    oracle = quadratic(SPECTRA)
    comparison = compare_quadratic(products=[1], methods="cg")
    assert comparison.size == 8
    assert comparison.tasks == 3
    assert comparison.curvature == "hessian"
    assert comparison.smallest == pytest.approx(0.5)
    assert comparison.largest == pytest.approx(10.0)
    assert comparison.inner_gradient_norm < 1e-10
    direct = oracle.meta["phi"]  # ∂g/∂φ = φ
    expected = relative_error(direct, oracle.exact["phi"])
    assert comparison.direct == pytest.approx(expected)


INDEFINITE = quadratic([SPECTRA[0], [-1, 1, 1, 2, 2, 2, 4, 4], SPECTRA[2]])
SEEDS = 3

# The solver of a method at P products.
SPELT_OUT = {
    "cg": lambda p: CG(p, tol=0.0),
    "minres": lambda p: MINRES(p, tol=0.0),
    "lanczos": lambda p: Lanczos(p, tol=0.0),
    "neumann": lambda p: Neumann(terms=max(1, p - 5)),
    "nystrom": lambda p: Nystrom(rank=p),
    "nystrom-gaussian": lambda p: Nystrom(rank=p, sketch="gaussian"),
    "nystrom-cg": lambda p: NystromCG(rank=(p + 1) // 2, max_steps=p // 2, tol=0.0),
}


def run_indefinite(solver, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hypergradient(
            INDEFINITE.problem,
            INDEFINITE.meta,
            INDEFINITE.data,
            inner=SHORT,
            method=Implicit(solver, damping=0.25),
            batched=True,
        )


@cache
def exact_gradient():
    return run_indefinite(Dense()).grads["phi"]


@pytest.fixture(scope="module")
def indefinite_comparison():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    comparison = compare(
        INDEFINITE.problem,
        INDEFINITE.meta,
        INDEFINITE.data,
        inner=SHORT,
        damping=0.25,
        products=(5, 9),
        seeds=SEEDS,
        batched=True,
    )
    assert torch.equal(before, torch.get_rng_state())
    return comparison


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "products"),
    [(flag, products) for flag in SPELT_OUT for products in (5, 9)],
)
def test_a_row_is_the_median_over_runs_of_its_solver(indefinite_comparison, flag, products):
    if flag in SKETCHES and products > 8:
        assert flag not in methods_of(indefinite_comparison, products)
        return
    (row,) = (
        row for row in indefinite_comparison.rows if (row.method, row.products) == (flag, products)
    )
    exact = exact_gradient()
    seeds = range(SEEDS if flag in SKETCHES else 1)
    results = [run_indefinite(SPELT_OUT[flag](products), seed) for seed in seeds]
    gradients = [result.grads["phi"] for result in results]
    reports = [result.report for result in results]

    error = statistics.median(relative_error(gradient, exact) for gradient in gradients)
    assert row.error == pytest.approx(error, rel=1e-6, abs=1e-12)
    cosine = statistics.median(float(F.cosine_similarity(g, exact, dim=0)) for g in gradients)
    assert row.cosine == pytest.approx(cosine, rel=1e-9)
    residual = statistics.median(float(report.residual.max()) for report in reports)
    assert row.residual == pytest.approx(residual, rel=1e-6, abs=1e-12)
    statuses = Counter(Status(int(s)).name for report in reports for s in report.status)
    assert row.status == ", ".join(name for name, _ in statuses.most_common())


def test_without_a_module_every_method_at_a_budget_has_a_row(indefinite_comparison):
    assert methods_of(indefinite_comparison, 5) == AT_BUDGET


@pytest.mark.slow
def test_a_sketch_of_more_than_n_columns_is_left_out():
    exact = {"cg", "minres", "lanczos", "auto"}  # after n products
    methods = [*exact, *SKETCHES]
    oracle = quadratic([[0.5, 1, 2], [1, 1, 2]])
    comparison = compare(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=SHORT,
        batched=True,
        products=(3, 4),
        seeds=1,
        methods=methods,
    )
    assert methods_of(comparison, 3) == exact | SKETCHES
    assert methods_of(comparison, 4) == exact
    for row in comparison.rows:
        if row.method in exact:
            assert row.error < 1e-8


def classifier():
    """A problem whose composite has a module, with its meta-parameters and data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)
    ).double()
    initial = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(9, 20).double()
    labels = torch.arange(9) % 3

    def outputs(params, inputs):
        return torch.func.functional_call(model, params, (inputs,))

    problem = BilevelProblem(
        init=lambda meta, data: initial,
        inner_loss=Composite(
            outputs=lambda params, meta, data: outputs(params, x * meta["scale"]),
            loss=lambda z, data: F.cross_entropy(z, labels),
            penalty=Proximal(0.1, center="zero"),
            module=model,
        ),
        outer_loss=lambda params, meta, data: outputs(params, x).square().mean(),
    )
    return problem, {"scale": torch.ones(20).double()}, x


@pytest.mark.slow
def test_methods_of_fixed_curvature_are_compared_with_a_module_and_damped_as_the_others_are():
    problem, meta, data = classifier()
    inner = GradientDescent(1, 0.1)
    comparison = compare(problem, meta, data, inner=inner, damping=0.3, products=[2], seeds=1)
    assert methods_of(comparison, 2) == AT_BUDGET | FACTORED_METHODS
    run = partial(hypergradient, problem, meta, data, inner=inner)
    exact = run(method=Implicit(Dense(), damping=0.3)).grads["scale"]
    for flag in ("kfac", "ekfac"):
        gradient = run(method=Implicit(Factored(), curvature=flag, damping=0.3)).grads["scale"]
        expected = relative_error(gradient, exact)
        assert comparison.error(flag, 2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_the_memory_of_lanczos_is_that_of_its_basis():
    problem, meta, data = classifier()
    inner = GradientDescent(1, 0.1)
    comparison = compare(problem, meta, data, inner=inner, products=[12], methods=["lanczos"])
    (row,) = comparison.rows
    basis = 12 * comparison.size * 8 / 2**20
    assert 2 * basis < row.mebibytes < 5 * basis


@pytest.mark.slow
def test_a_hypergradient_of_zero_has_absolute_errors():
    comparison = compare(*problem_of_one(lambda w: 0 * w), inner=SHORT, products=[1], methods="cg")
    assert comparison.direct == comparison.error("cg", 1) == 0


def test_a_small_hypergradient_has_its_cosine():
    comparison = compare(
        *problem_of_one(lambda w: 1e-20 * w), inner=SHORT, products=iter([1, 2]), methods="cg"
    )
    assert [row.products for row in comparison.rows] == [1, 2]
    assert [row.cosine for row in comparison.rows] == pytest.approx([1, 1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_no_gradients_are_recorded(mode):
    with mode():
        comparison = compare(*problem_of_one(lambda w: w), inner=SHORT, products=[1], methods="cg")
    assert comparison.error("cg", 1) < 1e-6


def test_a_loss_may_multiply_by_sparse_matrices():
    graph = torch.eye(3).to_sparse()

    def inner_loss(params, meta, data):
        return (graph @ params["w"][:, None] - meta["target"]).square().sum()

    problem = BilevelProblem(
        lambda meta, data: {"w": torch.zeros(3)}, inner_loss, lambda p, m, d: p["w"].sum()
    )
    meta = {"target": torch.ones(3, 1)}
    comparison = compare(problem, meta, None, inner=SHORT, products=[1], methods="cg")
    assert comparison.error("cg", 1) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["cg", "gmres"]}, "methods: got gmres, expected some of cg, "),
        ({"methods": ["unrolled"]}, "methods: got unrolled"),
        ({"inner": "sgd"}, "inner: got 'sgd', expected one of gradient-descent"),
        ({"seeds": 0}, "seeds: got 0, expected at least 1"),
        ({"products": (0, 3)}, "products: got 0, expected at least 1"),
        ({"products": ()}, r"products: got \(\), expected numbers"),
        ({"products": 3}, "products: got 3, expected numbers"),
    ],
)
def test_a_bad_argument_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare_quadratic(**options)
