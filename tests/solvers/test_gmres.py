"""GMRES against dense solves of asymmetric systems, and its exact truncated iterates."""

import pytest
import torch
from oracles import randn, relative_error, symmetric

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers import GMRES, SolverState, Status

TASKS, N = 3, 8


class Matrix(LinearOperator):
    def __init__(self, matrix):
        self.matrix = matrix
        self.shape = tuple(matrix.shape[:2])
        self.dtype = matrix.dtype
        self.device = matrix.device

    def matvec(self, vector):
        return (self.matrix @ vector.unsqueeze(-1)).squeeze(-1)


def system(seed=0):
    """Three matrices with eigenvalues of both signs and complex pairs, and right-hand sides."""
    matrix = randn(TASKS, N, N, seed=seed) + 2 * torch.eye(N, dtype=torch.float64)
    scale = torch.tensor([[1.0], [1e6], [1e-9]], dtype=torch.float64)
    return matrix, scale * randn(TASKS, N, seed=seed + 1)


def krylov_minimizer(matrix, b, steps):
    """argmin ‖b − Ax‖ over span{b, Ab, …}, by least squares on an orthonormal basis."""
    columns = [b / b.norm()]
    for _ in range(steps - 1):
        columns.append(matrix @ columns[-1])
        columns[-1] = columns[-1] / columns[-1].norm()
    basis, _ = torch.linalg.qr(torch.stack(columns, dim=1))
    return basis @ torch.linalg.lstsq(matrix @ basis, b.unsqueeze(-1)).solution.squeeze(-1)


@pytest.mark.parametrize("steps", [1, 3])
def test_truncated_iterates_are_those_with_the_smallest_residual(steps):
    matrix, b = system()
    solution = GMRES(max_steps=steps, tol=0.0).solve(Matrix(matrix), b)
    exact = torch.stack([krylov_minimizer(m, v, steps) for m, v in zip(matrix, b, strict=True)])
    assert relative_error(solution.value, exact) < 1e-12
    residual = (b - Matrix(matrix).matvec(exact)).norm(dim=1) / b.norm(dim=1)
    assert relative_error(solution.residual, residual) < 1e-12
    assert solution.products == steps
    assert (solution.status == Status.MAX_STEPS).all()


def test_it_converges_to_the_dense_solution():
    matrix, b = system()
    solution = GMRES(max_steps=N, tol=1e-12).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-10
    assert (solution.status == Status.CONVERGED).all()


def test_a_zero_right_hand_side_has_a_zero_solution():
    matrix, b = system()
    b[1] = 0
    solution = GMRES(max_steps=N, tol=1e-12).solve(Matrix(matrix), b)
    assert (solution.value[1] == 0).all()
    assert relative_error(solution.value[[0, 2]], torch.linalg.solve(matrix, b)[[0, 2]]) < 1e-10
    assert (solution.status == Status.CONVERGED).all()


def test_a_singular_system_that_has_a_solution_is_solved():
    """The range of this A and its null space meet in 0 alone, as GMRES needs."""
    left = randn(N, 5, seed=5)
    matrix = torch.stack([left @ torch.diag(torch.arange(1.0, 6.0).double()) @ left.T] * 2)
    b = Matrix(matrix).matvec(randn(2, N, seed=6))
    solution = GMRES(max_steps=N, tol=1e-10).solve(Matrix(matrix), b)
    assert (solution.status == Status.CONVERGED).all()
    assert relative_error(Matrix(matrix).matvec(solution.value), b) < 1e-9


def test_a_singular_system_without_a_solution_breaks_down_at_the_smallest_residual():
    matrix, b = system()
    matrix[0] = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0]).double())
    solution = GMRES(max_steps=N, tol=1e-12).solve(Matrix(matrix), b)
    assert solution.status.tolist() == [Status.BREAKDOWN, Status.CONVERGED, Status.CONVERGED]
    assert relative_error(solution.residual[0], b[0, 5:].norm() / b[0].norm()) < 1e-9
    assert relative_error(solution.value[1:], torch.linalg.solve(matrix[1:], b[1:])) < 1e-10


def test_a_nilpotent_matrix_breaks_down_without_harm_to_other_tasks():
    """A e₁ = 0 for this shift, so the first column of H is zero."""
    matrix, b = system()
    matrix[0] = torch.diag(torch.ones(N - 1).double(), diagonal=1)
    b[0] = torch.eye(N, dtype=torch.float64)[0]
    solution = GMRES(max_steps=N, tol=1e-12).solve(Matrix(matrix), b)
    assert solution.status.tolist() == [Status.BREAKDOWN, Status.CONVERGED, Status.CONVERGED]
    assert (solution.value[0] == 0).all()
    assert solution.residual[0] == 1


def test_tasks_that_end_early_keep_their_solution():
    matrix, b = system()
    matrix[0] = 2 * torch.eye(N)
    solution = GMRES(max_steps=N, tol=1e-12).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-10
    assert solution.needed[0] == 1
    assert solution.needed[1] == N


def test_numbers_that_are_not_finite_are_reported():
    matrix, b = system()
    matrix[1, 0, 0] = torch.nan
    solution = GMRES(max_steps=N).solve(Matrix(matrix), b)
    assert solution.status[1] == Status.NON_FINITE
    assert solution.value[1].isnan().all()
    assert solution.value[0].isfinite().all()


def test_a_small_residual_is_computed_before_it_is_reported():
    """In float32 its recurrence says 1.7e-5 of a residual of 3.4e-5."""
    matrix = symmetric(torch.logspace(-3, 0, 30).unsqueeze(0)).float()
    b = randn(1, 30, seed=0).float()
    solution = GMRES(max_steps=29).solve(Matrix(matrix), b)
    ax = (matrix.double() @ solution.value.double().unsqueeze(-1)).squeeze(-1)
    true = float((b.double() - ax).norm() / b.norm())
    assert float(solution.residual) == pytest.approx(true, rel=0.2)


def test_it_starts_from_the_state():
    matrix, b = system()
    exact = torch.linalg.solve(matrix, b)
    state = SolverState(solution=exact)
    solution = GMRES(max_steps=3, tol=1e-8).solve(Matrix(matrix), b, state=state)
    assert solution.needed.tolist() == [1, 1, 1]  # the product of the start alone
    assert relative_error(solution.value, exact) < 1e-10


def test_a_result_worse_than_zero_is_a_breakdown():
    """In single precision a singular system may leave a vast x, and a residual above 1."""
    for seed in range(60):
        factor = randn(4, 6, seed=seed).float()
        matrix = (factor.T @ factor)[None]
        solution = GMRES(max_steps=40).solve(Matrix(matrix), randn(1, 6, seed=99 + seed).float())
        if float(solution.residual) > 1.001:
            break
    else:
        pytest.fail("got no residual above 1, expected one")
    assert solution.status.tolist() == [Status.BREAKDOWN]
