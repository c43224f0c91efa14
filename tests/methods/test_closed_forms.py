"""Every method against closed forms: a quadratic of prescribed spectrum, and ridge regression."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import Oracle, largest_error, quadratic, relative_error, ridge

from metaimplicit import CG, METHODS, Dense, GradientDescent, Implicit, Nystrom, hypergradient
from metaimplicit.methods import make_method
from metaimplicit.solvers import Status

STEPS = 14


@dataclass(frozen=True)
class Case:
    """An oracle, and a step size with which `STEPS` steps of gradient descent solve it."""

    oracle: Oracle
    lr: float

    def run(self, method, **options):
        return hypergradient(
            self.oracle.problem,
            self.oracle.meta,
            self.oracle.data,
            inner=GradientDescent(steps=STEPS, lr=self.lr),
            method=method,
            batched=True,
            **options,
        )


CASES = {
    "quadratic": Case(quadratic([[1.0, 1.1, 1.3, 1.5], [1.0, 1.2, 1.4, 1.5]]), lr=0.8),
    "ridge": Case(ridge(m=600), lr=0.72),
}

# What makes a method exact where the inner problem is solved. The steps are the fewest that
# suffice, so that a slower solver fails: for a Krylov method as many as unknowns, of which the
# quadratic has four, and ridge regression six.
SOLVED = {
    "unrolled": {},
    "truncated": {"solver_steps": STEPS},
    "forward": {},
    "real-time": {},
    "cg": {"solver_steps": 6, "tol": 1e-13},
    "auto": {},
    "neumann": {"solver_steps": 28, "scale": 0.5},
    "nystrom-cg": {"rank": 2, "solver_steps": 4, "tol": 1e-13},
    "lanczos": {"solver_steps": 4, "tol": 1e-13},
    "minres": {"solver_steps": 4, "tol": 1e-13},
    "dense": {},
    "amigo": {"solver_steps": 28, "scale": 0.5},
}
# These are exact for a damped system, for other curvatures or in other limits, or never. By the
# file and the beginning of the name of a test that holds them against an oracle.
TESTED_ELSEWHERE = {
    "first-order": "test_reverse.py::test_truncated_is_first_order_at_k_0_and_unrolled_at_k_t",
    "reptile": "test_reverse.py::test_reptile_moves_towards_the_adapted_parameters",
    "soba": "test_single_loop.py::test_steps_that_continue_from_call_to_call_converge",
    "t1-t2": "test_single_loop.py::test_t1_t2_replaces_the_inverse_curvature_by_the_step_size",
    "fixed-point": "test_fixed_point.py::test_it_agrees_with_unrolling_to_convergence",
    "sama": "test_single_loop.py::test_sama_is_exact_where_the_optimiser_inverts_the_curvature",
    "f2sa": "test_single_loop.py::test_the_value_function_is_the_gradient_of_its_penalty",
    "nystrom": "test_closed_forms.py::test_nystrom_of_full_rank_solves_the_shifted_system",
    "nystrom-gaussian": "test_closed_forms.py::test_nystrom_of_full_rank_solves_the_shifted_system",
    "kfac": "test_implicit_curvature.py::"
    "test_kfac_is_gauss_newton_for_a_linear_layer_and_one_example",
    "ekfac": "test_implicit_curvature.py::"
    "test_kfac_is_gauss_newton_for_a_linear_layer_and_one_example",
    "diagonal": "test_implicit_curvature.py::test_the_diagonal_solves_a_diagonal_problem",
}


def test_every_method_is_exact_or_tested_elsewhere():
    for flag in METHODS:
        assert (flag in SOLVED) != (flag in TESTED_ELSEWHERE), (
            f"tests/methods/test_closed_forms.py: got {flag!r} in none or both of SOLVED and "
            "TESTED_ELSEWHERE, expected it in one; add its options to SOLVED if it is exact where "
            "the inner problem is solved, or else the test of its own to TESTED_ELSEWHERE"
        )
    assert set(SOLVED) | set(TESTED_ELSEWHERE) <= set(METHODS)
    for test in TESTED_ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test


# Methods that differ in their solver alone take the penalty of ridge regression in one way.
BY_RIDGE = ["unrolled", "forward", "cg", "dense"]
ROWS = [("quadratic", flag, "vmap") for flag in SOLVED]
ROWS += [("ridge", flag, "loop") for flag in BY_RIDGE]


@pytest.mark.parametrize(("name", "flag", "vectorize"), ROWS)
def test_a_method_agrees_with_the_closed_form(name, flag, vectorize):
    case = CASES[name]
    method = make_method(flag, **SOLVED[flag])
    result = case.run(method, vectorize=vectorize)
    assert largest_error(result.grads, case.oracle.exact) < 1e-8


@pytest.mark.filterwarnings("ignore:.* ended with:RuntimeWarning")
@pytest.mark.parametrize("flag", [flag for flag in SOLVED if "solver_steps" in SOLVED[flag]])
def test_a_method_is_not_exact_after_half_of_its_steps(flag):
    options = dict(SOLVED[flag])
    options["solver_steps"] //= 2
    result = CASES["quadratic"].run(make_method(flag, **options), vectorize="vmap")
    assert largest_error(result.grads, CASES["quadratic"].oracle.exact) > 1e-8, (
        f"SOLVED[{flag!r}]: got twice the solver_steps that are enough, expected the fewest, so "
        f"that a slower solver fails; {options['solver_steps']} are enough"
    )


@pytest.mark.parametrize(
    ("flag", "curvature"),
    [("dense", "gauss-newton"), ("cg", "gauss-newton"), ("neumann", "hessian")],
)
def test_hessian_and_gauss_newton_agree_where_the_model_is_linear(flag, curvature):
    case = CASES["ridge"]
    method = replace(make_method(flag, **SOLVED[flag]), curvature=curvature)
    result = case.run(method)
    assert largest_error(result.grads, case.oracle.exact) < 1e-8
    decay = torch.tensor(-1.0).exp().item()
    assert result.report.sigma == pytest.approx(decay, rel=1e-6)
    assert result.report.curvature == curvature


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
@pytest.mark.parametrize(("name", "n"), [("quadratic", 4), ("ridge", 6)])
def test_nystrom_of_full_rank_solves_the_shifted_system(name, n, sketch):
    case = CASES[name]
    result = case.run(Implicit(Nystrom(rank=n, rho=0.05, sketch=sketch)))
    assert largest_error(result.grads, case.oracle.shifted(0.05)) < 1e-8
    assert result.report.rho == 0.05


def test_damping_is_added_to_the_curvature():
    case = CASES["quadratic"]
    result = case.run(Implicit(Dense(), damping=0.7))
    assert largest_error(result.grads, case.oracle.shifted(0.7)) < 1e-9


def run_ridge(data, batched=False):
    return hypergradient(
        CASES["ridge"].oracle.problem,
        CASES["ridge"].oracle.meta,
        data,
        inner=GradientDescent(steps=STEPS, lr=CASES["ridge"].lr),
        method="cg",
        batched=batched,
    )


def test_one_problem_is_a_batch_of_one_task():
    data = CASES["ridge"].oracle.data
    single = run_ridge(tuple(x[1] for x in data))
    batch = run_ridge(tuple(x[1:2] for x in data), batched=True)
    assert single.params["w"].shape == (6,)
    assert batch.params["w"].shape == (1, 6)
    assert relative_error(single.params["w"], batch.params["w"][0]) < 1e-13
    assert largest_error(single.grads, batch.grads) < 1e-13


def test_the_gradient_of_a_batch_is_the_mean_over_its_tasks():
    data = CASES["ridge"].oracle.data
    tasks = [run_ridge(tuple(x[i] for x in data)).grads["log_decay"] for i in range(3)]
    batch = run_ridge(data, batched=True)
    assert relative_error(batch.grads["log_decay"], torch.stack(tasks).mean()) < 1e-12


INDEFINITE = quadratic([[-1.0, 1.0, 2.0, 3.0]])
run_indefinite = partial(
    hypergradient,
    INDEFINITE.problem,
    INDEFINITE.meta,
    INDEFINITE.data,
    inner=GradientDescent(steps=2, lr=0.1),
    batched=True,
)


def test_negative_curvature_is_reported_with_a_warning():
    with pytest.warns(RuntimeWarning, match="CG ended with NEGATIVE_CURVATURE.*gauss-newton"):
        result = run_indefinite(method="cg")
    assert result.report.status.tolist() == [Status.NEGATIVE_CURVATURE]
    assert result.report.rayleigh.item() <= 0


def test_negative_curvature_is_an_error_of_a_strict_method():
    with pytest.raises(FloatingPointError, match="NEGATIVE_CURVATURE"):
        run_indefinite(method=Implicit(CG(), strict=True))
