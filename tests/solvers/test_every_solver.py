"""What holds for every solver."""

from dataclasses import replace

import pytest
import torch
from oracles import Matrix, randn, relative_error, symmetric
from solver_cases import SOLVERS, SPECTRA, DiagonalMatrix, positive_systems

from metaimplicit import CG, Dense, Neumann, Nystrom
from metaimplicit.operators import Identity
from metaimplicit.options import options_of, with_options
from metaimplicit.solvers import (
    GMRES,
    MINRES,
    Factored,
    Lanczos,
    NystromCG,
    SolverState,
    Status,
)

VALUES = torch.stack(SPECTRA).double()
B = randn(3, 12, seed=8)
BUDGETED = {name: s for name, s in SOLVERS.items() if s.with_budget(1) is not None}
BUDGETED["gmres"] = GMRES()
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def solve(solver, operator, b, **options):
    torch.manual_seed(0)
    return solver.solve(operator, b, **options)


def test_the_table_of_methods_has_every_solver():
    kinds = {type(solver) for solver in SOLVERS.values()}
    assert {CG, MINRES, Dense, Factored, Lanczos, Neumann, Nystrom, NystromCG} <= kinds
    assert len(SOLVERS) > len(kinds)  # some in several forms
    assert {CG, MINRES, Lanczos, Neumann, Nystrom} <= {type(s) for s in BUDGETED.values()}


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (CG(max_steps=40, tol=1e-13), 1e-10),
        (Dense(), 1e-12),
        (Dense(chunk=5), 1e-12),
        (MINRES(max_steps=40, tol=1e-13), 1e-10),
        (Lanczos(max_steps=40, tol=1e-13), 1e-10),
        (NystromCG(rank=4, max_steps=40, tol=1e-13), 1e-10),
        (NystromCG(rank=4, sketch="columns", rho=0.5, max_steps=40, tol=1e-13), 1e-10),
    ],
    ids=str,
)
def test_a_solver_that_converges_solves_each_task(solver, tolerance):
    matrix, b, exact = positive_systems()
    solution = solver.solve(Matrix(matrix), b)
    for task in range(3):
        assert relative_error(solution.value[task], exact[task]) < tolerance
    assert solution.status.tolist() == [Status.CONVERGED] * 3


@every_solver
def test_a_system_without_unknowns_has_a_solution(solver):
    solution = solve(solver, DiagonalMatrix(VALUES[:, :0]), B[:, :0])
    assert solution.value.shape == (3, 0)
    assert solution.status.tolist() == [Status.CONVERGED] * 3
    assert (solution.residual == 0).all()


@every_solver
def test_the_reported_residual_and_products_are_the_true_ones(solver):
    operator = DiagonalMatrix(VALUES)
    solution = solve(solver, operator, B)
    true = (B - VALUES * solution.value).norm(dim=1) / B.norm(dim=1)
    assert torch.allclose(solution.residual, true, rtol=1e-9, atol=1e-13)
    assert solution.products == operator.products
    assert (solution.needed <= solution.products).all()


@every_solver
def test_every_task_has_its_numbers(solver):
    operator = DiagonalMatrix(VALUES)
    first = solve(solver, operator, B)
    for solution in (first, solve(solver, operator, 2 * B, state=first.state)):
        numbers = (solution.status, solution.residual, solution.needed, solution.rayleigh)
        assert [tuple(x.shape) for x in numbers] == [(3,)] * 4
        assert solution.status.dtype == solution.needed.dtype == torch.int64
        assert (solution.needed >= 0).all()
        # Where a vector was multiplied by A, vᵀAv/vᵀv is between the extreme eigenvalues.
        seen = solution.rayleigh.isfinite()
        least, most = ((1 - 1e-9) * VALUES.amin(1), (1 + 1e-9) * VALUES.amax(1))
        assert ((least <= solution.rayleigh) & (solution.rayleigh <= most))[seen].all()


@every_solver
def test_converged_means_solved(solver):
    values = torch.stack([torch.zeros(12), torch.full((12,), 3.0), SPECTRA[0]]).double()
    core = DiagonalMatrix(values)
    exact = B / (values + 1.0)
    many_steps = {"solver_steps": 60} if "solver_steps" in options_of(solver) else {}
    for options in ({}, many_steps):
        solution = solve(with_options(solver, options), core + Identity(core, 1.0), B)
        converged = solution.status == int(Status.CONVERGED)
        for task in converged.nonzero().flatten():
            assert relative_error(solution.value[task], exact[task]) < 1e-5
    assert converged.any(), "expected CONVERGED for one of these: I, 4I, and a condition of 5.5"


@pytest.mark.parametrize("products", [10, 15])
@pytest.mark.parametrize("solver", BUDGETED.values(), ids=BUDGETED)
def test_a_budget_is_spent_and_not_exceeded(solver, products):
    """Even where the tolerance of the solver is met before."""
    operator = Matrix(symmetric(torch.linspace(1, 2, 30).expand(2, 30)))
    solve(solver.with_budget(products), operator, randn(2, 30, seed=8))
    assert 0.75 * products <= operator.products <= products + 1  # one more gives the residual


@every_solver
def test_a_task_is_solved_as_if_it_were_alone(solver):
    together = solve(solver, DiagonalMatrix(VALUES), B)
    for task in range(3):
        one = slice(task, task + 1)
        alone = solve(solver, DiagonalMatrix(VALUES[one]), B[one])
        assert relative_error(together.value[one], alone.value) < 1e-12
        assert together.status[task] == alone.status


@every_solver
def test_the_scale_of_the_right_hand_side_does_not_matter(solver):
    """Even where the square of its norm underflows."""
    expected = solve(solver, DiagonalMatrix(VALUES), B)
    for scale in (1e-200, -1e100):
        scaled = solve(solver, DiagonalMatrix(VALUES), scale * B)
        assert relative_error(scaled.value / scale, expected.value) < 1e-12


@every_solver
def test_a_zero_right_hand_side_gives_zero(solver):
    b = torch.stack([torch.zeros(12), torch.ones(12)]).double()
    solution = solve(solver, DiagonalMatrix(VALUES[:2]), b)
    assert solution.value[0].abs().max() == 0
    assert solution.residual[0] == 0
    assert solution.value[1].abs().max() > 0


@every_solver
def test_a_right_hand_side_that_has_become_zero_gives_zero(solver):
    operator = DiagonalMatrix(VALUES)
    state = solve(solver, operator, B).state
    b = B * torch.tensor([[0.0], [1.0], [1.0]])
    solution = solve(solver, operator, b, state=state)
    assert solution.value[0].abs().max() == 0
    assert solution.residual[0] == 0
    assert solution.status[0] == Status.CONVERGED


@every_solver
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_flagged_in_their_task_alone(solver, number):
    values = VALUES.clone()
    b = B.clone()
    values[0, 2] = number
    b[2, 1] = number
    solution = solve(solver, DiagonalMatrix(values), b)
    assert solution.status[0] == solution.status[2] == Status.NON_FINITE
    assert solution.status[1] != Status.NON_FINITE
    assert solution.value[[0, 2]].isnan().all()  # so that nothing trains on it
    assert solution.value[1].isfinite().all()


@pytest.mark.parametrize("solver", [CG(), Neumann(), Nystrom(rank=3, rho=1.0), Dense()], ids=str)
def test_a_matrix_entry_that_is_not_finite_is_flagged_in_its_task_alone(solver):
    matrix = symmetric(torch.stack(SPECTRA))
    matrix[0, 2, 3] = torch.nan
    solution = solver.solve(Matrix(matrix), B)
    assert solution.status[0] == Status.NON_FINITE
    assert (solution.status[1:] != Status.NON_FINITE).all()
    assert solution.value[0].isnan().all()
    assert solution.value[1:].isfinite().all()


@every_solver
def test_single_precision_stays_single(solver):
    exact = solve(solver, DiagonalMatrix(VALUES), B)
    single = solve(solver, DiagonalMatrix(VALUES.float()), B.float())
    assert single.value.dtype == single.residual.dtype == torch.float32
    assert relative_error(single.value.double(), exact.value) < 1e-3


@every_solver
def test_a_system_in_half_precision_is_solved(solver):
    """With vectors in single precision, unless the operator knows its inverse."""
    operator = DiagonalMatrix(VALUES.bfloat16())
    half = solve(solver, operator, B.bfloat16())
    assert half.value.dtype == torch.bfloat16
    exact = solve(solver, DiagonalMatrix(VALUES.bfloat16().double()), B.bfloat16().double())
    assert relative_error(half.value.double(), exact.value) < 0.02


@every_solver
def test_arguments_that_do_not_fit_are_refused(solver):
    operator = DiagonalMatrix(VALUES)
    with pytest.raises(ValueError, match=r"b: got shape \(12,\), expected \(3, 12\)"):
        solver.solve(operator, B[0])
    for b, got in ((B.long(), "torch.int64"), (B + 0j, "torch.complex128"), ([B], "list")):
        with pytest.raises(ValueError, match=f"b: got {got}, expected a tensor of real floating"):
            solver.solve(operator, b)
    with pytest.raises(ValueError, match=r"b: got torch.float32, expected torch.float64, the oper"):
        solver.solve(operator, B.float())
    with pytest.raises(ValueError, match="operator: got function, expected a LinearOperator"):
        solver.solve(lambda v: v, B)
    with pytest.raises(ValueError, match=r"state: got dict, expected a SolverState"):
        solver.solve(operator, B, state={})
    with pytest.raises(ValueError, match=r"state: got a solution of shape \(1, 5\), expected"):
        solver.solve(operator, B, state=SolverState(torch.zeros(1, 5)))
    if solver.takes_preconditioner:
        solver.solve(operator, B, preconditioner=lambda r: r)
    else:
        name = type(solver).__name__
        with pytest.raises(ValueError, match=f"preconditioner: {name} takes none; use CG"):
            solver.solve(operator, B, preconditioner=lambda r: r)


@pytest.mark.parametrize(
    "solver", [CG(), MINRES(), GMRES(), Lanczos(), Neumann(), NystromCG(rank=1)], ids=str
)
def test_a_last_solution_that_a_maps_to_zero_is_dropped(solver):
    operator = DiagonalMatrix(torch.tensor([[0.0, 1.0]], dtype=torch.float64) + 1e-300)
    state = SolverState(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    b = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert solve(solver, operator, b, state=state).value[0, 0] == 0


@every_solver
def test_a_state_is_read_back_to_the_bit(solver):
    operator = DiagonalMatrix(VALUES)
    state = solve(solver, operator, B).state
    again = SolverState.from_dict(state.to_dict())
    first = solve(solver, operator, 2 * B, state=state)
    second = solve(solver, operator, 2 * B, state=again)
    assert torch.equal(first.value, second.value)
    assert first.products == second.products


def test_a_method_of_direct_kind_counts_the_product_of_the_residual():
    solution = Dense().solve(Matrix(symmetric([[1.0, 2.0, 3.0]])), randn(1, 3, seed=1))
    assert solution.products == 4
    assert solution.needed.tolist() == [4]


@pytest.mark.parametrize("solver", [CG(), Lanczos(), MINRES()], ids=str)
def test_a_task_that_needs_no_product_reports_no_curvature(solver):
    b = torch.stack([torch.zeros(12), torch.ones(12)]).double()
    solution = solver.solve(Matrix(symmetric(torch.stack(SPECTRA[:2]))), b)
    assert solution.rayleigh[0] == torch.inf
    assert solution.needed[0] == 0
    assert solution.rayleigh[1] < 10


@pytest.mark.parametrize("solver", [CG(9), MINRES(9), Lanczos(9), Dense()], ids=str)
def test_an_operator_that_is_not_symmetric_is_noticed_in_its_task_alone(solver):
    matrix = symmetric(torch.stack(SPECTRA[:2]))
    matrix[1] = matrix[1] + 0.5 * torch.triu(randn(12, 12, seed=5), 1)
    solution = solver.solve(Matrix(matrix), randn(2, 12, seed=6))
    assert solution.status[1] == Status.BREAKDOWN
    assert solution.status[0] != Status.BREAKDOWN
    if not isinstance(solver, Dense):
        assert solution.needed[1] == 2  # it ends where it shows


@pytest.mark.parametrize("solver", [CG(20), MINRES(20), Lanczos(20)], ids=str)
def test_round_off_in_single_precision_is_no_asymmetry(solver):
    """If b is almost the largest eigenvector, the second direction is mostly noise."""
    for rest, off in ((1e-3, 1e-4), (1e-3, 1e-5), (1e-2, 1e-5)):
        values = torch.cat([torch.ones(1), rest * torch.linspace(1, 2, 39)]).double()
        matrix = symmetric(values.expand(20, -1), seed=3)
        top = torch.linalg.eigh(matrix).eigenvectors[:, :, -1]
        b = (top + off * randn(20, 40, seed=4)).float()
        assert (solver.solve(Matrix(matrix.float()), b).status != Status.BREAKDOWN).all()


@pytest.mark.parametrize(
    ("solver", "condition"), [(CG(30), 1e6), (Lanczos(30), 1e5), (MINRES(30), 3e4)], ids=str
)
def test_an_ill_conditioned_system_in_single_precision_is_no_breakdown(solver, condition):
    matrix = symmetric([[condition, *torch.linspace(1, 2, 39).tolist()]])
    solution = solver.solve(Matrix(matrix.float()), randn(1, 40, seed=1).float())
    assert solution.status.tolist() == [Status.MAX_STEPS]
    assert solution.residual < 2e-2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CG, {"max_steps": 0}),
        (CG, {"tol": -1.0}),
        (CG, {"negative": "ignore"}),
        (MINRES, {"max_steps": 0}),
        (Lanczos, {"max_steps": 0}),
        (Neumann, {"terms": 0}),
        (Neumann, {"scale": -1.0}),
        (Neumann, {"power_steps": 0}),
        (Nystrom, {"rank": 0}),
        (Nystrom, {"rho": -1.0}),
        (Nystrom, {"chunk": 0}),
        (Nystrom, {"sketch": "rows"}),
        (Nystrom, {"tol": 0.0}),
        (Nystrom, {"chunk": 2, "tol": 0.1}),
        (Nystrom, {"chunk": 2, "refresh": 3}),
        (Nystrom, {"refresh": 0}),
        (NystromCG, {"max_steps": 0}),
        (NystromCG, {"tol": -1.0}),
        (Factored, {"rho": -1.0}),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(kind, options):
    argument = next(iter(options))
    with pytest.raises(ValueError, match=rf"{kind.__name__} {argument}: got .*expected"):
        kind(**options)
    with pytest.raises(ValueError, match=rf"{kind.__name__} {argument}: got .*expected"):
        replace(kind(), **options)


@pytest.mark.parametrize(("error", "status"), [(1e-10, "CONVERGED"), (1e-6, "MAX_STEPS")])
def test_an_inverse_is_exact_if_its_residual_is_below_the_root_of_round_off(error, status):
    class Nearly(DiagonalMatrix):
        def inverse(self, vector, shift):
            return (1 + error) * super().inverse(vector, shift)

    core = Nearly(VALUES)
    solution = Factored().solve(core + Identity(core, 1.0), B)
    assert solution.status.tolist() == [Status[status]] * 3
    assert torch.allclose(solution.residual, torch.full((3,), error).double(), rtol=1e-4)
