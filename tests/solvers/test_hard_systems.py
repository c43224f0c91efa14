"""Systems that break solvers: each ends in a known status, with finite numbers and a residual no worse than said."""

import pytest
import torch
from oracles import Matrix, generator, randn, relative_error, symmetric

from metaimplicit import CG, MINRES, Auto, Dense, Lanczos, Neumann, Nystrom, NystromCG, Status

DEFINITE, BENT, FLAT = (
    torch.linspace(1, 10, 12),
    torch.linspace(-4, 5, 12),
    torch.linspace(0, 11, 12),
)
SYSTEMS = {
    "indefinite": symmetric([BENT.tolist()]),
    "singular": symmetric([FLAT.tolist()]),
    "zero": torch.zeros(1, 12, 12, dtype=torch.float64),
    "huge": 1e12 * symmetric([DEFINITE.tolist()]),
    "tiny": 1e-12 * symmetric([DEFINITE.tolist()]),
    "huge and indefinite": 1e12 * symmetric([BENT.tolist()]),
}
SOLVERS = {
    "cg": CG(max_steps=30, tol=1e-8),
    "cg, then minres": CG(max_steps=30, tol=1e-8, negative="minres"),
    "minres": MINRES(max_steps=30, tol=1e-8),
    "lanczos": Lanczos(max_steps=30, tol=1e-8),
    "auto": Auto(max_steps=30, tol=1e-8, dense=0),
    "auto, dense": Auto(),
    "auto, no memory": Auto(max_steps=30, tol=1e-8, dense=0, memory=0),
    "neumann": Neumann(terms=400),
    "dense": Dense(),
    "nystrom": Nystrom(rank=6, rho=0.1, generator=generator(0)),
    "nystrom, streamed": Nystrom(rank=6, rho=0.1, chunk=2, generator=generator(0)),
    "nystrom-cg": NystromCG(rank=6, rho=0.1, max_steps=30, tol=1e-8, generator=generator(0)),
}
OK, SHORT, BENT_DOWN, BROKEN = (
    Status.CONVERGED,
    Status.MAX_STEPS,
    Status.NEGATIVE_CURVATURE,
    Status.BREAKDOWN,
)
EXPECTED = {  # one column a system, in the order above
    "cg": (BENT_DOWN, None, BENT_DOWN, OK, OK, BENT_DOWN),
    "cg, then minres": (OK, BROKEN, BROKEN, OK, OK, OK),
    "minres": (OK, BROKEN, BROKEN, OK, OK, OK),
    "lanczos": (OK, BROKEN, BROKEN, OK, OK, OK),
    "auto": (OK, BROKEN, BROKEN, OK, OK, OK),
    "auto, dense": (OK, BROKEN, BROKEN, OK, OK, OK),
    "auto, no memory": (OK, BROKEN, BROKEN, OK, OK, OK),
    "neumann": (BENT_DOWN, None, BENT_DOWN, OK, OK, BENT_DOWN),
    "dense": (OK, BROKEN, BROKEN, OK, OK, OK),
    "nystrom": (BENT_DOWN, BROKEN, BENT_DOWN, BROKEN, SHORT, BENT_DOWN),
    "nystrom, streamed": (BENT_DOWN, BROKEN, BENT_DOWN, BROKEN, SHORT, BENT_DOWN),
    "nystrom-cg": (BENT_DOWN, None, BENT_DOWN, OK, OK, BENT_DOWN),
}
"""None: to round-off the zero eigenvalue is positive, zero or negative; any status but converged tells the truth."""


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_says_how_it_ended(name, system):
    matrix, b = SYSTEMS[system], randn(1, 12, seed=1)
    solution = SOLVERS[name].solve(Matrix(matrix), b)
    status, expected = Status(int(solution.status)), EXPECTED[name][list(SYSTEMS).index(system)]
    assert status is expected or (expected is None and status is not Status.CONVERGED)
    assert solution.value.isfinite().all()
    true = (b - (matrix @ solution.value.unsqueeze(-1)).squeeze(-1)).norm() / b.norm()
    assert float(solution.residual) == pytest.approx(float(true), rel=1e-6, abs=1e-12)
    if status is Status.CONVERGED:
        assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-7
    elif "nystrom" not in name or "cg" in name:
        assert true <= 1 + 1e-12  # no worse than no answer


@pytest.mark.parametrize("system", ["huge", "tiny", "indefinite"])
@pytest.mark.parametrize("name", ["cg", "minres", "lanczos", "dense", "nystrom-cg"])
def test_single_precision_reaches_its_own_round_off(name, system):
    if (name, system) in {("cg", "indefinite"), ("nystrom-cg", "indefinite")}:
        expected = Status.NEGATIVE_CURVATURE
    else:
        expected = Status.CONVERGED if name == "dense" else Status.MAX_STEPS  # 1e-8 is out of reach
    solution = SOLVERS[name].solve(Matrix(SYSTEMS[system].float()), randn(1, 12, seed=1).float())
    assert solution.status.tolist() == [expected]
    assert float(solution.residual) < 1e-5 or expected is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("solver", [MINRES, Lanczos])
def test_minres_ends_at_the_least_squares_solution_of_a_singular_system(solver):
    matrix, b = SYSTEMS["singular"], randn(1, 12, seed=1)
    solution = solver(max_steps=30, tol=1e-8).solve(Matrix(matrix), b)
    image = matrix @ torch.linalg.pinv(matrix, rtol=1e-12) @ b.unsqueeze(-1)
    assert relative_error((matrix @ solution.value.unsqueeze(-1)), image) < 1e-9
    assert solution.value.norm() < 10 * b.norm()


def test_negative_curvature_can_be_an_error():
    both = torch.cat([SYSTEMS["huge"], SYSTEMS["huge and indefinite"]])
    with pytest.raises(
        FloatingPointError, match=r"CG met negative curvature in 1 of 2 tasks \(smallest quotient -"
    ):
        CG(max_steps=30, negative="raise").solve(Matrix(both), randn(2, 12, seed=1))


def test_minres_takes_over_only_where_curvature_is_negative():
    both = torch.cat([symmetric([DEFINITE.tolist()]), SYSTEMS["indefinite"]])
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


def test_neumann_keeps_what_it_had_before_it_grew():
    matrix = symmetric([[-0.01, 1.0, 2.0, 3.0]])
    b = randn(1, 4, seed=2)
    operator = Matrix(matrix)
    residuals = [
        float(Neumann(terms=k, scale=0.3).solve(operator, b).residual) for k in (1, 10, 100, 1000)
    ]
    assert residuals == sorted(residuals, reverse=True)
    assert Neumann(terms=1000, scale=0.3).solve(operator, b).status.tolist() == [
        Status.NEGATIVE_CURVATURE
    ]


def test_a_factor_that_round_off_let_through_is_not_believed():
    """A = diag(1, ε²): Cholesky succeeds, and x would be 1/ε² long along what is zero to working precision."""
    matrix = torch.diag(
        torch.tensor([1.0, torch.finfo(torch.float64).eps ** 2], dtype=torch.float64)
    )[None]
    assert int(torch.linalg.cholesky_ex(matrix)[1]) == 0
    solution = Dense().solve(Matrix(matrix), torch.ones(1, 2, dtype=torch.float64))
    assert Status(int(solution.status)) is BROKEN
    torch.testing.assert_close(
        solution.value, torch.tensor([[1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-15
    )
