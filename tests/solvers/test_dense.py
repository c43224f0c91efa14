"""The dense solve of matrices that are not positive definite."""

import pytest
import torch
from oracles import Matrix, randn, relative_error, symmetric

from metaimplicit import Dense
from metaimplicit.solvers import Status


def test_indefinite_systems_are_solved_and_singular_ones_flagged():
    matrix = symmetric(torch.stack([torch.linspace(-1, 10.5, 12), torch.linspace(0, 11, 12)]))
    b = randn(2, 12, seed=7)
    solution = Dense().solve(Matrix(matrix), b)
    assert relative_error(solution.value[0], torch.linalg.solve(matrix[0], b[0])) < 1e-10
    assert solution.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN]
    assert float(solution.rayleigh[0]) == pytest.approx(-1.0)
    zero = torch.zeros(1, 4, 4, dtype=torch.float64)
    status = Dense().solve(Matrix(zero), torch.ones(1, 4).double()).status
    assert status.tolist() == [Status.BREAKDOWN]


def test_a_factor_that_round_off_let_through_is_not_used():
    """A = diag(1, ε²): Cholesky succeeds, and x would be 1/ε² long along what is zero."""
    tiny = torch.finfo(torch.float64).eps ** 2
    matrix = torch.diag(torch.tensor([1.0, tiny], dtype=torch.float64))[None]
    assert int(torch.linalg.cholesky_ex(matrix)[1]) == 0
    solution = Dense().solve(Matrix(matrix), torch.ones(1, 2, dtype=torch.float64))
    assert solution.status.tolist() == [Status.BREAKDOWN]
    expected = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("share", "status"), [(0.75, "BREAKDOWN"), (1.5, "CONVERGED")])
def test_an_eigenvalue_below_n_units_of_round_off_is_zero(share, status):
    smallest = share * 2 * torch.finfo(torch.float64).eps
    matrix = torch.diag(torch.tensor([1.0, smallest], dtype=torch.float64))[None]
    solution = Dense().solve(Matrix(matrix), torch.ones(1, 2, dtype=torch.float64))
    assert solution.status.tolist() == [Status[status]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_zero_eigenvalue_is_seen_whatever_the_pivots_are(n, dtype):
    """Cholesky takes some of these matrices, with pivots that are not small to round-off."""
    bases = torch.linalg.qr(randn(300, n, n, seed=n).to(dtype)).Q
    values = torch.linspace(0, 2, n, dtype=dtype)
    matrix = bases * values @ bases.mT
    solution = Dense().solve(Matrix(matrix), bases.sum(-1))  # A⁺b has no part along the first
    assert set(solution.status.tolist()) == {Status.BREAKDOWN}
    expected = bases[..., 1:] @ (1 / values[1:])
    assert relative_error(solution.value, expected) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_singular_systems_are_flagged_whatever_the_pivots_are(dtype):
    """A = XᵀX has rank 1 to 6 of at most 7. Cholesky takes some of them, by round-off."""
    for seed in range(60):
        n = 2 + seed % 6
        factor = randn(1 + seed % (n - 1), n, seed=seed).to(dtype)
        matrix = factor.T @ factor
        solution = Dense().solve(Matrix(matrix[None]), randn(1, n, seed=1000 + seed).to(dtype))
        assert solution.status.tolist() == [Status.BREAKDOWN]
        assert float(solution.residual) <= 1 + 1e-6  # the smallest, by the pseudo-inverse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_singular_system_that_has_a_solution_is_solved_by_the_shortest(dtype):
    factor = randn(5, 12, seed=3).to(dtype)
    matrix = factor.T @ factor
    inside = matrix @ randn(12, seed=4).to(dtype)
    outside = torch.linalg.svd(factor).Vh[-1]
    b = torch.stack([inside, inside + 1e-3 * inside.norm() * outside, torch.zeros_like(inside)])
    solution = Dense().solve(Matrix(matrix.expand(3, -1, -1)), b)
    assert solution.status.tolist() == [Status.CONVERGED, Status.BREAKDOWN, Status.CONVERGED]
    expected = (
        torch.linalg.pinv(factor.double())
        @ torch.linalg.pinv(factor.double()).T
        @ (inside.double())
    )
    assert relative_error(solution.value[0].double(), expected) < 1e4 * torch.finfo(dtype).eps


def test_it_uses_the_symmetric_part():
    matrix = symmetric([[2.0, 3.0, 4.0]])
    matrix[0, 0, 1] += 0.1
    b = randn(1, 3, seed=5)
    expected = torch.linalg.solve(0.5 * (matrix + matrix.mT), b)
    assert relative_error(Dense().solve(Matrix(matrix), b).value, expected) < 1e-13


def test_an_n_above_its_limit_is_refused():
    operator = Matrix(symmetric([[1.0, 2.0]]))
    message = r"n = 2 adapted parameters, expected at most max_size = 1"
    with pytest.raises(ValueError, match=message):
        Dense(max_size=1).solve(operator, torch.ones(1, 2).double())
