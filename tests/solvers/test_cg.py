"""Conjugate gradients against the Krylov minimiser, and what stops them."""

import pytest
import torch
from oracles import Matrix, krylov_minimiser, randn, relative_error, symmetric
from solver_cases import SPECTRA, positive_systems

from metaimplicit import CG
from metaimplicit.solvers import Lanczos, Status

DEFINITE = torch.linspace(1, 10, 12)
INDEFINITE = torch.linspace(-4, 5, 12)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", [CG, Lanczos])
def test_k_steps_give_the_krylov_minimiser(solver, steps):
    matrix, b, _ = positive_systems()
    operator = Matrix(matrix)
    solution = solver(max_steps=steps, tol=0.0).solve(operator, b)
    for task in range(3):
        # The third spectrum has two eigenvalues, so its Krylov space ends after two steps.
        size = min(steps, 2) if task == 2 else steps
        expected = krylov_minimiser(matrix[task], b[task], size)
        assert relative_error(solution.value[task], expected) < 1e-11
    # The third task is solved after two steps, and a product more confirms it.
    assert solution.products == operator.products == steps + (steps == 3)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_preconditioner_changes_the_krylov_space(steps):
    """CG with P minimises over span{Pb, PAPb, …}: plain CG on P^½ A P^½, carried back."""
    matrix, b, _ = positive_systems()
    p = symmetric(torch.stack([torch.linspace(0.5, 3, 12)] * 3), seed=5)
    solution = CG(max_steps=steps, tol=0.0).solve(
        Matrix(matrix), b, preconditioner=lambda r: (p @ r.unsqueeze(-1)).squeeze(-1)
    )
    for task in range(3):
        root = torch.linalg.cholesky(p[task])
        inner = krylov_minimiser(root.T @ matrix[task] @ root, root.T @ b[task], steps)
        assert relative_error(solution.value[task], root @ inner) < 1e-10


def test_a_preconditioner_that_is_not_finite_is_no_negative_curvature():
    matrix, b, exact = positive_systems()
    scale = torch.tensor([[1.0], [torch.nan], [torch.inf]], dtype=torch.float64)
    solution = CG(30).solve(Matrix(matrix), b, preconditioner=lambda r: scale * r)
    assert solution.status.tolist() == [Status.CONVERGED, *[Status.NON_FINITE] * 2]
    assert relative_error(solution.value[0], exact[0]) < 1e-5


def test_it_counts_what_each_task_needed():
    few = torch.full((12,), 3.0)
    many = SPECTRA[1]
    matrix = symmetric(torch.stack([few, many]))
    solution = CG(max_steps=30, tol=1e-10).solve(Matrix(matrix), randn(2, 12, seed=6))
    assert solution.needed[0] == 1
    assert 6 < solution.needed[1] <= solution.products


def test_it_leaves_when_every_task_is_done():
    multiple = Matrix(3 * torch.eye(4).double().unsqueeze(0))
    assert CG(max_steps=50).solve(multiple, randn(1, 4, seed=1)).products == 2
    zero = Matrix(torch.zeros(1, 4, 4).double())
    status = CG().solve(zero, torch.ones(1, 4).double()).status
    assert status.tolist() == [Status.NEGATIVE_CURVATURE]


# residuals


def test_it_has_converged_only_at_its_tolerance():
    matrix, b, _ = positive_systems()
    residuals = [CG(max_steps=k, tol=0.0).solve(Matrix(matrix), b).residual for k in range(1, 9)]
    # Steps whose residual is between tol and √tol.
    steps = next(k for k, r in enumerate(residuals, 1) if 0.01 < r[1] < 0.1)
    solution = CG(max_steps=steps, tol=0.01).solve(Matrix(matrix), b)
    assert solution.status[1] == Status.MAX_STEPS


def test_a_small_residual_is_computed_before_it_is_reported():
    """In float32 at condition 1e5 the recurrence meets the tolerance, and b − Ax does not."""
    matrix = symmetric(torch.logspace(-5, 0, 30).unsqueeze(0)).float()
    b = randn(1, 30, seed=3).float()
    solution = CG(max_steps=300, tol=1e-6).solve(Matrix(matrix), b)
    ax = (matrix.double() @ solution.value.double().unsqueeze(-1)).squeeze(-1)
    true = float((b.double() - ax).norm() / b.norm())
    assert true > 1e-5
    # It is itself known to the round-off of A x alone. The recurrence says 1e-6.
    assert float(solution.residual) > 0.1 * true
    assert solution.status.tolist() == [Status.MAX_STEPS]


# negative curvature


def test_at_negative_curvature_it_keeps_its_best_iterate():
    matrix = symmetric(torch.stack([torch.linspace(-1, 10, 12), SPECTRA[0]]))
    b = randn(2, 12, seed=5)
    solution = CG(max_steps=30, tol=1e-12).solve(Matrix(matrix), b)
    assert solution.status.tolist() == [Status.NEGATIVE_CURVATURE, Status.CONVERGED]
    assert solution.rayleigh[0] <= 0 < solution.rayleigh[1]
    steps = int(solution.needed[0]) - 1  # the product that showed it moved nothing
    iterates = [krylov_minimiser(matrix[0], b[0], k + 1) for k in range(steps)]
    iterates.insert(0, torch.zeros(12).double())
    best = min(iterates, key=lambda x: float((b[0] - matrix[0] @ x).norm()))
    assert steps > 1
    assert best.norm() > 0
    assert relative_error(solution.value[0], best) < 1e-8


def test_negative_curvature_can_be_an_error():
    matrix = 1e12 * symmetric(torch.stack([DEFINITE, INDEFINITE]))
    message = r"CG met negative curvature in 1 of 2 tasks \(smallest quotient -"
    with pytest.raises(FloatingPointError, match=message):
        CG(max_steps=30, negative="raise").solve(Matrix(matrix), randn(2, 12, seed=1))


def test_minres_takes_over_only_where_curvature_is_negative():
    both = torch.cat([symmetric([DEFINITE.tolist()]), symmetric([INDEFINITE.tolist()])])
    b = randn(2, 12, seed=1)
    plain = CG(max_steps=30, tol=1e-9).solve(Matrix(both), b)
    rescued = CG(max_steps=30, tol=1e-9, negative="minres").solve(Matrix(both), b)
    assert torch.equal(rescued.value[0], plain.value[0])
    assert relative_error(rescued.value[1], torch.linalg.solve(both[1], b[1])) < 1e-8
    assert rescued.status.tolist() == [Status.CONVERGED] * 2
    assert rescued.rayleigh[1] < 0 < rescued.rayleigh[0]
    assert rescued.rayleigh[1] <= plain.rayleigh[1]
    assert rescued.needed[0] == plain.needed[0]
    assert plain.needed[1] < rescued.needed[1] <= rescued.products
