"""Nyström's approximation: its definition, as an inverse and as a preconditioner."""

from functools import partial

import pytest
import torch
from oracles import Matrix, generator, randn, relative_error, symmetric
from solver_cases import SPECTRA, DiagonalMatrix, positive_systems

from metaimplicit import Nystrom
from metaimplicit.operators import Identity
from metaimplicit.solvers import NystromCG, Status
from metaimplicit.solvers.low_rank import LowRank, Probes, is_indefinite

EYE = torch.eye(12, dtype=torch.float64)


def draw(sketch, rank, seed, like):
    return Probes(sketch, 12, generator(seed), like).rows(0, rank)


# the approximation


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4, 5])
def test_it_is_the_inverse_of_the_sampled_approximation(chunk, sketch):
    matrix, b, _ = positive_systems()
    omega = draw(sketch, 5, 4, b).mT
    if sketch == "columns":
        assert torch.equal(omega, EYE[:, torch.randperm(12, generator=generator(4))[:5]])
    y = matrix @ omega
    approximation = y @ torch.linalg.solve(omega.mT @ y, y.mT) + 0.3 * EYE
    operator = Matrix(matrix)
    solver = Nystrom(rank=5, rho=0.3, chunk=chunk, sketch=sketch, generator=generator(4))
    solution = solver.solve(operator, b)
    for task in range(3):
        expected = torch.linalg.solve(approximation[task], b[task])
        assert relative_error(solution.value[task], expected) < 1e-10
    # The residual costs one product. Below k, every product is taken twice, and two more carry b in
    # and the answer out.
    assert solution.products == operator.products == (6 if chunk in (None, 5) else 13)


def test_of_full_rank_it_is_the_shifted_inverse():
    matrix, b, _ = positive_systems()
    solution = Nystrom(rank=12, rho=0.1).solve(Matrix(matrix), b)
    expected = torch.linalg.solve(matrix + 0.1 * EYE, b)
    for task in range(3):
        assert relative_error(solution.value[task], expected[task]) < 1e-10


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("smallest", [1e-6, 1e-10, 1e-13])
def test_tiny_eigenvalues_cost_the_large_ones_no_digits(smallest, sign):
    spectrum = smallest ** torch.linspace(0.0, 1.0, 12, dtype=torch.float64)
    spectrum[1::2] *= sign
    matrix = symmetric(spectrum.repeat(3, 1))
    b = randn(3, 12, seed=2)
    solution = Nystrom(rank=12, rho=0.5).solve(Matrix(matrix), b)
    values, vectors = torch.linalg.eigh(matrix)
    absolute = vectors @ torch.diag_embed(values.abs()) @ vectors.mT
    expected = torch.linalg.solve(absolute + 0.5 * EYE, b)
    for task in range(3):
        assert relative_error(solution.value[task], expected[task]) < 1e-13


def test_it_sketches_the_core_and_not_the_shift():
    """With fast decay and σ = 2, a sketch of A itself makes the result 200 times too long."""
    matrix = symmetric(5 * 0.8 ** torch.arange(300.0).unsqueeze(0))
    b = randn(1, 300, seed=1)
    operator = Matrix(matrix) + Identity(Matrix(matrix), 2.0)
    value = Nystrom(rank=10, generator=generator(0)).solve(operator, b).value
    exact = torch.linalg.solve(matrix + 2 * torch.eye(300, dtype=torch.float64), b)
    assert 0.8 < float(value.norm() / exact.norm()) < 1.25


def test_columns_that_are_zero_drop_out():
    matrix = torch.zeros(1, 6, 6, dtype=torch.float64)
    matrix[:, :3, :3] = symmetric([[1.0, 2.0, 3.0]])
    b = randn(1, 6, seed=2)
    solution = Nystrom(rank=6, rho=0.5).solve(Matrix(matrix), b)
    expected = torch.linalg.solve(matrix + 0.5 * torch.eye(6, dtype=torch.float64), b)
    assert relative_error(solution.value, expected) < 1e-10


@pytest.mark.parametrize("chunk", [None, 2])
def test_negative_eigenvalues_count_by_their_size(chunk):
    matrix = symmetric(torch.linspace(-3, 9.5, 12).unsqueeze(0))
    b = randn(1, 12, seed=4)
    omega = draw("gaussian", 5, 4, b).mT
    y = matrix @ omega
    values, vectors = torch.linalg.eigh(y @ torch.linalg.solve(omega.mT @ y, y.mT))
    assert values[0, 0] < -0.1
    expected = vectors @ ((vectors.mT @ b.unsqueeze(-1)) / (values.abs() + 0.3).unsqueeze(-1))
    solver = Nystrom(rank=5, rho=0.3, sketch="gaussian", chunk=chunk, generator=generator(4))
    assert relative_error(solver.solve(Matrix(matrix), b).value, expected.squeeze(-1)) < 1e-9


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_sketch_beyond_the_rank_of_the_matrix_keeps_no_round_off(sketch, chunk):
    """In single precision, 10 columns of matrices of rank 3: seven directions are noise."""
    factors = randn(64, 3, 40, seed=1)
    matrix = factors.mT @ factors
    b = randn(64, 40, seed=2)
    solver = Nystrom(rank=10, rho=0.1, sketch=sketch, chunk=chunk, generator=generator(1))
    solution = solver.solve(Matrix(matrix.float()), b.float())
    assert (solution.status != Status.NEGATIVE_CURVATURE).all()
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(40, dtype=torch.float64), b)
    assert relative_error(solution.value.double(), exact) < 1e-5


def test_blocks_of_a_gaussian_sketch_add_up():
    """n beyond one block of float64 coordinates: streamed and one-shot agree."""
    n = 2 * 2**14 + 3
    operator = DiagonalMatrix(torch.linspace(-1, 3, n, dtype=torch.float64).unsqueeze(0))
    b = randn(1, n, seed=1)
    one_shot, *streamed = (
        Nystrom(rank=4, rho=0.5, sketch="gaussian", chunk=chunk, generator=generator(3)).solve(
            operator, b
        )
        for chunk in (None, 1, 2)
    )
    for other in streamed:
        assert relative_error(other.value, one_shot.value) < 1e-9
        assert other.status.tolist() == one_shot.status.tolist()
        assert float(other.rayleigh) == pytest.approx(float(one_shot.rayleigh), rel=1e-9)


def test_the_estimated_error_of_a_sketch_is_its_norm():
    spectrum = [5.0, 4.0, 3.0, 0.5, *[0.01] * 20]
    matrix = symmetric([spectrum, spectrum[::-1]])
    rows = Probes("gaussian", 24, generator(2), matrix).rows(0, 3)
    low_rank = LowRank.from_products(rows, rows @ matrix)
    exact = matrix - low_rank.basis.mT @ torch.diag_embed(1 / low_rank.inverse) @ low_rank.basis
    estimate, products = low_rank.error(Matrix(matrix), steps=30)
    assert products == 30
    assert relative_error(estimate, torch.linalg.matrix_norm(exact, 2)) < 1e-6


# the preconditioner


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_the_preconditioner_is_its_formula(sketch):
    """P = (d_min + s) U (D + s)⁻¹ Uᵀ + I − U Uᵀ (Frangella et al. 2021, eq. 5.1)."""
    matrix, b, _ = positive_systems()
    rows = draw(sketch, 4, 1, b)
    y = matrix @ rows.mT
    values, vectors = torch.linalg.eigh(y @ torch.linalg.solve(rows @ y, y.mT))
    d = values[:, -4:]
    u = vectors[:, :, -4:]
    p = u @ torch.diag_embed((d[:, :1] + 0.7) / (d + 0.7)) @ u.mT + EYE - u @ u.mT
    expected = (p @ b.unsqueeze(-1)).squeeze(-1)
    actual = LowRank.from_products(rows, y.mT).precondition(b, 0.7)
    for task in range(3):
        assert relative_error(actual[task], expected[task]) < 1e-9


@pytest.mark.slow
def test_preconditioned_cg_is_fast_where_the_spectrum_decays_fast():
    """n = 300, eigenvalues 5·0.8ⁱ, ρ = 0.1: rank 20 and 10 steps (median of five sketches)."""
    matrix = symmetric(5 * 0.8 ** torch.arange(300.0).unsqueeze(0))
    b = randn(1, 300, seed=1)
    operator = Matrix(matrix) + Identity(Matrix(matrix), 0.1)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(300, dtype=torch.float64), b)
    errors = []
    for seed in range(5):
        solver = NystromCG(rank=20, max_steps=10, tol=0.0, generator=generator(seed))
        solution = solver.solve(operator, b)
        assert solution.products <= 31
        errors.append(relative_error(solution.value, exact))
    assert sorted(errors)[2] < 1e-6


# statuses and refusals


def test_a_clearly_negative_eigenvalue_is_negative_curvature():
    b = randn(1, 12, seed=4)
    indefinite = symmetric(torch.linspace(-3, 9.5, 12).unsqueeze(0))
    status = Nystrom(rank=12, rho=0.1).solve(Matrix(indefinite), b).status
    assert status.tolist() == [Status.NEGATIVE_CURVATURE]
    # Its eigenvalues are 3 and −1, but no diagonal entry is negative.
    hidden = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    for chunk in (None, 1):
        solver = Nystrom(rank=2, rho=0.1, chunk=chunk)
        status = solver.solve(Matrix(hidden), torch.ones(1, 2).double()).status
        assert status.tolist() == [Status.NEGATIVE_CURVATURE]


def test_a_result_worse_than_zero_is_a_breakdown():
    steep = symmetric(torch.logspace(-3, 3, 12).unsqueeze(0))
    solution = Nystrom(rank=1, rho=1e-3).solve(Matrix(steep), randn(1, 12, seed=4))
    assert solution.residual > 1
    assert solution.status.tolist() == [Status.BREAKDOWN]


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", [Nystrom, partial(Nystrom, chunk=1), NystromCG])
def test_an_entry_that_is_not_finite_ends_its_task_alone(kind, number):
    matrix = symmetric(torch.stack(SPECTRA)).float()
    matrix[1, 2, 2] = number
    solver = kind(rank=5, rho=0.1, sketch="gaussian")
    solution = solver.solve(Matrix(matrix), randn(3, 12, seed=8).float())
    assert solution.status[1] == Status.NON_FINITE
    assert solution.value[[0, 2]].isfinite().all()
    assert solution.status[0] != Status.NON_FINITE


@pytest.mark.parametrize(("products", "rank", "steps"), [(1, 1, 1), (6, 3, 3), (7, 4, 3)])
def test_half_of_a_budget_is_the_rank_and_half_the_steps(products, rank, steps):
    solver = NystromCG().with_budget(products)
    assert (solver.rank, solver.max_steps) == (rank, steps)


def test_rho_is_a_hundredth_only_where_nothing_else_damps():
    assert Nystrom().damping(0.0) == 0.01
    assert Nystrom().damping(2.0) == 0.0
    assert Nystrom(rho=0.5).damping(2.0) == 0.5


@pytest.mark.parametrize("solver", [Nystrom, NystromCG, partial(Nystrom, chunk=1)])
@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_a_rank_above_n_is_n_which_is_exact(solver, sketch):
    matrix = symmetric([[1.0, 2.0]])
    b = torch.ones(1, 2).double()
    solution = solver(rank=10, rho=0.5, sketch=sketch).solve(Matrix(matrix), b)
    shift = 0.0 if solver is NystromCG else 0.5
    expected = torch.linalg.solve(matrix + shift * torch.eye(2).double(), b)
    torch.testing.assert_close(solution.value, expected, rtol=1e-7, atol=1e-9)


def test_a_shift_of_zero_is_refused():
    operator = Matrix(symmetric([[1.0, 2.0]]))
    b = torch.ones(1, 2).double()
    with pytest.raises(ValueError, match=r"got σ \+ ρ = 0.0, expected > 0"):
        Nystrom(rank=1, rho=0.0).solve(operator, b)


def test_a_negative_eigenvalue_below_the_root_of_round_off_is_none():
    eigenvalues = torch.tensor([[1.0, -1e-9], [1.0, -1e-7], [1e-6, -1e-9]], dtype=torch.float64)
    assert is_indefinite(1 / eigenvalues, torch.float64).tolist() == [False, True, True]
    assert is_indefinite(1 / eigenvalues, torch.float32).tolist() == [False, False, True]


@pytest.mark.parametrize("chunk", [None, 3])
def test_of_full_rank_it_has_converged(chunk):
    """The residual is beyond ε, as the rank is decided by its root, but far below that root."""
    matrix = symmetric(torch.logspace(-3, 0, 12).unsqueeze(0))
    b = randn(1, 12, seed=1)
    operator = Matrix(matrix) + Identity(b, 1e-2)
    solution = Nystrom(rank=12, chunk=chunk).solve(operator, b)
    assert 1e-15 < solution.residual < 1e-9
    assert solution.status.tolist() == [Status.CONVERGED]
