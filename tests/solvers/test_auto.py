"""The solver that chooses: what it chooses, why, and that it is never worse."""

import pytest
import torch
from oracles import Matrix, krylov_minimiser, randn, relative_error, ridge, symmetric

from metaimplicit import CG, NewtonCG, hypergradient
from metaimplicit.methods import Implicit
from metaimplicit.solvers import Auto, Lanczos, NystromCG, SolverState, Status

DEFINITE = torch.logspace(-2, 0, 40).unsqueeze(0)
INDEFINITE = torch.linspace(-1, 5, 40).unsqueeze(0)
BOTH = torch.cat([DEFINITE, INDEFINITE])
B = randn(1, 40, seed=1)
ZERO_STATE = SolverState(torch.zeros(1, 40).double())


def test_small_systems_are_solved_densely():
    matrix = symmetric(BOTH)
    b = randn(2, 40, seed=1)
    solution = Auto(max_steps=3).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-10
    assert solution.chosen == "Dense: n = 40 ≤ 256"
    assert Auto(dense=40).solve(Matrix(matrix), b).chosen == "Dense: n = 40 ≤ 40"


def test_larger_ones_are_solved_by_lanczos_which_keeps_nothing_without_a_state():
    matrix = symmetric(BOTH)
    b = randn(2, 40, seed=1)
    auto = Auto(7, dense=39).solve(Matrix(matrix), b)
    assert torch.equal(auto.value, Lanczos(7).solve(Matrix(matrix), b).value)
    assert auto.chosen == "Lanczos: n = 40 > 39"
    assert set(auto.state.to_dict()) == {"solution"}
    assert relative_error(auto.value[0], krylov_minimiser(matrix[0], b[0], 7)) < 1e-10


@pytest.mark.parametrize("spectra", [INDEFINITE, BOTH])
def test_cg_solves_where_the_basis_of_all_tasks_is_above_the_memory(spectra):
    matrix = symmetric(spectra)
    tasks = len(spectra)
    b = randn(tasks, 40, seed=1)
    basis = 4 * 7 * tasks * 40 * 8  # four copies of 7 vectors of 40 numbers of 8 bytes
    auto = Auto(7, dense=0, memory=basis - 1).solve(Matrix(matrix), b)
    assert torch.equal(auto.value, CG(7, negative="minres").solve(Matrix(matrix), b).value)
    assert auto.chosen.startswith("CG: a basis of 0 MiB is above")
    assert "Lanczos" in Auto(7, dense=0, memory=basis).solve(Matrix(matrix), b).chosen


def test_a_system_that_is_solved_already_takes_one_product():
    matrix = symmetric(DEFINITE)
    solver = Auto(60, dense=0)
    state = solver.solve(Matrix(matrix), B).state
    again = solver.solve(Matrix(matrix), B, state=state)
    assert again.products == 1
    assert again.status.tolist() == [Status.CONVERGED]
    zero = solver.solve(Matrix(matrix), 0 * B, state=state)
    assert zero.value.abs().max() == 0


def test_cg_continues_where_precision_ends_lanczos():
    matrix = symmetric([[1e6, *torch.linspace(1, 2, 39).tolist()]]).float()
    rough = Lanczos(30).solve(Matrix(matrix), B.float())
    solution = Auto(30, dense=0).solve(Matrix(matrix), B.float())
    assert rough.status.tolist() == [Status.BREAKDOWN]
    assert solution.residual < 0.1 * rough.residual
    assert solution.products <= 30 + 3


# Ritz vectors of one solve for the next


def test_ritz_vectors_are_kept_while_they_save_products():
    matrix = symmetric(DEFINITE)
    solver = Auto(60, tol=1e-6, dense=0)
    state = None
    chosen = []
    products = []
    for i in range(4):
        operator = Matrix(matrix)
        solution = solver.solve(operator, B + 0.1 * randn(1, 40, seed=7 + i), state=state)
        state = solution.state
        assert solution.products == operator.products
        assert solution.status.tolist() == [Status.CONVERGED]
        chosen.append(solution.chosen)
        products.append(solution.products)
    assert chosen == [
        "Lanczos: n = 40 > 0",
        "Lanczos: n = 40 > 0, from the last solution",
        "CG with recycled Ritz vectors, which are kept",
        "CG with recycled Ritz vectors, which are kept",
    ]
    assert max(products[2:]) < 0.5 * min(products[:2])
    # Another matrix altogether is noticed after one solve, which still solves the new system.
    other = symmetric(DEFINITE.flip(1), seed=5)
    late = solver.solve(Matrix(other), B, state=state)
    assert late.chosen == "CG with recycled Ritz vectors, which are dropped"
    assert late.state.low_rank is None
    assert solver.solve(Matrix(other), B, state=late.state).chosen.startswith("Lanczos")


@pytest.mark.parametrize(
    ("steps", "tol", "same_matrix", "kept"),
    [
        (12, 1e-12, False, False),  # as many steps as before, and a larger residual
        (300, 1e-6, False, False),  # converged, in more steps
        (60, 1e-6, True, True),
        (60, 0.1, True, True),  # a larger residual, but below the tolerance
    ],
)
def test_ritz_vectors_that_solve_worse_or_slower_are_dropped(steps, tol, same_matrix, kept):
    matrix = symmetric(DEFINITE)
    other = symmetric(DEFINITE.flip(1), seed=5)
    solver = Auto(steps, tol=tol, dense=0)
    state = solver.solve(Matrix(matrix), B, state=ZERO_STATE).state
    residual, products = state.record.tolist()
    b = B + 0.1 * randn(1, 40, seed=2)
    solution = solver.solve(Matrix(matrix if same_matrix else other), b, state=state)
    assert solution.chosen.endswith("which are kept" if kept else "which are dropped")
    if steps == 12:
        assert solution.residual > residual
        assert int(solution.needed) <= products + 1
    if steps == 300:
        assert solution.residual <= 1e-6
        assert int(solution.needed) > products
    if tol == 0.1:
        assert 1.2 * residual < solution.residual <= 0.1


def test_lanczos_goes_on_where_recycled_vectors_meet_negative_curvature():
    solver = Auto(80, dense=0)
    state = solver.solve(Matrix(symmetric(DEFINITE)), B, state=ZERO_STATE).state
    indefinite = symmetric(DEFINITE - 0.3)
    solution = solver.solve(Matrix(indefinite), B, state=state)
    assert solution.chosen.startswith("CG with recycled Ritz vectors")
    assert solution.status.tolist() == [Status.CONVERGED]
    assert solution.rayleigh < 0
    assert relative_error(solution.value[0], torch.linalg.solve(indefinite[0], B[0])) < 1e-4


def test_of_an_indefinite_task_no_ritz_vector_is_kept():
    matrix = symmetric(BOTH)
    b = randn(2, 40, seed=1)
    state = SolverState(torch.zeros(2, 40).double())
    state = Auto(30, dense=0).solve(Matrix(matrix), b, state=state).state
    assert (state.low_rank.inverse[0] > 0).all()
    assert (state.low_rank.inverse[1] == 0).all()
    again = Auto(30, dense=0).solve(Matrix(matrix), b, state=state)
    fresh = Lanczos(30).solve(Matrix(matrix), b)
    assert (again.residual <= fresh.residual.clamp(min=1e-6)).all()
    alone = Auto(30, dense=0).solve(Matrix(matrix[1:]), b[1:], state=ZERO_STATE)
    assert set(alone.state.to_dict()) == {"solution"}


def test_a_system_that_has_become_indefinite_is_solved_too():
    matrix = symmetric(DEFINITE)
    solver = Auto(200, tol=1e-8, dense=0)
    state = solver.solve(Matrix(matrix), B, state=ZERO_STATE).state
    indefinite = matrix - 0.05 * torch.eye(40).double()
    operator = Matrix(indefinite)
    solution = solver.solve(operator, B, state=state)
    assert relative_error(solution.value, torch.linalg.solve(indefinite, B)) < 1e-6
    assert solution.rayleigh < 0
    assert solution.products == operator.products
    assert solution.state.low_rank is None
    few = Auto(10, tol=1e-8, dense=0)
    state = few.solve(Matrix(matrix), B, state=ZERO_STATE).state
    cut = few.solve(Matrix(indefinite), B, state=state)
    assert cut.products <= 10 + 3
    assert cut.residual <= 1  # no worse than no answer


def test_the_state_of_another_solver_is_a_start():
    matrix = symmetric(DEFINITE)
    states = [
        Lanczos(20, recycle=True).solve(Matrix(matrix), B).state,
        NystromCG(rank=3, max_steps=9).solve(Matrix(matrix), B).state,
    ]
    for state in states:
        solution = Auto(60, dense=0).solve(Matrix(matrix), B, state=state)
        assert solution.status.tolist() == [Status.CONVERGED]
    warm = Auto(20, dense=0).solve(Matrix(matrix), B, state=states[0]).state
    assert warm.record is not None
    assert NystromCG(rank=3, max_steps=60).solve(Matrix(matrix), B, state=warm).residual < 1e-6


# reports and refusals


@pytest.mark.parametrize(
    ("solver", "chosen"),
    [(Auto(), "Dense: n = 6 ≤ 256"), (Auto(10, dense=0), "Lanczos: n = 6 > 0")],
    ids=["dense", "lanczos"],
)
def test_the_report_says_what_was_chosen(solver, chosen):
    oracle = ridge()
    result = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=NewtonCG(tol=1e-10),
        method=Implicit(solver),
        batched=True,
    )
    assert result.report.chosen == chosen
    assert relative_error(result.grads["log_decay"], oracle.exact["log_decay"]) < 1e-6


@pytest.mark.parametrize(
    "options", [{"max_steps": 0}, {"dense": -1}, {"memory": -1}, {"tol": -1.0}]
)
def test_a_number_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=r"Auto .*got .*expected"):
        Auto(**options)
