"""From one solve to the next: warm starts, stored sketches, ranks that grow."""

from functools import cache

import pytest
import torch
from oracles import Matrix, generator, krylov_minimiser, randn, relative_error, symmetric

from metaimplicit import CG, Neumann, Nystrom
from metaimplicit.operators import Identity
from metaimplicit.solvers import MINRES, Auto, Lanczos, NystromCG, Richardson, SolverState
from metaimplicit.solvers.low_rank import LowRank, Probes

ITERATIVE = [
    CG(max_steps=6, tol=1e-9),
    MINRES(max_steps=2, tol=1e-9),
    Lanczos(max_steps=6, tol=1e-9),
    Neumann(terms=2, scale=0.1),
    NystromCG(rank=3, max_steps=2, tol=1e-9, refresh=9, generator=generator(0)),
]


def name_of(solver):
    return type(solver).__name__


def system(seed=0):
    matrix = symmetric(torch.stack([torch.linspace(1, 10, 12), torch.logspace(-1, 1, 12)]), seed)
    return matrix, randn(2, 12, seed=9)


def fast_decay(n):
    """Eigenvalues 5·0.8ⁱ, a right-hand side, and the solution of (A + 0.1 I) x = b."""
    matrix = symmetric(5 * 0.8 ** torch.arange(float(n)).unsqueeze(0))
    b = randn(1, n, seed=1)
    return matrix, b, torch.linalg.solve(matrix + 0.1 * torch.eye(n, dtype=torch.float64), b)


# the last solution


@pytest.mark.parametrize("solver", ITERATIVE, ids=name_of)
def test_a_solve_continues_from_the_last(solver):
    matrix, b = system()
    residual = torch.ones(2, dtype=torch.float64)
    state = None
    for _ in range(4):
        solution = solver.solve(Matrix(matrix), b, state=state)
        state = solution.state
        assert (solution.residual < residual).all()
        residual = solution.residual
    # The state is scaled to a right-hand side of another length and sign.
    again = solver.solve(Matrix(matrix), -1e3 * b, state=state)
    assert (again.residual < residual).all()


def test_a_warm_start_is_cg_on_the_residual_of_the_best_multiple_of_the_state():
    matrix, b = system()
    old = 0.1 * randn(2, 12, seed=4)
    image = (matrix @ old.unsqueeze(-1)).squeeze(-1)
    scale = (b * image).sum(-1, keepdim=True) / image.square().sum(-1, keepdim=True)
    x = scale * old
    solution = CG(max_steps=3, tol=0.0).solve(Matrix(matrix), b, state=SolverState(old))
    for task in range(2):
        correction = krylov_minimiser(matrix[task], b[task] - matrix[task] @ x[task], 3)
        assert relative_error(solution.value[task], x[task] + correction) < 1e-10
    assert solution.products == 4


@pytest.mark.parametrize("solver", [*ITERATIVE, Auto(6, dense=0)], ids=name_of)
def test_a_state_survives_a_checkpoint_to_the_bit(solver, tmp_path):
    matrix, b = system()
    first_state = solver.solve(Matrix(matrix), b).state
    state = solver.solve(Matrix(matrix), b, state=first_state).state
    torch.save(state.to_dict(), tmp_path / "state.pt")
    loaded = SolverState.from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first, second = (solver.solve(Matrix(matrix), 2 * b, state=s) for s in (state, loaded))
    assert torch.equal(first.value, second.value)
    assert first.chosen == second.chosen


@pytest.mark.parametrize("size", [0.0, 1e30])
def test_a_useless_state_costs_a_product_and_nothing_else(size):
    matrix, b = system()
    solver = CG(max_steps=40, tol=1e-9)
    cold = solver.solve(Matrix(matrix), b)
    warm = solver.solve(Matrix(matrix), b, state=SolverState(size * torch.ones(2, 12).double()))
    assert (warm.residual <= 1e-9).all()
    assert warm.products <= cold.products + 3


def test_a_state_of_tiny_numbers_is_still_a_start():
    """In float32 the squares of numbers of size 1e-30 are zero."""
    matrix, b = system()
    matrix = matrix.float()
    b = 1e-30 * b.float()
    first = CG(max_steps=4, tol=0.0).solve(Matrix(matrix), b)
    second = CG(max_steps=1, tol=0.0).solve(Matrix(matrix), b, state=first.state)
    assert (second.residual < first.residual).all()


@pytest.mark.parametrize(
    "solver", [Richardson(), Nystrom(rank=4, rho=0.5), Auto(6, dense=0)], ids=name_of
)
def test_all_that_a_solve_multiplies_with_moves_to_the_device(solver):
    matrix, b = system()
    state = solver.solve(Matrix(matrix), b, state=SolverState(0 * b)).state
    moved = state.to(torch.device("meta")).to_dict()
    assert moved.keys() == state.to_dict().keys()
    scalars = {"age", "record"}  # read as numbers
    assert {t.device.type for name, t in moved.items() if name not in scalars} == {"meta"}
    assert {t.device.type for name, t in moved.items() if name in scalars} <= {"cpu"}


# sketches


def test_a_sketch_of_another_problem_is_refused():
    matrix, b = system()
    solver = Nystrom(rank=2, rho=0.1, refresh=2)
    state = solver.solve(Matrix(matrix[:1]), b[:1]).state
    message = r"state: got a sketch of \(1, 12\) tasks and parameters, expected \(2, 12\)"
    with pytest.raises(ValueError, match=message):
        solver.solve(Matrix(matrix), b, state=state)


@pytest.mark.parametrize(
    "solver", [Nystrom(rank=4, rho=0.5, refresh=2), NystromCG(rank=4, refresh=2)], ids=name_of
)
def test_a_sketch_serves_as_many_solves_as_asked(solver):
    matrix, b = system()
    state = None
    counts = []
    for _ in range(4):
        operator = Matrix(matrix)
        solution = solver.solve(operator, b, state=state)
        assert solution.products == operator.products
        state = solution.state
        counts.append(operator.products)
    if isinstance(solver, Nystrom):
        assert counts == [5, 1, 5, 1]
    else:
        assert counts[1] < counts[0]
        assert int(state.age) == 2


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_the_rank_grows_until_the_error_is_met(sketch):
    """On n = 300 at s = 0.1; ‖B − B_k‖/s bounds the error of the damped solution."""
    matrix, b, exact = fast_decay(300)
    operator = Matrix(matrix)
    solver = Nystrom(rank=5, rho=0.1, sketch=sketch, tol=1e-3, generator=generator(0))
    solution = solver.solve(operator, b)
    low_rank = solution.state.low_rank
    rank = low_rank.basis.shape[1]
    assert 5 < rank < 160
    assert solution.products == operator.products
    assert relative_error(solution.value, exact) < 1e-3
    assert torch.linalg.matrix_norm(matrix - as_matrix(low_rank), 2) < 1e-3 * 0.1
    # The rank before was not enough.
    rows = Probes(sketch, 300, generator(0), b).rows(0, rank // 2)
    half = LowRank.from_products(rows, (matrix @ rows.mT).mT)
    assert torch.linalg.matrix_norm(matrix - as_matrix(half), 2) > 1e-3 * 0.1


def as_matrix(low_rank):
    return low_rank.basis.mT @ torch.diag_embed(1 / low_rank.inverse) @ low_rank.basis


def test_a_larger_damping_needs_a_smaller_rank():
    matrix, b, _ = fast_decay(100)
    ranks = []
    for rho in (1e-2, 10.0):
        solver = Nystrom(rank=5, rho=rho, tol=1e-2, generator=generator(0))
        state = solver.solve(Matrix(matrix), b).state
        ranks.append(state.low_rank.basis.shape[1])
    assert ranks[1] < ranks[0]


# sequences


@cache
def drifting_sequence(tol):
    """Systems of condition 1000, each 1e-4 away from the one before, and the products of CG."""
    a = symmetric(torch.logspace(-3, 0, 60).unsqueeze(0))
    b = randn(1, 60, seed=3)
    systems = []
    cold_products = 0
    for t in range(6):
        systems.append((a, b))
        cold_products += CG(max_steps=999, tol=tol).solve(Matrix(a), b).products
        noise = randn(1, 60, 60, seed=100 + t)
        shift = randn(1, 60, seed=1000 + t)
        noise = noise + noise.mT
        a = a + 1e-4 * torch.linalg.matrix_norm(a, 2) * noise / torch.linalg.matrix_norm(noise, 2)
        b = b + 1e-4 * b.norm() * shift / shift.norm()
    return systems, cold_products


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        NystromCG(rank=30, max_steps=999, tol=1e-6, refresh=50, generator=generator(0)),
        Auto(max_steps=999, tol=1e-6, dense=0),
    ],
    ids=name_of,
)
def test_a_drifting_sequence_costs_less_than_half_of_cold_cg(solver):
    systems, cold_products = drifting_sequence(tol=1e-6)
    state = None
    warm_products = 0
    for a, b in systems:
        solution = solver.solve(Matrix(a), b, state=state)
        assert float(solution.residual) <= 1e-6
        state = solution.state
        warm_products += solution.products
    assert warm_products < 0.5 * cold_products


# in other units

SEQUENTIAL = [
    Auto(60, dense=0),
    Lanczos(9, recycle=True),
    Nystrom(rank=4),
    Nystrom(rank=4, sketch="gaussian", refresh=3),
    Nystrom(rank=5, chunk=2),
    Nystrom(rank=4, tol=0.1, refresh=2),
    NystromCG(rank=4, max_steps=6, refresh=2),
    NystromCG(rank=4, sketch="columns", max_steps=30),
    Richardson(steps=2),
]


@pytest.mark.parametrize("unit", [2.0**100, 2.0**-100])
@pytest.mark.parametrize(
    "spectrum",
    [torch.logspace(-2, 0, 24), torch.linspace(-1, 5, 24), torch.linspace(2, 300, 24)],
    ids=["definite", "indefinite", "large"],
)
@pytest.mark.parametrize("solver", SEQUENTIAL, ids=str)
def test_a_sequence_of_systems_in_other_units_is_solved_by_the_same_numbers(solver, spectrum, unit):
    """Powers of two do not round, so a threshold that forgets the size of A is all that differs."""

    def sequence(factor):
        torch.manual_seed(0)  # of sketches
        matrix = factor * symmetric(spectrum.unsqueeze(0))
        state = SolverState(torch.zeros(1, 24, dtype=torch.float64))
        solutions = []
        for seed in range(3):
            b = randn(1, 24, seed=seed)
            operator = Matrix(matrix) + Identity(b, 0.5 * factor)
            solutions.append(solver.solve(operator, b, state=state))
            state = solutions[-1].state
        return solutions

    for expected, scaled in zip(sequence(1.0), sequence(unit), strict=True):
        assert torch.equal(unit * scaled.value, expected.value)
        assert torch.equal(scaled.rayleigh / unit, expected.rayleigh)
        assert torch.equal(scaled.residual, expected.residual)
        assert (scaled.status, scaled.chosen) == (expected.status, expected.chosen)
        assert scaled.products == expected.products
