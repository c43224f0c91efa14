"""The algebra of operators on random cases, and what is shared by all curvatures."""

from functools import reduce

import pytest
import torch
from oracles import Matrix, dense, generator, randn, relative_error, symmetric
from small_classifier import PARAMS, SIZE, TASKS, loss_of, outputs, parts_of

from metaimplicit.operators import (
    CURVATURES,
    GGN,
    Curvature,
    Diagonal,
    Fisher,
    Hessian,
    Identity,
    Scaled,
    Sum,
    find_curvature,
)

N = 4
SEEDS = range(10)


def random_expression(seed, depth=3):
    """A random sum and multiple of operators, its matrix, and the σ that it shows."""
    choice = int(torch.randint(0 if depth else 2, 5, (), generator=generator(seed)))
    number = float(randn(1, seed=seed))
    if choice == 0:
        first = random_expression(7 * seed + 1, depth - 1)
        second = random_expression(7 * seed + 2, depth - 1)
        return tuple(a + b for a, b in zip(first, second, strict=True))
    if choice == 1:
        operator, matrix, sigma = random_expression(7 * seed + 3, depth - 1)
        return number * operator, number * matrix, number * sigma
    if choice == 2:
        matrix = number * torch.eye(N).double().expand(TASKS, N, N)
        return Identity(randn(TASKS, N, seed=0), number), matrix, number
    matrix = symmetric(randn(TASKS, N, seed=seed), seed=seed)
    if choice == 3:
        return Matrix(matrix), matrix, 0.0
    diagonal = Diagonal(Matrix(matrix), samples=None)
    return diagonal, torch.diag_embed(matrix.diagonal(dim1=1, dim2=2)), 0.0


OPERATORS = {
    "hessian": lambda: Hessian(parts_of("cross-entropy").total, PARAMS),
    "hessian, forward": lambda: Hessian(
        parts_of("cross-entropy").total, PARAMS, products="forward-over-reverse"
    ),
    "gauss-newton": lambda: GGN(outputs, loss_of("cross-entropy"), PARAMS),
    "fisher": lambda: Fisher(outputs, loss_of("cross-entropy"), PARAMS),
    "diagonal": lambda: Diagonal(GGN(outputs, loss_of("cross-entropy"), PARAMS)),
    "sum": lambda: OPERATORS["hessian"]() + 0.3 * OPERATORS["fisher"](),
} | {f"expression {seed}": lambda seed=seed: random_expression(seed)[0] for seed in SEEDS}
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)


# sums and multiples


@pytest.mark.parametrize("seed", SEEDS)
def test_an_expression_has_the_matrix_of_its_parts(seed):
    operator, matrix, _ = random_expression(seed)
    assert torch.allclose(dense(operator), matrix, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_split_finds_every_multiple_of_the_identity(seed):
    """A = B + σI."""
    operator, matrix, expected = random_expression(seed)
    core, sigma = operator.split()
    assert sigma == pytest.approx(expected, rel=1e-12, abs=1e-14)
    eye = torch.eye(N, dtype=torch.float64)
    assert torch.allclose(dense(core) + sigma * eye, matrix, rtol=1e-12, atol=1e-13)
    _, again = core.split()
    assert again == 0


def test_expressions_are_of_every_kind():
    kinds = {type(random_expression(seed)[0]) for seed in range(30)}
    assert kinds == {Matrix, Diagonal, Identity, Sum, Scaled}


def test_a_sum_adds_flags_and_counts():
    definite = Diagonal(Matrix(symmetric([[1.0, 2.0]])), samples=3, semidefinite=True)
    indefinite = Diagonal(Matrix(symmetric([[1.0, 2.0]])), samples=2)
    assert (definite + definite).semidefinite
    assert not (definite + indefinite).semidefinite
    assert (definite + indefinite).setup_products == 5


def test_a_multiple_has_the_flags_and_counts_of_its_operator():
    definite = Diagonal(Matrix(symmetric([[1.0, 2.0]])), samples=3, semidefinite=True)
    assert (2.0 * definite).semidefinite
    assert not (-2.0 * definite).semidefinite
    assert (2.0 * definite).setup_products == 3
    concave = GGN(outputs, lambda z: -z.square().mean((1, 2)), PARAMS)
    with pytest.raises(ValueError, match="not convex"):
        (2.0 * concave).check_convex()


def test_a_sum_checks_that_both_terms_are_convex():
    concave = GGN(outputs, lambda z: -z.square().mean((1, 2)), PARAMS)
    convex = GGN(outputs, lambda z: z.square().mean((1, 2)), PARAMS)
    (convex + convex).check_convex()
    for operator in (concave + convex, convex + concave):
        with pytest.raises(ValueError, match="not convex"):
            operator.check_convex()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"operator sum: got shapes \(1, 2\) and \(1, 3\)"):
        Matrix(symmetric([[1.0, 2.0]])) + Identity(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params: got an empty one, expected a dict of tensors by name"),
        ([torch.ones(1, 2)], "params: got list, expected a dict of tensors by name"),
        (torch.ones(2, 2), "params: got Tensor, expected a dict of tensors by name"),
        ({"w": torch.ones(1, 2) + 0j}, "params: got 'w' in torch.complex64, expected real"),
        ({"w": torch.ones(1, 2, dtype=torch.int64)}, "params: got 'w' in torch.int64, expected"),
        ({"w": torch.tensor(1.0)}, r"params: got 'w' of shape \(\), expected \[tasks, …\] with"),
        ({"w": torch.ones(0, 2)}, r"params: got 'w' of shape \(0, 2\), expected \[tasks, …\] with"),
        ({"w": torch.ones(2), "b": torch.ones(1)}, r"got 'b' of shape \(1,\), expected \[2, …\]"),
    ],
)
def test_what_is_no_point_is_refused(params, message):
    def loss(params):
        return torch.stack([p.flatten(1).square().sum(1) for p in params.values()]).sum(0)

    with pytest.raises(ValueError, match=message):
        Hessian(loss, params)
    with pytest.raises(ValueError, match=message):
        GGN(loss, lambda z: z.square(), params)


# what every operator is


@every_operator
def test_products_with_many_vectors_are_products_with_each(make):
    operator = make()
    vectors = randn(3, *operator.shape, seed=6)
    expected = torch.stack([operator.matvec(vector) for vector in vectors])
    assert torch.allclose(operator.matmat(vectors), expected, rtol=1e-11, atol=1e-13)


@every_operator
def test_columns_are_products_with_unit_vectors(make):
    operator = make()
    n = operator.shape[1]
    matrix = dense(operator).transpose(0, 1)
    index = torch.tensor([n - 1, 0, n // 2, 3, 1, n - 1])  # out of order, and one of them twice
    assert torch.allclose(operator.columns(index), matrix[index], rtol=1e-11, atol=1e-13)
    assert torch.allclose(operator.columns(index[2:3]), matrix[index[2:3]], rtol=1e-11, atol=1e-13)


@every_operator
def test_an_operator_is_symmetric_and_as_definite_as_it_says(make):
    operator = make()
    matrix = dense(operator)
    assert torch.allclose(matrix, matrix.mT, rtol=1e-10, atol=1e-12)
    if operator.semidefinite:
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_columns_of_a_network_cross_its_parameter_tensors():
    """Column 22 is in another tensor than 3; they come out of order."""
    sizes = [p[0].numel() for p in PARAMS.values()]
    assert sizes == [20, 5, 15, 1]
    operator = OPERATORS["gauss-newton"]()
    index = torch.tensor([SIZE - 1, 0, 22, 3, 21, SIZE - 1])
    expected = dense(operator).transpose(0, 1)[index]
    assert relative_error(operator.columns(index), expected) < 1e-12
    damped = 2.0 * (operator + Identity(operator, 0.5))
    units = torch.nn.functional.one_hot(index, SIZE)[:, None, :]
    assert relative_error(damped.columns(index), 2 * expected + units) < 1e-12


# curvatures of a loss


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Hessian, {}),
        (Hessian, {"products": "finite-differences"}),
        (GGN, {}),
        (Fisher, {"expectation": "empirical"}),
        (Diagonal, {"samples": None}),
    ],
)
def test_a_curvature_from_a_loss_is_that_of_the_constructor(kind, options):
    parts = parts_of("cross-entropy")
    operator = kind.from_loss(parts, **options)
    if kind is Hessian:
        expected = Hessian(parts.total, PARAMS, **options)
    elif kind is Diagonal:
        expected = Diagonal(GGN(parts.outputs, parts.loss, PARAMS), semidefinite=True, **options)
    else:
        expected = kind(parts.outputs, parts.loss, PARAMS, **options)
    v = randn(TASKS, SIZE, seed=6)
    assert torch.equal(operator.matvec(v), expected.matvec(v))
    assert operator.semidefinite == expected.semidefinite
    for name, gradient in operator.gradient.items():
        assert torch.equal(gradient, expected.gradient[name])


@pytest.mark.parametrize("flag", CURVATURES)
def test_a_flag_names_a_class_and_its_options(flag):
    kind, options = find_curvature(flag)
    assert issubclass(kind, Curvature)
    assert find_curvature(kind) == (kind, {})
    assert find_curvature(CURVATURES[flag]) == (kind, options)


@pytest.mark.parametrize("curvature", ["newton", int, None, Matrix])
def test_what_is_no_curvature_is_refused(curvature):
    message = "curvature: got .*, expected one of hessian, .*, or a class of curvature"
    with pytest.raises(ValueError, match=message):
        find_curvature(curvature)


def test_a_preconditioner_needs_an_inverse():
    parts = parts_of("cross-entropy")
    core = GGN.from_loss(parts)
    assert isinstance(Diagonal.preconditioner(core, parts), Diagonal)
    with pytest.raises(ValueError, match="preconditioner: got GGN, expected a curvature"):
        GGN.preconditioner(core, parts)


# the diagonal


def test_an_exact_diagonal_is_that_of_the_matrix():
    operator = OPERATORS["gauss-newton"]()
    diagonal = Diagonal(operator, samples=None)
    expected = dense(operator).diagonal(dim1=1, dim2=2)
    assert relative_error(diagonal.values, expected) < 1e-12
    assert diagonal.setup_products == SIZE
    for name, gradient in diagonal.gradient.items():
        assert torch.equal(gradient, operator.gradient[name])


def test_an_estimated_diagonal_is_the_mean_over_its_signs():
    operator = OPERATORS["gauss-newton"]()
    matrix = dense(operator)
    diagonal = Diagonal(operator, samples=4, generator=generator(3))
    signs = 1 - 2 * torch.randint(2, (4, 1, SIZE), generator=generator(3)).double()
    expected = reduce(torch.add, [s * (matrix @ s.T).squeeze(-1) for s in signs]) / 4
    assert relative_error(diagonal.values, expected) < 1e-12
    assert diagonal.setup_products == 4
    # Over all 2ⁿ sign vectors of a small matrix, the mean is the diagonal itself.
    small = symmetric([[1.0, 4.0, -2.0]])
    all_signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    mean = (all_signs * (all_signs @ small[0])).mean(0)
    assert relative_error(mean, small[0].diagonal()) < 1e-14


def test_a_diagonal_knows_its_inverse():
    diagonal = Diagonal(OPERATORS["gauss-newton"](), samples=4)
    v = randn(TASKS, SIZE, seed=6)
    expected = v / (diagonal.values.clamp(min=0) + 0.5)
    assert relative_error(diagonal.inverse(v, 0.5), expected) < 1e-15


def test_estimates_below_zero_are_zero_if_the_operator_is_semidefinite():
    indefinite = Matrix(symmetric([[-1.0, 2.0, -3.0]]))
    free = Diagonal(indefinite, samples=3, generator=generator(1)).values
    assert (free < 0).any()
    clamped = Diagonal(indefinite, samples=3, semidefinite=True, generator=generator(1)).values
    assert torch.equal(clamped, free.clamp(min=0))


def test_a_diagonal_needs_a_sample():
    with pytest.raises(ValueError, match="Diagonal samples: got 0, expected at least 1"):
        Diagonal(Matrix(symmetric([[1.0, 2.0]])), samples=0)
