"""The Neumann series against its polynomial, and its scale."""

import pytest
import torch
from oracles import Matrix, randn, relative_error, symmetric
from solver_cases import positive_systems

from metaimplicit import Neumann
from metaimplicit.solvers import Status
from metaimplicit.solvers.power_iteration import power_iteration


def polynomial(matrix, b, terms, scale):
    step = torch.eye(12, dtype=torch.float64) - scale * matrix
    return scale * sum(torch.linalg.matrix_power(step, k) @ b for k in range(terms))


@pytest.mark.parametrize("terms", [1, 3])
def test_k_terms_are_the_polynomial_of_exactly_k_terms(terms):
    matrix, b, _ = positive_systems()
    operator = Matrix(matrix)
    solution = Neumann(terms=terms, scale=0.15).solve(operator, b)
    for task in range(3):
        expected = polynomial(matrix[task], b[task], terms, 0.15)
        assert relative_error(solution.value[task], expected) < 1e-13
    assert solution.products == operator.products == terms
    assert solution.status.tolist() == [Status.MAX_STEPS] * 3


@pytest.mark.usefixtures("float64")
def test_a_system_may_have_another_type_than_new_tensors():
    matrix = 2 * torch.eye(3, dtype=torch.float32).unsqueeze(0)
    b = torch.ones(1, 3, dtype=torch.float32)
    solution = Neumann(terms=60).solve(Matrix(matrix), b)
    assert solution.value.dtype == torch.float32
    torch.testing.assert_close(solution.value, b / 2)


def test_it_chooses_a_scale_that_converges():
    matrix = symmetric([[1.0, 2.0, 4.0, 8.0], [0.1, 0.2, 0.3, 0.4]])
    b = randn(2, 4, seed=9)
    solution = Neumann(terms=200).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-8
    # A residual this small is computed by one product more.
    assert solution.products == 200 + Neumann().power_steps + 1


def test_the_scale_sees_an_eigenvector_that_b_has_no_part_in():
    spiked = torch.diag_embed(torch.tensor([[1.0] * 9 + [10.0]])).double()
    b = torch.tensor([[1.0] * 9 + [1e-9]]).double()
    solution = Neumann(terms=60).solve(Matrix(spiked), b)
    assert relative_error(solution.value, b / torch.diagonal(spiked, dim1=1, dim2=2)) < 0.05


def test_power_iterations_tend_to_the_norm_from_below():
    matrix = symmetric([[-5.0, 1.0, 2.0], [1.0, 2.0, 4.0]])
    v = torch.nn.functional.normalize(randn(2, 3, seed=1))
    sizes = [power_iteration(Matrix(matrix).matvec, v, steps)[0] for steps in (1, 5, 50)]
    assert (sizes[0] < sizes[1]).all()
    assert (sizes[1] < sizes[2] + 1e-12).all()
    assert relative_error(sizes[2].squeeze(1), torch.tensor([5.0, 4.0]).double()) < 1e-12


def test_a_series_that_diverges_is_a_breakdown():
    matrix, b, _ = positive_systems()
    status = Neumann(terms=20, scale=1.0).solve(Matrix(matrix), b).status
    assert status.tolist() == [Status.BREAKDOWN] * 3


@pytest.mark.parametrize(("growth", "status"), [(1e-12, "MAX_STEPS"), (1e-6, "BREAKDOWN")])
def test_a_series_diverges_if_its_residual_grows_by_more_than_round_off(growth, status):
    matrix = symmetric([[1.0 + growth / 2] * 3])  # I − 2A = −(1 + growth) I
    solution = Neumann(terms=7, scale=2.0).solve(Matrix(matrix), randn(1, 3, seed=1))
    assert solution.status.tolist() == [Status[status]]
    assert relative_error(solution.residual, torch.ones(1)) < 1e-10


def test_negative_curvature_is_reported_though_the_residual_is_unchanged():
    matrix = symmetric([[-1.0, 1.0, 2.0, 3.0]])
    b = torch.linalg.eigh(matrix).eigenvectors[:, :, 0]
    status = Neumann(terms=3, scale=0.1).solve(Matrix(matrix), b).status
    assert status.tolist() == [Status.NEGATIVE_CURVATURE]


def test_a_task_keeps_what_it_had_before_its_residual_grew():
    matrix = symmetric([[-0.1, 1.0, 2.0, 3.0]])
    b = randn(1, 4, seed=2)
    operator = Matrix(matrix)
    solutions = [Neumann(terms=k, scale=0.3).solve(operator, b) for k in (1, 3, 10, 100)]
    residuals = [float(solution.residual) for solution in solutions]
    assert residuals == sorted(residuals, reverse=True)
    assert solutions[-1].status.tolist() == [Status.NEGATIVE_CURVATURE]
