"""The solver that chooses: what, why, and never worse."""

import pytest
import torch
from oracles import Matrix, krylov_minimiser, randn, relative_error, symmetric

from metaimplicit import CG, Auto, GradientDescent, Lanczos, NystromCG, Status, hypergradient
from metaimplicit.methods import Implicit
from metaimplicit.solvers import SolverState

LOG = torch.logspace(-2, 0, 40).unsqueeze(0)
BENT = torch.linspace(-1, 5, 40).unsqueeze(0)


def test_small_systems_are_solved_densely():
    matrix, b = symmetric(torch.cat([LOG, BENT])), randn(2, 40, seed=1)
    solution = Auto(max_steps=3).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-10
    assert solution.chosen == "Dense: n = 40 ≤ 256"
    assert Auto(dense=40).solve(Matrix(matrix), b).chosen == "Dense: n = 40 ≤ 40"


def test_larger_ones_by_lanczos_and_without_a_state_nothing_is_kept():
    matrix, b = symmetric(torch.cat([LOG, BENT])), randn(2, 40, seed=1)
    auto, lanczos = (s.solve(Matrix(matrix), b) for s in (Auto(7, dense=39), Lanczos(7)))
    assert torch.equal(auto.value, lanczos.value)
    assert auto.chosen == "Lanczos: n = 40 > 39"
    assert set(auto.state.to_dict()) == {"solution"}
    assert relative_error(auto.value[0], krylov_minimiser(matrix[0], b[0], 7)) < 1e-10


def test_a_basis_too_large_is_not_kept():
    matrix, b = symmetric(BENT), randn(1, 40, seed=1)
    auto = Auto(7, dense=0, memory=4 * 7 * 40 * 8 - 1).solve(Matrix(matrix), b)
    assert torch.equal(auto.value, CG(7, negative="minres").solve(Matrix(matrix), b).value)
    assert auto.chosen.startswith("CG: a basis of 0 MiB is above")
    assert "Lanczos" in Auto(7, dense=0, memory=4 * 7 * 40 * 8).solve(Matrix(matrix), b).chosen


def test_a_basis_is_counted_for_every_task():
    matrix, b = symmetric(torch.cat([LOG, LOG])), randn(2, 40, seed=1)
    assert "Lanczos" in Auto(7, dense=0, memory=2 * 4 * 7 * 40 * 8).solve(Matrix(matrix), b).chosen
    assert "CG" in Auto(7, dense=0, memory=2 * 4 * 7 * 40 * 8 - 1).solve(Matrix(matrix), b).chosen


def test_what_is_solved_already_stays():
    matrix, b, solver = symmetric(LOG), randn(1, 40, seed=1), Auto(60, dense=0)
    state = solver.solve(Matrix(matrix), b).state
    again = solver.solve(Matrix(matrix), b, state=state)
    assert again.products == 1
    assert again.status.tolist() == [Status.CONVERGED]
    zero = solver.solve(Matrix(matrix), 0 * b, state=state)
    assert zero.value.abs().max() == 0


def test_ritz_vectors_that_solve_worse_or_slower_are_dropped():
    matrix, b = symmetric(LOG), randn(1, 40, seed=1)
    other = symmetric(LOG.flip(1), seed=5)

    def after(steps, a, tol):
        solver = Auto(steps, tol=tol, dense=0)
        state = solver.solve(
            Matrix(matrix), b, state=SolverState(torch.zeros(1, 40).double())
        ).state
        return state.record.tolist(), solver.solve(
            Matrix(a), b + 0.1 * randn(1, 40, seed=2), state=state
        )

    (reached, spent), worse = after(
        12, other, 1e-12
    )  # as many steps as ever, and a larger residual
    assert worse.residual > reached
    assert int(worse.needed) <= spent + 1
    assert "no more" in worse.chosen
    (reached, spent), slower = after(300, other, 1e-6)  # converged, in more steps
    assert slower.residual <= 1e-6
    assert int(slower.needed) > spent
    assert "no more" in slower.chosen
    (reached, spent), better = after(60, matrix, 1e-6)
    assert "still pay" in better.chosen
    (reached, spent), within = after(60, matrix, 0.1)  # a larger residual, below the tolerance
    assert 1.2 * reached < within.residual <= 0.1
    assert "still pay" in within.chosen


def test_cg_goes_on_where_precision_ends_lanczos():
    matrix = symmetric([[1e6, *torch.linspace(1, 2, 39).tolist()]])
    b = randn(1, 40, seed=1).float()
    rough, solution = (s.solve(Matrix(matrix.float()), b) for s in (Lanczos(30), Auto(30, dense=0)))
    assert rough.status.tolist() == [Status.BREAKDOWN]
    assert solution.residual < 0.1 * rough.residual
    assert solution.products <= 30 + 3


def test_a_state_of_another_solver_is_a_start():
    matrix, b = symmetric(LOG), randn(1, 40, seed=1)
    states = [Lanczos(20, recycle=True).solve(Matrix(matrix), b).state]
    states.append(NystromCG(rank=3, max_steps=9).solve(Matrix(matrix), b).state)
    for state in states:
        assert Auto(60, dense=0).solve(Matrix(matrix), b, state=state).status.tolist() == [
            Status.CONVERGED
        ]
    warm = Auto(20, dense=0).solve(Matrix(matrix), b, state=states[0]).state
    assert warm.record is not None
    assert NystromCG(rank=3, max_steps=60).solve(Matrix(matrix), b, state=warm).residual < 1e-6


def test_ritz_vectors_are_kept_while_they_pay():
    matrix, b = symmetric(LOG), randn(1, 40, seed=1)
    solver, state, chosen, spent = Auto(60, tol=1e-6, dense=0), None, [], []
    for _ in range(4):
        operator = Matrix(matrix)
        solution = solver.solve(operator, b + 0.1 * randn(1, 40, seed=7 + len(chosen)), state=state)
        state = solution.state
        assert solution.products == operator.products
        assert solution.status.tolist() == [Status.CONVERGED]
        chosen.append(solution.chosen)
        spent.append(solution.products)
    assert chosen == [
        "Lanczos: n = 40 > 0",
        "Lanczos: n = 40 > 0, from the solution before",
        "CG on kept Ritz vectors, which still pay",
        "CG on kept Ritz vectors, which still pay",
    ]
    assert max(spent[2:]) < 0.5 * min(spent[:2])
    # another matrix altogether: noticed after one solve, which is still a solve of the new system, and undone
    other = symmetric(torch.logspace(-2, 0, 40).flip(0).unsqueeze(0), seed=5)
    late = solver.solve(Matrix(other), b, state=state)
    assert late.chosen == "CG on kept Ritz vectors, which pay no more"
    assert late.state.low_rank is None
    assert solver.solve(Matrix(other), b, state=late.state).chosen.startswith("Lanczos")


def test_of_an_indefinite_task_nothing_is_kept():
    matrix, b = symmetric(torch.cat([LOG, BENT])), randn(2, 40, seed=1)
    state = SolverState(torch.zeros(2, 40).double())
    state = Auto(30, dense=0).solve(Matrix(matrix), b, state=state).state
    assert (state.low_rank.inverse[0] > 0).all()
    assert (state.low_rank.inverse[1] == 0).all()
    again = Auto(30, dense=0).solve(Matrix(matrix), b, state=state)
    fresh = Lanczos(30).solve(Matrix(matrix), b)
    assert (again.residual <= fresh.residual.clamp(min=1e-6)).all()
    alone = Auto(30, dense=0).solve(
        Matrix(matrix[1:]), b[1:], state=SolverState(torch.zeros(1, 40).double())
    )
    assert set(alone.state.to_dict()) == {"solution"}


def test_a_system_that_has_become_indefinite_is_solved_all_the_same():
    matrix, b, solver = symmetric(LOG), randn(1, 40, seed=1), Auto(200, tol=1e-8, dense=0)
    state = solver.solve(Matrix(matrix), b, state=SolverState(torch.zeros(1, 40).double())).state
    bent = matrix - 0.05 * torch.eye(40).double()
    operator = Matrix(bent)
    solution = solver.solve(operator, b, state=state)
    assert relative_error(solution.value, torch.linalg.solve(bent, b)) < 1e-6
    assert solution.rayleigh < 0
    assert solution.products == operator.products
    few = Auto(10, tol=1e-8, dense=0)
    cut = few.solve(
        Matrix(bent), b, state=few.solve(Matrix(matrix), b, state=SolverState(0 * b)).state
    )
    assert cut.products <= 10 + 3
    assert cut.residual <= 1  # no worse than no answer
    assert solution.state.low_rank is None


def test_the_report_says_what_was_chosen():
    from oracles import ridge

    found = ridge()
    for solver, chosen in (
        (Auto(), "Dense: n = 6 ≤ 256"),
        (Auto(10, dense=0), "Lanczos: n = 6 > 0"),
    ):
        result = hypergradient(
            found.problem,
            found.meta,
            found.data,
            inner=GradientDescent(600, 0.3),
            method=Implicit(solver),
            batched=True,
        )
        assert result.report.chosen == chosen
        assert relative_error(result.grads["log_decay"], found.exact["log_decay"]) < 1e-6


def test_impossible_choices_are_refused():
    for make in (
        lambda: Auto(max_steps=0),
        lambda: Auto(dense=-1),
        lambda: Auto(memory=-1),
        lambda: Auto(tol=-1.0),
    ):
        with pytest.raises(ValueError, match=r"Auto .*got .*expected"):
            make()
