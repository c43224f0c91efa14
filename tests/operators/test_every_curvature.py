"""What holds for every curvature of `CURVATURES`. A new row is tested by all of it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import dense, randn, relative_error
from torch import nn

from metaimplicit import Dense, GradientDescent, Implicit, MetaLearner
from metaimplicit.methods import METHODS, options_of
from metaimplicit.operators import (
    CURVATURES,
    Invertible,
    LossParts,
    find_curvature,
    invertible_curvatures,
)

TASKS = 2
SHIFT = 0.7
INPUTS = randn(TASKS, 5, 3, seed=1)
LABELS = torch.arange(5).remainder(3).expand(TASKS, -1)

every_curvature = pytest.mark.parametrize("flag", CURVATURES)


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def make_parts(model, inputs, loss):
    """The loss of a model, at another point for each task."""

    def lift(function, params):
        def one_task(p, x):
            return function(lambda q: torch.func.functional_call(model, q, (x,)), p)

        return torch.vmap(one_task)(params, inputs)

    params = {
        name: torch.stack([p.detach() * factor for factor in (1.0, 1.5)])
        for name, p in model.named_parameters()
    }
    return LossParts(
        params=params,
        outputs=lambda params: lift(lambda call, p: call(p), params),
        loss=loss,
        module=model,
        apply_model=lift,
    )


def of_network(flag):
    """The curvature of the mean cross-entropy of a small network."""
    kind, options = find_curvature(flag)
    parts = make_parts(make_network(), INPUTS, lambda z: torch.vmap(F.cross_entropy)(z, LABELS))
    torch.manual_seed(0)
    return kind.from_loss(parts, **options)


def identity_like(matrix):
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)


@every_curvature
def test_a_curvature_is_one_symmetric_matrix_for_each_task(flag):
    operator = of_network(flag)
    matrix = dense(operator)
    n = operator.shape[1]
    assert matrix.shape == (TASKS, n, n)
    assert relative_error(matrix.mT, matrix) < 1e-12
    assert (matrix != 0).any((1, 2)).all()

    index = torch.tensor([n - 1, 0])
    assert relative_error(operator.columns(index), matrix[:, :, index].permute(2, 0, 1)) < 1e-12
    vectors = randn(4, TASKS, n, seed=3)
    products = torch.stack([operator.matvec(v) for v in vectors])
    assert relative_error(operator.matmat(vectors), products) < 1e-12
    assert relative_error(products, torch.einsum("tij,ktj->kti", matrix, vectors)) < 1e-12


@every_curvature
def test_a_curvature_that_says_it_is_semidefinite_is(flag):
    operator = of_network(flag)
    if operator.semidefinite:
        eigenvalues = torch.linalg.eigvalsh(dense(operator))
        assert eigenvalues.min() >= -1e-12 * eigenvalues.max()


@every_curvature
def test_a_curvature_of_least_squares_in_one_number_is_the_second_derivative(flag):
    """∂²/∂w² of the mean of ½(wx)², which is the mean of x²."""
    model = nn.Linear(1, 1, bias=False).double()
    x = randn(TASKS, 5, 1, seed=2)
    parts = make_parts(model, x, lambda z: 0.5 * z.square().mean((1, 2)))
    kind, options = find_curvature(flag)
    values = dense(kind.from_loss(parts, **options)).flatten()
    assert relative_error(values, x.square().mean((1, 2))) < 1e-12


@pytest.mark.parametrize("flag", invertible_curvatures())
def test_a_curvature_that_knows_its_inverse_inverts_its_own_products(flag):
    operator = of_network(flag)
    assert isinstance(operator, Invertible)
    assert operator.semidefinite  # else the shifted matrix need not have an inverse
    matrix = dense(operator)
    identity = identity_like(matrix)
    columns = [operator.inverse(column, SHIFT) for column in identity.unbind(-1)]
    inverse = torch.stack(columns, -1)
    assert relative_error(inverse @ (matrix + SHIFT * identity), identity) < 1e-10


@pytest.mark.parametrize("flag", invertible_curvatures())
def test_a_preconditioner_is_symmetric_and_positive_definite(flag):
    """Even of an indefinite matrix."""
    hessian = of_network("hessian")
    assert torch.linalg.eigvalsh(dense(hessian)).min() < -1e-3
    kind, options = find_curvature(flag)
    parts = make_parts(make_network(), INPUTS, lambda z: torch.vmap(F.cross_entropy)(z, LABELS))
    operator = kind.preconditioner(hessian, parts, **options)
    identity = identity_like(dense(hessian))
    columns = [operator.inverse(column, SHIFT) for column in identity.unbind(-1)]
    inverse = torch.stack(columns, -1)
    assert relative_error(inverse.mT, inverse) < 1e-12
    assert torch.linalg.eigvalsh(inverse).min() > 0


@every_curvature
def test_a_curvature_is_the_same_for_a_loop_and_vmap_over_tasks(flag):
    episodes = SimpleNamespace(support=(INPUTS, LABELS), query=(INPUTS.flip(1), LABELS.flip(1)))

    def gradient(vectorize):
        learner = MetaLearner(
            make_network(),
            F.cross_entropy,
            inner=GradientDescent(steps=2, lr=0.1),
            method=Implicit(Dense(), curvature=flag, damping=5.0),
            vectorize=vectorize,
        )
        torch.manual_seed(0)
        learner.backward(episodes)
        return torch.cat([p.grad.flatten() for p in learner.parameters()])

    assert relative_error(gradient("loop"), gradient("vmap")) < 1e-10


@every_curvature
def test_the_help_of_the_command_line_names_every_curvature(flag):
    """It is the text of the arguments of `Implicit`."""
    options = options_of(METHODS["cg"])
    names = ["curvature"] + ["preconditioner"] * (flag in invertible_curvatures())
    for name in names:
        assert f'`"{flag}"`' in options[name].help, (
            f"metaimplicit/methods/implicit.py: the text of `{name}` in the docstring of Implicit "
            f'lacks `"{flag}"`; say there what it is'
        )
