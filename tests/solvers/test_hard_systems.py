"""Systems that break solvers: each ends in a known status, and reports its true residual."""

import pytest
import torch
from oracles import Matrix, randn, relative_error, symmetric
from solver_cases import SOLVERS

from metaimplicit import CG, Dense, Neumann, Nystrom
from metaimplicit.solvers import (
    GMRES,
    MINRES,
    Auto,
    Factored,
    Lanczos,
    NystromCG,
    OneStep,
    Richardson,
    Status,
)

DEFINITE = torch.linspace(1, 10, 12).unsqueeze(0)
INDEFINITE = torch.linspace(-4, 5, 12).unsqueeze(0)
SINGULAR = torch.linspace(0, 11, 12).unsqueeze(0)
SYSTEMS = {
    "indefinite": symmetric(INDEFINITE),
    "singular": symmetric(SINGULAR),
    "zero": torch.zeros(1, 12, 12, dtype=torch.float64),
    "huge": 1e12 * symmetric(DEFINITE),
    "tiny": 1e-12 * symmetric(DEFINITE),
    "huge and indefinite": 1e12 * symmetric(INDEFINITE),
}
LIMITS = {"max_steps": 30, "tol": 1e-8}
SKETCH = {"rank": 6, "rho": 0.1}

CONVERGED, MAX_STEPS, NEGATIVE, BREAKDOWN, *_ = Status
# To round-off the zero eigenvalue of the singular matrix is positive, zero or negative, so any
# status but CONVERGED may be true.
UNSOLVED = set(Status) - {CONVERGED}
DEFINITE_ONLY = (NEGATIVE, UNSOLVED, NEGATIVE, CONVERGED, CONVERGED, NEGATIVE)
INDEFINITE_TOO = (CONVERGED, BREAKDOWN, BREAKDOWN, CONVERGED, CONVERGED, CONVERGED)
LOW_RANK = (NEGATIVE, BREAKDOWN, NEGATIVE, BREAKDOWN, MAX_STEPS, NEGATIVE)
CASES = {  # a solver, and its status on each of the systems
    "cg": (CG(**LIMITS), DEFINITE_ONLY),
    "cg, then minres": (CG(**LIMITS, negative="minres"), INDEFINITE_TOO),
    "minres": (MINRES(**LIMITS), INDEFINITE_TOO),
    "lanczos": (Lanczos(**LIMITS), INDEFINITE_TOO),
    "auto": (Auto(**LIMITS, dense=0), INDEFINITE_TOO),
    "auto, dense": (Auto(), INDEFINITE_TOO),
    "auto, no memory": (Auto(**LIMITS, dense=0, memory=0), INDEFINITE_TOO),
    "neumann": (Neumann(terms=200), DEFINITE_ONLY),
    "dense": (Dense(), INDEFINITE_TOO),
    "nystrom": (Nystrom(**SKETCH), LOW_RANK),
    "nystrom, streamed": (Nystrom(**SKETCH, chunk=2), LOW_RANK),
    "nystrom-cg": (NystromCG(**SKETCH, **LIMITS), DEFINITE_ONLY),
}

# `Factored` needs an operator that it can invert. The others take a step or two of a loop.
TESTED_ELSEWHERE = {Factored, OneStep, Richardson}


def test_every_solver_has_a_row():
    kinds = {type(solver) for solver in SOLVERS.values()}
    rows = {type(solver) for solver, _ in CASES.values()}
    for kind in kinds:
        assert kind in rows | TESTED_ELSEWHERE, (
            f"tests/solvers/test_hard_systems.py: got no row for {kind.__name__}; add one to CASES "
            "with a solver of enough steps and its status on each of SYSTEMS, such as DEFINITE_ONLY"
        )
    assert rows | TESTED_ELSEWHERE <= kinds


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", CASES)
def test_every_solver_says_how_it_ended(name, system):
    solver, statuses = CASES[name]
    expected = statuses[list(SYSTEMS).index(system)]
    matrix = SYSTEMS[system]
    b = randn(1, 12, seed=1)
    solution = solver.solve(Matrix(matrix), b)
    status = Status(int(solution.status))
    assert status in (expected if isinstance(expected, set) else {expected})
    assert solution.value.isfinite().all()
    residual = float((b - (matrix @ solution.value.unsqueeze(-1)).squeeze(-1)).norm() / b.norm())
    assert float(solution.residual) == pytest.approx(residual, rel=1e-6, abs=1e-12)
    if status is CONVERGED:
        assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-7
    elif not isinstance(solver, Nystrom):
        assert residual <= 1 + 1e-12  # no worse than no answer


@pytest.mark.parametrize("system", ["huge", "tiny", "indefinite"])
@pytest.mark.parametrize("name", ["cg", "minres", "lanczos", "dense", "nystrom-cg"])
def test_single_precision_reaches_its_own_round_off(name, system):
    expected = CONVERGED if name == "dense" else MAX_STEPS  # a residual of 1e-8 is out of reach
    if (name, system) in {("cg", "indefinite"), ("nystrom-cg", "indefinite")}:
        expected = NEGATIVE
    solver, _ = CASES[name]
    b = randn(1, 12, seed=1).float()
    solution = solver.solve(Matrix(SYSTEMS[system].float()), b)
    assert solution.status.tolist() == [expected]
    assert float(solution.residual) < 1e-5 or expected is NEGATIVE


ASYMMETRIC = symmetric(DEFINITE) + 0.5 * torch.triu(randn(12, 12, seed=5), 1)
WITHOUT_UNITS = [
    CG(**LIMITS),
    CG(**LIMITS, negative="minres"),
    MINRES(**LIMITS),
    GMRES(**LIMITS),
    Lanczos(**LIMITS),
    Auto(**LIMITS, dense=0),
    Dense(),
    Neumann(),
    OneStep(),
    Richardson(steps=3),
]


@pytest.mark.parametrize("unit", [2.0**100, 2.0**-100])
@pytest.mark.parametrize(
    "matrix",
    [
        symmetric(DEFINITE),
        symmetric(INDEFINITE),
        symmetric(SINGULAR),
        symmetric(torch.logspace(-8, 0, 12).unsqueeze(0)),
        ASYMMETRIC,
    ],
    ids=["definite", "indefinite", "singular", "ill-conditioned", "asymmetric"],
)
@pytest.mark.parametrize("solver", WITHOUT_UNITS, ids=str)
def test_a_system_in_other_units_is_solved_by_the_same_numbers(solver, matrix, unit):
    """Powers of two do not round, so a threshold that forgets the size of A is all that differs."""
    b = randn(1, 12, seed=3)
    expected, scaled = (solver.solve(Matrix(factor * matrix), b) for factor in (1.0, unit))
    assert torch.equal(unit * scaled.value, expected.value)
    assert torch.equal(scaled.rayleigh / unit, expected.rayleigh)
    assert torch.equal(scaled.residual, expected.residual)
    assert (scaled.status, scaled.products) == (expected.status, expected.products)


@pytest.mark.parametrize("condition", [1e10, 1e14])
@pytest.mark.parametrize("kind", [CG, MINRES])
def test_an_ill_conditioned_system_has_its_true_residual(kind, condition):
    """The recurrence of MINRES says 4e-6 of a residual of 2.6 at a condition of 1e10."""
    spectrum = torch.logspace(-0.5, 0.5, 8, base=condition, dtype=torch.float64)
    matrix = symmetric(spectrum.unsqueeze(0))
    for steps in (10, 20, 50):
        for seed in range(3):
            b = randn(1, 8, seed=seed)
            solution = kind(max_steps=steps, tol=0.0).solve(Matrix(matrix), b)
            true = (b - (matrix @ solution.value.unsqueeze(-1)).squeeze(-1)).norm() / b.norm()
            noise = 1e-16 * condition**0.5 * float(solution.value.norm() / b.norm())
            assert abs(solution.residual.item() - true.item()) < 0.5 * true.item() + 10 * noise
            if kind is MINRES and true > 1.0001:
                assert solution.status.item() == BREAKDOWN


@pytest.mark.parametrize(
    ("dtype", "diagonal", "b"),
    [
        (torch.float64, [0.0, 1.0, 2.0], [0.3, 0.3, 1e-9]),
        (torch.float64, [2.0, 2.0, 0.0], [1.0, 0.3, 1e-3]),
        (torch.float32, [0.0, 1.0, -1.0], [1.0, 1e-5, 0.3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [MINRES, GMRES])
def test_a_singular_system_of_few_unknowns_is_a_breakdown(kind, dtype, diagonal, b):
    """The residual by recurrence may be round-off there."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=dtype))[None]
    solution = kind(max_steps=9, tol=0.0).solve(Matrix(matrix), torch.tensor([b], dtype=dtype))
    assert solution.status.tolist() == [BREAKDOWN]
    assert solution.residual > 1e-4


@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
def test_a_residual_below_the_root_of_round_off_is_computed_by_one_product_more(kind):
    matrix = symmetric(torch.logspace(-1, 0, 12).unsqueeze(0)).float()
    operator = Matrix(matrix)
    b = randn(1, 12, seed=0).float()
    solution = kind(max_steps=11, tol=1e-6).solve(operator, b)
    true = (b - (matrix @ solution.value.unsqueeze(-1)).squeeze(-1)).norm() / b.norm()
    assert 1e-5 < true < 1e-3
    assert solution.residual.item() == pytest.approx(true.item(), rel=1e-2)
    assert solution.products == operator.products == 12


@pytest.mark.parametrize(
    ("solver", "residual", "status"),
    [
        (Richardson(scale=1.9, warm=False), 0.9, MAX_STEPS),
        (Richardson(scale=2.1, warm=False), 1.1, BREAKDOWN),
        (Nystrom(rank=1, rho=1 / 1.9), 0.9, MAX_STEPS),
        (Nystrom(rank=1, rho=1 / 2.1), 1.1, BREAKDOWN),
        (Nystrom(rank=1, rho=1 / 1.9, chunk=1), 0.9, MAX_STEPS),
        (Nystrom(rank=1, rho=1 / 2.1, chunk=1), 1.1, BREAKDOWN),
    ],
    ids=str,
)
def test_a_result_that_is_worse_than_zero_is_a_breakdown(solver, residual, status):
    """On A = I, with a b that a sketch of one column does not reach: x is b times a number."""
    b = torch.ones(1, 400, dtype=torch.float64)
    solution = solver.solve(Matrix(torch.eye(400, dtype=torch.float64).unsqueeze(0)), b)
    assert float(solution.residual) == pytest.approx(residual, rel=2e-3)
    assert solution.status.tolist() == [status]


@pytest.mark.parametrize("kind", [MINRES, GMRES])
def test_a_step_that_gains_nothing_is_no_breakdown(kind):
    """The residual stays 1, up to round-off, since bᵀAb = 0 and one step moves along b alone."""
    residuals = []
    for seed in range(20):
        matrix = symmetric(torch.tensor([[1.0, -1.0, 2.0]]), seed=seed)
        vectors = torch.linalg.eigh(matrix).eigenvectors[0]  # of −1, 1 and 2
        solution = kind(1, tol=1e-8).solve(Matrix(matrix), (vectors[:, 0] + vectors[:, 1])[None])
        assert solution.status.tolist() == [MAX_STEPS]
        residuals.append(float(solution.residual))
    assert residuals == pytest.approx([1.0] * 20, abs=1e-12)
