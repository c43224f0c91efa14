"""Lanczos and MINRES against the best of a Krylov space, and the factors of their tridiagonal T."""

import pytest
import torch
from oracles import Matrix, krylov_basis, randn, relative_error, symmetric
from solver_cases import SPECTRA

from metaimplicit import CG
from metaimplicit.solvers import MINRES, Lanczos
from metaimplicit.solvers.tridiagonal import GalerkinResidual, GivensQR


def least_squares(matrix, b, steps):
    """argmin ‖b − Ax‖ over the Krylov space of one task, and its relative residual."""
    basis = krylov_basis(matrix, b, steps)
    y = torch.linalg.lstsq(matrix @ basis, b.unsqueeze(-1)).solution.squeeze(-1)
    x = basis @ y
    return x, float((b - matrix @ x).norm() / b.norm())


@pytest.mark.parametrize(
    ("solver", "steps"), [(MINRES, 1), (MINRES, 3), (MINRES, 7), (Lanczos, 4), (Lanczos, 7)]
)
def test_of_an_indefinite_matrix_they_minimise_the_residual(solver, steps):
    spectra = [torch.linspace(-4, 5, 12), torch.linspace(-9, 2, 12), torch.linspace(-3, 1, 12)]
    matrix = symmetric(torch.stack(spectra))
    b = randn(3, 12, seed=9)
    operator = Matrix(matrix)
    solution = solver(max_steps=steps, tol=0.0).solve(operator, b)
    if solver is Lanczos:
        assert (solution.rayleigh < 0).all()  # it is CG until it has seen negative curvature
    for task in range(3):
        expected, _ = least_squares(matrix[task], b[task], steps)
        assert relative_error(solution.value[task], expected) < 1e-11
    assert solution.products == operator.products == steps


def test_a_stored_basis_keeps_the_digits_that_cg_loses():
    """Eigenvalues 10/i² + 1e-3, n = 300, 60 products: round-off costs CG digits, Lanczos none."""
    matrix = symmetric((10 / torch.arange(1, 301).double().square() + 1e-3).unsqueeze(0))
    b = randn(1, 300, seed=1)
    exact = torch.linalg.solve(matrix, b)
    cg = CG(60, 0.0).solve(Matrix(matrix), b)
    lanczos = Lanczos(60, 0.0).solve(Matrix(matrix), b)
    basis = krylov_basis(matrix[0], b[0], 60)
    best = basis @ torch.linalg.solve(basis.T @ matrix[0] @ basis, basis.T @ b[0])
    assert relative_error(lanczos.value[0], best) < 1e-8
    assert relative_error(lanczos.value, exact) < 0.01 * relative_error(cg.value, exact)


@pytest.mark.parametrize("seed", range(4))
def test_it_goes_on_from_where_a_space_is_exhausted(seed):
    """A is too ill-conditioned for single precision to solve in one space of all 12 dimensions."""
    matrix = symmetric(torch.logspace(-4, 0, 12).unsqueeze(0)).float()
    b = randn(1, 12, seed=seed).float()
    one, several = (Lanczos(steps, tol=1e-6).solve(Matrix(matrix), b) for steps in (12, 60))
    assert one.products == 13
    assert several.products > one.products
    assert several.residual <= one.residual


def test_each_task_stays_where_it_ended():
    one_value = torch.full((12,), 3.0)
    two_values = torch.cat([torch.ones(6), 5 * torch.ones(6)])
    matrix = symmetric(torch.stack([one_value, two_values, SPECTRA[0]]))
    b = randn(3, 12, seed=6)
    solution = Lanczos(max_steps=30, tol=1e-10).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-9
    assert solution.needed[:2].tolist() == [1, 2]
    assert solution.needed[2] > 6
    assert solution.rayleigh.tolist() == pytest.approx([3.0, 1.0, 1.0], rel=1e-3)


def test_an_indefinite_task_stays_where_its_residual_meets_the_tolerance():
    """The residual of the first task meets it before that of the second."""
    first = torch.tensor([-2.0, -1.0] + [1.0 + 0.01 * i for i in range(10)]).double()
    matrix = symmetric(torch.stack([first, torch.linspace(-4, 5, 12).double()]))
    b = randn(2, 12, seed=9)
    solution = Lanczos(max_steps=8, tol=0.05).solve(Matrix(matrix), b)
    residuals = [least_squares(matrix[0], b[0], k)[1] for k in range(1, 9)]
    steps = next(k for k, residual in enumerate(residuals, 1) if residual <= 0.05)
    assert steps < 8
    assert solution.needed[0] == steps
    expected, residual = least_squares(matrix[0], b[0], steps)
    assert relative_error(solution.value[0], expected) < 1e-9
    assert float(solution.residual[0]) == pytest.approx(residual, rel=1e-9)
    assert solution.needed[1] == 8


@pytest.mark.parametrize("steps", [30, 45])
def test_the_residual_is_true_where_round_off_decides_what_is_definite(steps):
    matrix = symmetric(torch.logspace(-7, 0, 60).unsqueeze(0)).float()
    b = randn(1, 60, seed=1)
    solution = Lanczos(steps, tol=0.0).solve(Matrix(matrix), b.float())
    ax = (matrix.double() @ solution.value.double().unsqueeze(-1)).squeeze(-1)
    true = float((b - ax).norm() / b.norm())
    assert float(solution.residual) == pytest.approx(true, rel=1e-2)


@pytest.mark.parametrize("solver", [MINRES, Lanczos])
def test_on_a_singular_system_they_end_at_a_least_squares_solution(solver):
    matrix = symmetric([torch.linspace(0, 11, 12).tolist()])
    b = randn(1, 12, seed=1)
    solution = solver(max_steps=30, tol=1e-8).solve(Matrix(matrix), b)
    image = matrix @ torch.linalg.pinv(matrix, rtol=1e-12) @ b.unsqueeze(-1)
    assert relative_error(matrix @ solution.value.unsqueeze(-1), image) < 1e-9
    assert solution.value.norm() < 10 * b.norm()


# the tridiagonal matrix


def tridiagonal(k, seed):
    """α and β of a random (k+1) × k matrix T, and T."""
    alphas = randn(k, seed=seed)
    betas = randn(k, seed=seed + 1).abs()
    t = torch.zeros(k + 1, k, dtype=torch.float64)
    for j in range(k):
        t[j, j] = alphas[j]
        t[j + 1, j] = betas[j]
        if j + 1 < k:
            t[j, j + 1] = betas[j]
    return alphas, betas, t


@pytest.mark.parametrize("seed", range(5))
def test_the_rotations_give_the_qr_factorisation(seed):
    alphas, betas, t = tridiagonal(5, seed)
    r = torch.linalg.qr(t).R
    r = torch.diag(r.diagonal().sign()) @ r  # with a positive diagonal
    qr = GivensQR(torch.zeros(1, 1, dtype=torch.float64))
    e1 = torch.eye(6, dtype=torch.float64)[0]
    residual = e1  # of the least-squares solution after k columns
    for k in range(5):
        column = qr.append(alphas[k].reshape(1, 1), betas[k].reshape(1, 1))
        assert float(column.gamma) == pytest.approx(float(r[k, k]), rel=1e-10)
        assert k < 1 or float(column.delta) == pytest.approx(float(r[k - 1, k]), rel=1e-10)
        assert k < 2 or float(column.epsilon) == pytest.approx(float(r[k - 2, k]), rel=1e-10)

        image = t[:, : k + 1] @ residual[: k + 1]  # A r, in coordinates
        slope = float(image.norm() / residual.norm())
        assert float(column.slope) == pytest.approx(slope, rel=1e-9)

        y = torch.linalg.lstsq(t[:, : k + 1], e1.unsqueeze(1)).solution.squeeze(1)
        next_residual = e1 - t[:, : k + 1] @ y
        shrinks = float(next_residual.norm() / residual.norm())
        assert float(column.sine) == pytest.approx(shrinks, rel=1e-9)
        residual = next_residual


@pytest.mark.parametrize("seed", range(5))
def test_the_pivots_give_the_residual_of_galerkins_solution(seed):
    alphas, betas, t = tridiagonal(5, seed)
    galerkin = GalerkinResidual(torch.full((1, 1), 3.0, dtype=torch.float64))
    for k in range(1, 6):
        pivot = galerkin.add_pivot(alphas[k - 1].reshape(1, 1))
        square = t[:k, :k]
        minors = [float(torch.linalg.det(t[:j, :j])) if j else 1.0 for j in (k, k - 1)]
        assert float(pivot) == pytest.approx(minors[0] / minors[1], rel=1e-9)
        y = torch.linalg.solve(square, 3 * torch.eye(k).double()[:, 0])
        expected = 3 * torch.eye(k + 1).double()[:, 0] - t[: k + 1, :k] @ y
        residual = galerkin.norm(betas[k - 1].reshape(1, 1))
        assert float(residual) == pytest.approx(float(expected.norm()), rel=1e-9)
