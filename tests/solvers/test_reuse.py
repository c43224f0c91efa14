"""From one solve to the next: warm starts, kept sketches, ranks that grow."""

import pytest
import torch
from oracles import Matrix, generator, krylov_minimiser, randn, relative_error, symmetric

from metaimplicit import CG, MINRES, Auto, Identity, Lanczos, Neumann, Nystrom, NystromCG
from metaimplicit.solvers import SolverState
from metaimplicit.solvers.low_rank import LowRank, Probes

ITERATIVE = [
    CG(max_steps=6, tol=1e-9),
    MINRES(max_steps=2, tol=1e-9),
    Lanczos(max_steps=6, tol=1e-9),
    Neumann(terms=2, scale=0.1),
    NystromCG(rank=3, max_steps=2, tol=1e-9, refresh=9, generator=generator(0)),
]


def system(seed=0):
    return symmetric(
        torch.stack([torch.linspace(1, 10, 12), torch.logspace(-1, 1, 12)]), seed
    ), randn(2, 12, seed=9)


@pytest.mark.parametrize("solver", ITERATIVE, ids=lambda s: type(s).__name__)
def test_a_solve_goes_on_from_the_last(solver):
    matrix, b = system()
    residual, state = torch.ones(2, dtype=torch.float64), None
    for _ in range(4):
        solution = solver.solve(Matrix(matrix), b, state=state)
        state = solution.state
        assert (solution.residual < residual).all()
        residual = solution.residual
    # b may have any scale since: the state is scaled to it
    again = solver.solve(Matrix(matrix), -1e3 * b, state=state)
    assert (again.residual < residual).all()


def test_a_warm_start_is_cg_on_the_residual():
    matrix, b = system()
    x = 0.1 * randn(2, 12, seed=4)
    ax = (matrix @ x.unsqueeze(-1)).squeeze(-1)
    x = (
        (b * ax).sum(-1, keepdim=True) / ax.square().sum(-1, keepdim=True) * x
    )  # the best multiple of the state
    solution = CG(max_steps=3, tol=0.0).solve(
        Matrix(matrix), b, state=SolverState(0.1 * randn(2, 12, seed=4))
    )
    for task in range(2):
        rest = b[task] - matrix[task] @ x[task]
        assert (
            relative_error(solution.value[task], x[task] + krylov_minimiser(matrix[task], rest, 3))
            < 1e-10
        )
    assert solution.products == 4


@pytest.mark.parametrize("solver", [*ITERATIVE, Auto(6, dense=0)], ids=lambda s: type(s).__name__)
def test_a_state_survives_a_checkpoint_to_the_bit(solver, tmp_path):
    matrix, b = system()
    torch.manual_seed(0)
    state = solver.solve(Matrix(matrix), b, state=solver.solve(Matrix(matrix), b).state).state
    torch.save(state.to_dict(), tmp_path / "state.pt")
    loaded = SolverState.from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first, second = (solver.solve(Matrix(matrix), 2 * b, state=s) for s in (state, loaded))
    assert torch.equal(first.value, second.value)
    assert first.chosen == second.chosen


@pytest.mark.parametrize(
    "state",
    [SolverState(torch.zeros(2, 12).double()), SolverState(1e30 * torch.ones(2, 12).double())],
)
def test_a_useless_state_costs_a_product_and_nothing_else(state):
    matrix, b = system()
    cold, warm = (
        CG(max_steps=40, tol=1e-9).solve(Matrix(matrix), b, state=s) for s in (None, state)
    )
    assert (warm.residual <= 1e-9).all()
    assert warm.products <= cold.products + 3


def test_a_state_of_another_problem_is_refused():
    matrix, b = system()
    with pytest.raises(
        ValueError, match=r"state: got a solution of shape \(1, 5\), expected \(2, 12\)"
    ):
        CG().solve(Matrix(matrix), b, state=SolverState(torch.zeros(1, 5)))
    kept = Nystrom(rank=2, rho=0.1, refresh=2).solve(Matrix(matrix[:1]), b[:1]).state
    with pytest.raises(
        ValueError,
        match=r"state: got a sketch of \(1, 12\) tasks and parameters, expected \(2, 12\)",
    ):
        Nystrom(rank=2, rho=0.1, refresh=2).solve(Matrix(matrix), b, state=kept)
    with pytest.raises(ValueError, match=r"preconditioner: MINRES takes none; use CG"):
        MINRES().solve(Matrix(matrix), b, preconditioner=lambda r: r)


@pytest.mark.parametrize(
    "solver", [Nystrom(rank=4, rho=0.5, refresh=2), NystromCG(rank=4, refresh=2)]
)
def test_a_sketch_serves_as_many_solves_as_asked(solver):
    matrix, b = system()
    torch.manual_seed(0)
    state, counts = None, []
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
    """On n = 300 with eigenvalues 5·0.8ⁱ at s = 0.1; ‖B − B_k‖/s bounds the error of the damped solution."""
    matrix, b = symmetric(5 * 0.8 ** torch.arange(300.0).unsqueeze(0)), randn(1, 300, seed=1)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(300, dtype=torch.float64), b)
    operator = Matrix(matrix)
    solver = Nystrom(rank=5, rho=0.1, sketch=sketch, tol=1e-3, generator=generator(0))
    solution = solver.solve(operator, b)
    rank = solution.state.low_rank.basis.shape[1]
    assert 5 < rank < 160
    assert solution.products == operator.products
    assert relative_error(solution.value, exact) < 1e-3
    values = 1 / solution.state.low_rank.inverse
    kept = (
        solution.state.low_rank.basis.mT @ torch.diag_embed(values) @ solution.state.low_rank.basis
    )
    assert torch.linalg.matrix_norm(matrix - kept, 2) < 1e-3 * 0.1
    assert solution.products == operator.products
    # the rank before was not enough
    short = Probes(sketch, 300, generator(0), b).rows(0, rank // 2)
    half = LowRank.from_products(short, (matrix @ short.mT).mT)
    approximation = half.basis.mT @ torch.diag_embed(1 / half.inverse) @ half.basis
    assert torch.linalg.matrix_norm(matrix - approximation, 2) > 1e-3 * 0.1


def test_a_larger_damping_is_content_with_a_smaller_rank():
    matrix, b = symmetric(5 * 0.8 ** torch.arange(100.0).unsqueeze(0)), randn(1, 100, seed=1)
    ranks = [
        Nystrom(rank=5, rho=rho, tol=1e-2, generator=generator(0))
        .solve(Matrix(matrix), b)
        .state.low_rank.basis.shape[1]
        for rho in (1e-2, 10.0)
    ]
    assert ranks[1] < ranks[0]


def test_a_state_of_tiny_numbers_is_still_a_start():
    """In float32 the squares of numbers of size 1e-30 are zero."""
    matrix, b = system()
    matrix, b = matrix.float(), 1e-30 * b.float()
    first = CG(max_steps=4, tol=0.0).solve(Matrix(matrix), b)
    assert (
        CG(max_steps=1, tol=0.0).solve(Matrix(matrix), b, state=first.state).residual
        < first.residual
    ).all()


def test_the_estimated_error_of_a_sketch_is_its_norm():
    matrix = symmetric([[5.0, 4.0, 3.0, 0.5, *[0.01] * 20]])
    rows = Probes("gaussian", 24, generator(2), matrix).rows(0, 3)
    low_rank = LowRank.from_products(rows, rows @ matrix)
    exact = matrix - low_rank.basis.mT @ torch.diag_embed(1 / low_rank.inverse) @ low_rank.basis
    estimate, products = low_rank.error(Matrix(matrix), steps=30)
    assert products == 30
    assert relative_error(estimate, torch.linalg.matrix_norm(exact, 2)) < 1e-6


def test_nystrom_preconditioning_on_the_fast_decaying_problem():
    """n = 1000, eigenvalues 5·0.8ⁱ, ρ = 0.1: rank 20 and 10 steps (median of five sketches)."""
    matrix, b = symmetric(5 * 0.8 ** torch.arange(1000.0).unsqueeze(0)), randn(1, 1000, seed=1)
    operator = Matrix(matrix) + Identity(Matrix(matrix), 0.1)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(1000, dtype=torch.float64), b)
    errors = []
    for seed in range(5):
        solution = NystromCG(rank=20, max_steps=10, tol=0.0, generator=generator(seed)).solve(
            operator, b
        )
        assert solution.products <= 31
        errors.append(relative_error(solution.value, exact))
    assert sorted(errors)[2] < 1e-6


def drifted(solver, drift, steps, cold):
    """Products over a sequence of systems of condition 1000 that drift, as a share of those of cold CG."""
    a = symmetric(torch.logspace(-3, 0, 200).unsqueeze(0))
    b, state, warm, fresh = randn(1, 200, seed=3), None, 0, 0
    for t in range(steps):
        solution = solver.solve(Matrix(a), b, state=state)
        assert float(solution.residual) <= 1e-6
        state = solution.state
        warm, fresh = warm + solution.products, fresh + cold.solve(Matrix(a), b).products
        noise, shift = randn(1, 200, 200, seed=100 + t), randn(1, 200, seed=1000 + t)
        noise = noise + noise.mT
        a = a + drift * torch.linalg.matrix_norm(a, 2) * noise / torch.linalg.matrix_norm(noise, 2)
        b = b + drift * b.norm() * shift / shift.norm()
    return warm / fresh


@pytest.mark.parametrize(
    "solver",
    [
        NystromCG(rank=100, max_steps=999, tol=1e-6, refresh=50, generator=generator(0)),
        Auto(max_steps=999, tol=1e-6, dense=0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_drifting_sequence_costs_less_than_half(solver):
    assert drifted(solver, 1e-4, 50, CG(max_steps=999, tol=1e-6)) < 0.5


def test_an_impossible_sketch_is_refused():
    for make in (
        lambda: Nystrom(sketch="rows"),
        lambda: Nystrom(tol=0.0),
        lambda: Nystrom(chunk=2, tol=0.1),
        lambda: Nystrom(chunk=2, refresh=3),
        lambda: Nystrom(refresh=0),
        lambda: NystromCG(max_steps=0),
        lambda: NystromCG(tol=-1.0),
        lambda: MINRES(max_steps=0),
        lambda: CG(tol=-1.0),
        lambda: CG(negative="ignore"),
    ):
        with pytest.raises(ValueError, match=r"got .*expected"):
            make()
