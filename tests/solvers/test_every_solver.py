"""Every solver against its exact solution, its exact truncated iterate, and what should stop it."""

import pytest
import torch
from oracles import (
    Matrix,
    generator,
    krylov_basis,
    krylov_minimiser,
    randn,
    relative_error,
    symmetric,
)

from metaimplicit import (
    CG,
    MINRES,
    Dense,
    Identity,
    Lanczos,
    LinearOperator,
    Neumann,
    Nystrom,
    NystromCG,
    Status,
)
from metaimplicit.solvers.low_rank import LowRank, Probes

SPECTRA = [
    torch.linspace(1, 10, 12),
    torch.logspace(-1, 1, 12),
    torch.cat([torch.full((6,), 2.0), torch.full((6,), 7.0)]),
]


@pytest.fixture
def system():
    matrix = symmetric(torch.stack(SPECTRA))
    b = randn(3, 12, seed=9) * torch.tensor([[1.0], [1e6], [1e-9]], dtype=torch.float64)
    return matrix, b, torch.linalg.solve(matrix, b)


def neumann_polynomial(matrix, b, terms, scale):
    step = torch.eye(12, dtype=torch.float64) - scale * matrix
    return scale * sum(torch.linalg.matrix_power(step, k) @ b for k in range(terms))


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (CG(max_steps=40, tol=1e-13), 1e-10),
        (Dense(), 1e-12),
        (Dense(chunk=5), 1e-12),
        (MINRES(max_steps=40, tol=1e-13), 1e-10),
        (Lanczos(max_steps=40, tol=1e-13), 1e-10),
        (NystromCG(rank=4, max_steps=40, tol=1e-13), 1e-10),
        (NystromCG(rank=4, sketch="columns", rho=0.5, max_steps=40, tol=1e-13), 1e-10),
        (Neumann(terms=3000, scale=0.1), 1e-10),
    ],
    ids=str,
)
def test_converged_solvers_solve_each_task(system, solver, tolerance):
    matrix, b, exact = system
    solution = solver.solve(Matrix(matrix), b)
    for task in range(3):
        assert relative_error(solution.value[task], exact[task]) < tolerance
    assert solution.status.tolist() == [Status.CONVERGED] * 3 or isinstance(solver, Neumann)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", [CG, Lanczos])
def test_cg_is_the_krylov_minimiser(system, solver, steps):
    matrix, b, _ = system
    operator = Matrix(matrix)
    solution = solver(max_steps=steps, tol=0.0).solve(operator, b)
    for task in range(3):
        # the third spectrum has two eigenvalues, so its Krylov space ends after two steps
        expected = krylov_minimiser(matrix[task], b[task], min(steps, 2) if task == 2 else steps)
        assert relative_error(solution.value[task], expected) < 1e-11
    # the third task is solved after two steps, and a product more confirms it
    assert solution.products == operator.products == steps + (steps == 3)


@pytest.mark.parametrize(
    ("solver", "steps"), [(MINRES, 1), (MINRES, 3), (MINRES, 7), (Lanczos, 4), (Lanczos, 7)]
)
def test_minres_minimises_the_residual_over_the_krylov_space(solver, steps):
    matrix = symmetric(
        torch.stack(
            [torch.linspace(-4, 5, 12), torch.linspace(-9, 2, 12), torch.linspace(-3, 1, 12)]
        )
    )
    b = randn(3, 12, seed=9)
    operator = Matrix(matrix)
    solution = solver(max_steps=steps, tol=0.0).solve(operator, b)
    assert (
        solver is MINRES or (solution.rayleigh < 0).all()
    )  # Lanczos is CG until it has seen otherwise
    for task in range(3):
        basis = krylov_basis(matrix[task], b[task], steps)
        expected = basis @ torch.linalg.lstsq(
            matrix[task] @ basis, b[task].unsqueeze(-1)
        ).solution.squeeze(-1)
        assert relative_error(solution.value[task], expected) < 1e-11
    assert solution.products == operator.products == steps


def test_a_kept_basis_keeps_the_digits_that_cg_loses():
    """Eigenvalues 10/i² + 1e-3, n = 300, 60 products: round-off costs CG orders of magnitude, Lanczos none."""
    matrix = symmetric((10 / torch.arange(1, 301).double().square() + 1e-3).unsqueeze(0))
    b = randn(1, 300, seed=1)
    exact = torch.linalg.solve(matrix, b)
    cg, lanczos = (solver(60, 0.0).solve(Matrix(matrix), b) for solver in (CG, Lanczos))
    basis = krylov_basis(matrix[0], b[0], 60)
    best = basis @ torch.linalg.solve(basis.T @ matrix[0] @ basis, basis.T @ b[0])
    assert relative_error(lanczos.value[0], best) < 1e-8
    assert relative_error(lanczos.value, exact) < 0.01 * relative_error(cg.value, exact)


def test_lanczos_freezes_each_task_where_it_ends():
    matrix = symmetric(
        torch.stack(
            [torch.full((12,), 3.0), torch.cat([torch.ones(6), 5 * torch.ones(6)]), *SPECTRA[:1]]
        )
    )
    b = randn(3, 12, seed=6)
    solution = Lanczos(max_steps=30, tol=1e-10).solve(Matrix(matrix), b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) < 1e-9
    assert solution.needed[:2].tolist() == [1, 2]
    assert solution.needed[2] > 6
    assert solution.rayleigh.tolist() == pytest.approx([3.0, 1.0, 1.0], rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_preconditioner_changes_the_krylov_space(system, steps):
    """CG with P minimises over span{Pb, PAPb, …}: plain CG on P^½ A P^½, carried back."""
    matrix, b, _ = system
    p = symmetric(torch.stack([torch.linspace(0.5, 3, 12)] * 3), seed=5)
    solution = CG(max_steps=steps, tol=0.0).solve(
        Matrix(matrix), b, preconditioner=lambda r: (p @ r.unsqueeze(-1)).squeeze(-1)
    )
    for task in range(3):
        root = torch.linalg.cholesky(p[task])
        inner = krylov_minimiser(root.T @ matrix[task] @ root, root.T @ b[task], steps)
        assert relative_error(solution.value[task], root @ inner) < 1e-10


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_the_nystrom_preconditioner_is_its_formula(system, sketch):
    """P = (d_min + s) U (D + s)⁻¹ Uᵀ + I − U Uᵀ (Frangella et al. 2021, eq. 5.1)."""
    matrix, b, _ = system
    rows = Probes(sketch, 12, generator(1), b).rows(0, 4)
    y = matrix @ rows.mT
    values, vectors = torch.linalg.eigh(y @ torch.linalg.solve(rows @ y, y.mT))
    d, u = values[:, -4:], vectors[:, :, -4:]
    inner = (d[:, :1] + 0.7) / (d + 0.7) * (u.mT @ b.unsqueeze(-1)).squeeze(-1)
    expected = (
        (u @ inner.unsqueeze(-1)).squeeze(-1) + b - (u @ (u.mT @ b.unsqueeze(-1))).squeeze(-1)
    )
    got = LowRank.from_products(rows, y.mT).precondition(b, 0.7)
    for task in range(3):
        assert relative_error(got[task], expected[task]) < 1e-9


@pytest.mark.parametrize("terms", [1, 3])
def test_neumann_is_the_polynomial_of_exactly_k_terms(system, terms):
    matrix, b, _ = system
    operator = Matrix(matrix)
    solution = Neumann(terms=terms, scale=0.15).solve(operator, b)
    for task in range(3):
        assert (
            relative_error(
                solution.value[task], neumann_polynomial(matrix[task], b[task], terms, 0.15)
            )
            < 1e-13
        )
    assert solution.products == operator.products == terms
    assert solution.status.tolist() == [Status.MAX_STEPS] * 3


def test_neumann_chooses_a_scale_that_converges(system):
    matrix, b, exact = system
    solution = Neumann(terms=3000).solve(Matrix(matrix), b)
    assert relative_error(solution.value, exact) < 1e-8
    assert (
        solution.products == 3000 + Neumann().power_steps + 1
    )  # a residual this small is measured


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4, 5])
def test_nystrom_is_the_inverse_of_the_sampled_approximation(system, chunk, sketch):
    matrix, b, _ = system
    omega = Probes(sketch, 12, generator(4), b).rows(0, 5).mT
    if sketch == "columns":
        assert torch.equal(
            omega, torch.eye(12).double()[:, torch.randperm(12, generator=generator(4))[:5]]
        )
    y = matrix @ omega
    approximation = y @ torch.linalg.solve(omega.mT @ y, y.mT) + 0.3 * torch.eye(
        12, dtype=torch.float64
    )
    operator = Matrix(matrix)
    solution = Nystrom(rank=5, rho=0.3, chunk=chunk, sketch=sketch, generator=generator(4)).solve(
        operator, b
    )
    for task in range(3):
        assert (
            relative_error(solution.value[task], torch.linalg.solve(approximation[task], b[task]))
            < 1e-10
        )
    # the residual costs one; below k, every product is taken twice, and two more carry b in and the answer out
    assert solution.products == operator.products == (6 if chunk in (None, 5) else 13)


def test_nystrom_of_full_rank_is_the_shifted_inverse(system):
    matrix, b, _ = system
    solution = Nystrom(rank=12, rho=0.1).solve(Matrix(matrix), b)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(12, dtype=torch.float64), b)
    for task in range(3):
        assert relative_error(solution.value[task], expected[task]) < 1e-10


def test_nystrom_sketches_the_core_and_not_the_shift():
    # n = 300, eigenvalues decaying fast, σ = 2: sketching A itself overshoots 200 times (the norm tells)
    matrix = symmetric(5 * 0.8 ** torch.arange(300.0).unsqueeze(0))
    b = randn(1, 300, seed=1)
    operator = Matrix(matrix) + Identity(Matrix(matrix), 2.0)
    value = Nystrom(rank=10, generator=generator(0)).solve(operator, b).value
    exact = torch.linalg.solve(matrix + 2 * torch.eye(300, dtype=torch.float64), b)
    assert 0.8 < float(value.norm() / exact.norm()) < 1.25


def test_nystrom_survives_dead_columns():
    matrix = torch.zeros(1, 6, 6, dtype=torch.float64)
    matrix[:, :3, :3] = symmetric([[1.0, 2.0, 3.0]])
    b = randn(1, 6, seed=2)
    solution = Nystrom(rank=6, rho=0.5).solve(Matrix(matrix), b)
    expected = torch.linalg.solve(matrix + 0.5 * torch.eye(6, dtype=torch.float64), b)
    assert relative_error(solution.value, expected) < 1e-10


@pytest.mark.parametrize("solver", [CG(), Neumann(), Nystrom(rank=3), Dense()], ids=str)
def test_zero_right_hand_side_gives_zero(solver):
    b = torch.stack([torch.zeros(12), torch.ones(12)]).double()
    solution = solver.solve(Matrix(symmetric(torch.stack(SPECTRA[:2]))), b)
    assert solution.value[0].abs().max() == 0
    assert solution.residual[0] == 0
    assert solution.value[1].abs().max() > 0


@pytest.mark.parametrize(
    "solver",
    [
        CG(max_steps=3),
        Lanczos(3),
        MINRES(3),
        Neumann(terms=3, scale=0.1),
        Nystrom(rank=3, rho=1.0),
        Dense(),
    ],
    ids=str,
)
def test_the_reported_residual_is_the_true_one(system, solver):
    matrix, b = (
        system[0][:2],
        system[1][:2],
    )  # none solved in 3 steps, after which all would be measured
    solution = solver.solve(Matrix(matrix), b)
    true = (b - (matrix @ solution.value.unsqueeze(-1)).squeeze(-1)).norm(dim=-1) / b.norm(dim=-1)
    assert torch.allclose(solution.residual, true, rtol=1e-9, atol=1e-13)


def test_cg_stops_at_negative_curvature_and_keeps_its_best_iterate():
    indefinite = torch.linspace(-1, 10, 12)
    matrix = symmetric(torch.stack([indefinite, SPECTRA[0]]))
    b = randn(2, 12, seed=5)
    solution = CG(max_steps=30, tol=1e-12).solve(Matrix(matrix), b)
    assert solution.status.tolist() == [Status.NEGATIVE_CURVATURE, Status.CONVERGED]
    assert solution.rayleigh[0] <= 0 < solution.rayleigh[1]
    steps = int(solution.needed[0]) - 1  # the product that showed it moved nothing
    iterates = [
        torch.zeros(12).double(),
        *(krylov_minimiser(matrix[0], b[0], k + 1) for k in range(steps)),
    ]
    best = min(iterates, key=lambda x: float((b[0] - matrix[0] @ x).norm()))
    assert steps > 1
    assert best.norm() > 0
    assert relative_error(solution.value[0], best) < 1e-8


def test_cg_counts_what_each_task_needed():
    few, many = torch.full((12,), 3.0), SPECTRA[1]
    solution = CG(max_steps=30, tol=1e-10).solve(
        Matrix(symmetric(torch.stack([few, many]))), randn(2, 12, seed=6)
    )
    assert solution.needed[0] == 1
    assert 6 < solution.needed[1] <= solution.products


def test_dense_solves_indefinite_systems_and_flags_singular_ones():
    indefinite, singular = torch.linspace(-1, 10.5, 12), torch.linspace(0, 11, 12)
    matrix = symmetric(torch.stack([indefinite, singular]))
    b = randn(2, 12, seed=7)
    solution = Dense().solve(Matrix(matrix), b)
    assert relative_error(solution.value[0], torch.linalg.solve(matrix[0], b[0])) < 1e-10
    assert solution.status[0] == Status.CONVERGED
    assert float(solution.rayleigh[0]) == pytest.approx(-1.0)
    # to round-off the zero eigenvalue may pass Cholesky with a positive pivot; a clear zero must not pass unseen
    flat = torch.zeros(1, 4, 4, dtype=torch.float64)
    assert Dense().solve(Matrix(flat), torch.ones(1, 4).double()).status.tolist() == [
        Status.BREAKDOWN
    ]


def test_neumann_says_when_it_diverges(system):
    matrix, b, _ = system
    assert (
        Neumann(terms=20, scale=1.0).solve(Matrix(matrix), b).status.tolist()
        == [Status.BREAKDOWN] * 3
    )


@pytest.mark.parametrize("solver", [CG(), Neumann(), Nystrom(rank=3, rho=1.0), Dense()], ids=str)
def test_non_finite_numbers_are_flagged_in_their_task_alone(solver):
    matrix = symmetric(torch.stack(SPECTRA))
    b = randn(3, 12, seed=8)
    matrix[0, 2, 3] = torch.nan
    b[2, 1] = torch.inf
    status = solver.solve(Matrix(matrix), b).status.tolist()
    assert status[0] == status[2] == Status.NON_FINITE
    assert status[1] != Status.NON_FINITE


def test_bad_numbers_are_refused():
    operator = Matrix(symmetric([[1.0, 2.0]]))
    b = torch.ones(1, 2).double()
    with pytest.raises(ValueError, match=r"rank: got 3, expected at most n = 2"):
        Nystrom(rank=3).solve(operator, b)
    with pytest.raises(ValueError, match=r"got σ \+ ρ = 0.0, expected > 0"):
        Nystrom(rank=1, rho=0.0).solve(operator, b)
    with pytest.raises(
        ValueError, match=r"n = 2 adapted parameters, expected at most max_size = 1"
    ):
        Dense(max_size=1).solve(operator, b)
    with pytest.raises(ValueError, match=r"b: got shape \(2,\), expected \(1, 2\)"):
        CG().solve(operator, b[0])
    for make in (
        lambda: CG(max_steps=0),
        lambda: Neumann(terms=0),
        lambda: Neumann(scale=-1.0),
        lambda: Neumann(power_steps=0),
        lambda: Nystrom(rank=0),
        lambda: Nystrom(rho=-1.0),
        lambda: Nystrom(chunk=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_cg_claims_convergence_only_at_its_tolerance(system):
    matrix, b, _ = system
    residuals = [CG(max_steps=k, tol=0.0).solve(Matrix(matrix), b).residual for k in range(1, 9)]
    steps = next(k for k, r in enumerate(residuals, 1) if 0.01 < r[1] < 0.1)  # between tol and √tol
    solution = CG(max_steps=steps, tol=0.01).solve(Matrix(matrix), b)
    assert solution.status[1] == Status.MAX_STEPS


def test_cg_measures_a_small_residual_before_it_reports_it():
    """In float32 at condition 1e5 the recurrence falls below the tolerance while b − Ax does not."""
    matrix = symmetric(torch.logspace(-5, 0, 60).unsqueeze(0))
    b = randn(1, 60, seed=3).float()
    solution = CG(max_steps=600, tol=1e-6).solve(Matrix(matrix.float()), b)
    matrix = matrix.float().double()
    true = float(
        (b.double() - (matrix @ solution.value.double().unsqueeze(-1)).squeeze(-1)).norm()
        / b.norm()
    )
    assert true > 1e-5
    assert (
        float(solution.residual) > 0.1 * true
    )  # itself known to the round-off of A x alone; the recurrence says 1e-6
    assert solution.status.tolist() == [Status.MAX_STEPS]


def test_cg_leaves_when_every_task_is_done():
    assert (
        CG(max_steps=50)
        .solve(Matrix(3 * torch.eye(4).double().unsqueeze(0)), randn(1, 4, seed=1))
        .products
        == 2
    )
    flat = torch.zeros(1, 4, 4).double()
    assert CG().solve(Matrix(flat), torch.ones(1, 4).double()).status.tolist() == [
        Status.NEGATIVE_CURVATURE
    ]


def test_tiny_right_hand_sides_do_not_underflow():
    matrix = symmetric([[1.0, 2.0, 3.0]])
    b = randn(1, 3, seed=1)
    for solver in (CG(), Dense()):
        tiny = solver.solve(Matrix(matrix), 1e-200 * b).value
        assert relative_error(1e200 * tiny, torch.linalg.solve(matrix, b)) < 1e-6


def test_direct_solvers_count_the_product_of_the_residual():
    solution = Dense().solve(Matrix(symmetric([[1.0, 2.0, 3.0]])), randn(1, 3, seed=1))
    assert solution.products == 4
    assert solution.needed.tolist() == [4]


def test_neumann_tells_negative_curvature_and_a_blind_start():
    matrix = symmetric([[-1.0, 1.0, 2.0, 3.0]])
    vector = torch.linalg.eigh(matrix).eigenvectors[:, :, 0]
    status = Neumann(terms=3, scale=0.1).solve(Matrix(matrix), vector).status
    assert status.tolist() == [Status.NEGATIVE_CURVATURE]
    spiked = torch.diag_embed(torch.tensor([[1.0] * 9 + [10.0]])).double()
    b = torch.tensor([[1.0] * 9 + [1e-9]]).double()  # all but blind to the largest eigenvalue
    solution = Neumann(terms=60).solve(Matrix(spiked), b)
    assert relative_error(solution.value, b / torch.diagonal(spiked, dim1=1, dim2=2)) < 0.05


def test_nystrom_tells_what_it_cannot_do():
    indefinite = symmetric(torch.linspace(-3, 9.5, 12).unsqueeze(0))
    b = randn(1, 12, seed=4)
    assert Nystrom(rank=12, rho=0.1).solve(Matrix(indefinite), b).status.tolist() == [
        Status.NEGATIVE_CURVATURE
    ]
    hidden = torch.tensor(
        [[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64
    )  # eigenvalues 3 and −1, no negative column
    for chunk in (None, 1):
        status = (
            Nystrom(rank=2, rho=0.1, chunk=chunk)
            .solve(Matrix(hidden), torch.ones(1, 2).double())
            .status
        )
        assert status.tolist() == [Status.NEGATIVE_CURVATURE]
    steep = symmetric(torch.logspace(-3, 3, 12).unsqueeze(0))
    rough = Nystrom(rank=1, rho=1e-3).solve(Matrix(steep), b)
    assert rough.residual > 1
    assert rough.status.tolist() == [Status.BREAKDOWN]
    assert (Nystrom().damping(0.0), Nystrom().damping(2.0), Nystrom(rho=0.5).damping(2.0)) == (
        0.01,
        0.0,
        0.5,
    )


def test_dense_takes_the_symmetric_part():
    matrix = symmetric([[2.0, 3.0, 4.0]])
    is_asymmetric = matrix.clone()
    is_asymmetric[0, 0, 1] += 0.1
    b = randn(1, 3, seed=5)
    expected = torch.linalg.solve(0.5 * (is_asymmetric + is_asymmetric.mT), b)
    assert relative_error(Dense().solve(Matrix(is_asymmetric), b).value, expected) < 1e-13


@pytest.mark.parametrize(
    "solver", [CG(9), MINRES(9), Lanczos(9), Dense()], ids=lambda s: type(s).__name__
)
def test_an_operator_that_is_not_symmetric_is_noticed_in_its_task_alone(solver):
    matrix = symmetric(torch.stack(SPECTRA[:2]))
    matrix[1] = matrix[1] + 0.5 * torch.triu(randn(12, 12, seed=5), 1)
    solution = solver.solve(Matrix(matrix), randn(2, 12, seed=6))
    assert solution.status[1] == Status.BREAKDOWN
    assert solution.status[0] != Status.BREAKDOWN
    if not isinstance(solver, Dense):
        assert solution.needed[1] == 2  # where it shows, it ends


@pytest.mark.parametrize(
    "solver", [CG(20), MINRES(20), Lanczos(20)], ids=lambda s: type(s).__name__
)
def test_round_off_in_single_precision_is_no_asymmetry(solver):
    """Right-hand sides that are almost the eigenvector of a large eigenvalue: the second direction is mostly noise."""
    for rest, off in ((1e-3, 1e-4), (1e-3, 1e-5), (1e-2, 1e-5)):
        values = torch.cat([torch.ones(1), rest * torch.linspace(1, 2, 39)]).double().expand(20, -1)
        matrix = symmetric(values, seed=3)
        top = torch.linalg.eigh(matrix).eigenvectors[:, :, -1]
        b = (top + off * randn(20, 40, seed=4)).float()
        assert (solver.solve(Matrix(matrix.float()), b).status != Status.BREAKDOWN).all()


@pytest.mark.parametrize(
    ("solver", "kappa"), [(CG(30), 1e6), (Lanczos(30), 1e5), (MINRES(30), 3e4)], ids=str
)
def test_an_honest_system_at_the_end_of_single_precision_is_no_breakdown(solver, kappa):
    matrix = symmetric([[kappa, *torch.linspace(1, 2, 39).tolist()]])
    solution = solver.solve(Matrix(matrix.float()), randn(1, 40, seed=1).float())
    assert solution.status.tolist() == [Status.MAX_STEPS]
    assert solution.residual < 2e-2


def test_lanczos_reports_the_residual_it_has_where_definite_is_a_matter_of_round_off():
    b = randn(1, 60, seed=1)
    for steps in (30, 45):
        matrix = symmetric(torch.logspace(-7, 0, 60).unsqueeze(0)).float()
        solution = Lanczos(steps, tol=0.0).solve(Matrix(matrix), b.float())
        true = (
            b - (matrix.double() @ solution.value.double().unsqueeze(-1)).squeeze(-1)
        ).norm() / b.norm()
        assert float(solution.residual) == pytest.approx(float(true), rel=1e-2)


def test_a_task_that_needs_nothing_reports_nothing():
    b = torch.stack([torch.zeros(12), torch.ones(12)]).double()
    for solver in (CG(), Lanczos(), MINRES()):
        solution = solver.solve(Matrix(symmetric(torch.stack(SPECTRA[:2]))), b)
        assert solution.rayleigh[0] == torch.inf
        assert solution.needed[0] == 0
        assert solution.rayleigh[1] < 10


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("make", [Nystrom, NystromCG])
def test_an_infinite_entry_ends_its_task_alone(make, chunk):
    matrix = symmetric(torch.stack(SPECTRA)).float()
    matrix[1, 2, 2] = torch.inf
    options = {"chunk": chunk} if make is Nystrom else {}
    solution = make(rank=5, rho=0.1, sketch="gaussian", **options).solve(
        Matrix(matrix), randn(3, 12, seed=8).float()
    )
    assert solution.status[1] == Status.NON_FINITE
    assert solution.value[[0, 2]].isfinite().all()
    assert solution.status[0] != Status.NON_FINITE


def test_blocks_of_a_gaussian_sketch_add_up():
    """n beyond one block of float64 coordinates: streamed and one-shot agree, rayleigh quotients as well."""
    n = 2 * 2**14 + 3
    operator = Scales(torch.linspace(-1, 3, n, dtype=torch.float64))
    b = randn(1, n, seed=1)
    found = [
        Nystrom(rank=4, rho=0.5, sketch="gaussian", chunk=chunk, generator=generator(3)).solve(
            operator, b
        )
        for chunk in (None, 1, 2)
    ]
    for other in found[1:]:
        assert relative_error(other.value, found[0].value) < 1e-9
        assert other.status.tolist() == found[0].status.tolist()
        assert float(other.rayleigh) == pytest.approx(float(found[0].rayleigh), rel=1e-9)


class Scales(LinearOperator):
    """A diagonal matrix."""

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype, self.device = (1, len(values)), values.dtype, values.device

    def matvec(self, vector):
        return self.values * vector


def test_nystrom_takes_the_size_of_negative_eigenvalues():
    matrix = symmetric(torch.linspace(-3, 9.5, 12).unsqueeze(0))
    b, omega = randn(1, 12, seed=4), Probes("gaussian", 12, generator(4), matrix).rows(0, 5).mT
    y = matrix @ omega
    values, vectors = torch.linalg.eigh(y @ torch.linalg.solve(omega.mT @ y, y.mT))
    assert values[0, 0] < -0.1
    expected = vectors @ ((vectors.mT @ b.unsqueeze(-1)) / (values.abs() + 0.3).unsqueeze(-1))
    for chunk in (None, 2):
        solver = Nystrom(rank=5, rho=0.3, sketch="gaussian", chunk=chunk, generator=generator(4))
        assert relative_error(solver.solve(Matrix(matrix), b).value, expected.squeeze(-1)) < 1e-9


def test_lanczos_stops_at_the_residual_of_minres():
    """One indefinite task whose residual meets the tolerance before that of the other: it stays where it was."""
    matrix = symmetric(torch.stack([torch.tensor([-2.0, -1.0] + [1.0 + 0.01 * i for i in range(10)]).double(),
                                    torch.linspace(-4, 5, 12).double()]))  # fmt: skip
    b = randn(2, 12, seed=9)

    def least(task, k):
        basis = krylov_basis(matrix[task], b[task], k)
        y = torch.linalg.lstsq(matrix[task] @ basis, b[task].unsqueeze(-1)).solution.squeeze(-1)
        return basis @ y, float((b[task] - matrix[task] @ basis @ y).norm() / b[task].norm())

    solution = Lanczos(max_steps=8, tol=0.05).solve(Matrix(matrix), b)
    steps = next(k for k in range(1, 9) if least(0, k)[1] <= 0.05)
    assert steps < 8
    assert solution.needed[0] == steps
    assert relative_error(solution.value[0], least(0, steps)[0]) < 1e-9
    assert float(solution.residual[0]) == pytest.approx(least(0, steps)[1], rel=1e-9)
    assert solution.needed[1] == 8


@pytest.mark.parametrize("solver", [CG(), Neumann(), Nystrom(rank=3, rho=1.0), Dense()], ids=str)
def test_nothing_trains_on_a_non_finite_solve(solver):
    matrix = symmetric(torch.stack(SPECTRA))
    matrix[1, 0, 0] = torch.nan
    value = solver.solve(Matrix(matrix), randn(3, 12, seed=8)).value
    assert value[1].isnan().all()
    assert value[[0, 2]].isfinite().all()


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_sketch_beyond_the_rank_of_the_matrix_keeps_no_round_off(sketch, chunk):
    """In single precision, 10 columns of matrices of rank 3: seven directions are noise."""
    factors = randn(64, 3, 40, seed=1)
    matrix, b = factors.mT @ factors, randn(64, 40, seed=2)
    solver = Nystrom(rank=10, rho=0.1, sketch=sketch, chunk=chunk, generator=generator(1))
    solution = solver.solve(Matrix(matrix.float()), b.float())
    assert (solution.status != Status.NEGATIVE_CURVATURE).all()
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(40, dtype=torch.float64), b)
    assert relative_error(solution.value.double(), exact) < 1e-5
