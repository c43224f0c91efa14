"""The power iteration that scales the Neumann series and Richardson's iteration."""

import pytest
import torch
from oracles import Matrix, randn, symmetric

from metaimplicit.solvers import Neumann, Nystrom, Richardson, Status
from metaimplicit.solvers.power_iteration import largest_eigenvalue


@pytest.mark.parametrize("curvature", [1.0, 10.0])
@pytest.mark.parametrize(
    "solver", [Neumann(terms=5), Richardson(steps=5)], ids=["neumann", "richardson"]
)
def test_for_one_parameter_the_random_start_does_not_cancel_the_right_hand_side(solver, curvature):
    """The right-hand side is normalised to −1, and the fixed random vector to +1."""
    a = Matrix(torch.full((1, 1, 1), curvature, dtype=torch.float64))
    b = torch.tensor([[-6.0]], dtype=torch.float64)
    solution = solver.solve(a, b)
    assert solution.value.item() == pytest.approx(-6.0 / curvature, rel=1e-12)
    assert solution.status.tolist() == [int(Status.CONVERGED)]


@pytest.mark.parametrize("length", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_estimate_is_at_most_the_largest_eigenvalue(steps, length):
    matrix = symmetric([[0.1, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 7.0]])
    start = length * randn(2, 4, seed=1)
    estimate = largest_eigenvalue(Matrix(matrix), start, steps)[0].squeeze(1)
    largest = torch.tensor([5.0, 7.0], dtype=torch.float64)
    assert (estimate <= largest * (1 + 1e-12)).all()
    assert (estimate > 0.1).all()


@pytest.mark.parametrize("length", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_estimate_of_a_multiple_of_the_identity_is_exact(steps, length):
    matrix = 3 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    estimate, _ = largest_eigenvalue(Matrix(matrix), length * randn(2, 4, seed=1), steps)
    expected = torch.full((2, 1), 3.0, dtype=torch.float64)
    torch.testing.assert_close(estimate, expected, rtol=1e-12, atol=0)


def test_the_scale_takes_five_products_at_first_and_one_later():
    matrix = symmetric([[1.0, 2.0, 4.0]])
    b = randn(1, 3, seed=1)
    solver = Richardson(steps=3)
    first = solver.solve(Matrix(matrix), b)
    second = solver.solve(Matrix(matrix), b, state=first.state)
    # Three steps, of which the first from zero takes no product, and the residual.
    assert (first.products, second.products) == (5 + 2 + 1, 1 + 3 + 1)


@pytest.mark.parametrize(
    "solver",
    [Richardson(), Richardson(steps=3), Nystrom(rank=3, rho=0.1, refresh=100)],
    ids=["one step", "three steps", "nystrom"],
)
def test_a_solver_recovers_from_the_state_of_a_solve_of_nans(solver):
    good = Matrix(10 * torch.eye(3, dtype=torch.float64).unsqueeze(0))
    bad = Matrix(torch.full((1, 3, 3), torch.nan, dtype=torch.float64))
    b = randn(1, 3, seed=1)
    torch.manual_seed(0)
    state = solver.solve(bad, b).state
    for _ in range(20):
        solution = solver.solve(good, b, state=state)
        state = solution.state

    torch.manual_seed(0)
    clean = solver.solve(good, b, state=solver.solve(good, b).state)
    assert solution.residual.item() <= clean.residual.item() + 1e-12
