"""Newton's method against dense matrices and minimisers over Krylov spaces."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    krylov_basis,
    krylov_minimiser,
    randn,
    relative_error,
    symmetric,
)
from second_order import (
    EXACT,
    LABELS,
    Point,
    X,
    dense_curvature,
    tanh_network,
    vector,
)
from torch import nn

from metaimplicit.optim import Newton
from metaimplicit.solvers import CG, MINRES, Dense


@pytest.mark.parametrize("solver", [None, EXACT, Dense()])
def test_one_step_solves_a_convex_quadratic(solver):
    A = symmetric([[0.5, 1.0, 3.0, 10.0, 40.0]])[0]
    b = randn(5, seed=3)
    model = Point(randn(5, seed=4))

    def loss():
        return 0.5 * model.x @ A @ model.x - b @ model.x

    before = loss().detach()
    g = (A @ model.x - b).detach()
    optimizer = Newton(model, damping=0.0, adapt_damping=False, solver=solver)
    value = optimizer.step(loss)
    assert value.dim() == 0
    assert not value.requires_grad
    assert float(value) == float(before)
    assert relative_error(model.x.grad, g) < 1e-14
    assert relative_error(model.x.detach(), torch.linalg.solve(A, b)) < 1e-10


@pytest.mark.parametrize("damping", [0.0, 0.7, 5.0])
def test_the_dense_step_replaces_eigenvalues_by_their_size_or_the_damping(damping):
    eigenvalues = [-3.0, -0.2, 0.0, 0.5, 2.0]
    A = symmetric([eigenvalues], seed=5)[0]
    basis = torch.linalg.qr(randn(1, 5, 5, seed=5)).Q[0]
    b = randn(5, seed=3)
    start = randn(5, seed=4)
    model = Point(start)
    optimizer = Newton(model, lr=0.3, damping=damping, adapt_damping=False)
    optimizer.step(lambda: 0.5 * model.x @ A @ model.x - b @ model.x)

    sizes = [max(abs(value), damping) for value in eigenvalues]
    # Nothing moves along an eigenvector whose eigenvalue and damping are zero.
    inverse = [1 / size if size > 0 else 0.0 for size in sizes]
    inverse = torch.tensor(inverse, dtype=torch.float64)
    step = basis @ (inverse * (basis.T @ (A @ start - b)))
    assert relative_error(model.x.detach(), start - 0.3 * step) < 1e-10


def test_newton_cg_is_the_last_krylov_minimiser_before_negative_curvature():
    A = symmetric([[-0.5, 0.2, 0.5, 2.0, 6.0, 7.0]], seed=5)[0]
    shifted = A + 0.1 * torch.eye(6).double()
    lengths = set()
    for seed in range(12):
        g = randn(6, seed=seed)
        model = Point(torch.zeros(6).double())
        solver = CG(max_steps=6, tol=1e-12)
        optimizer = Newton(model, damping=0.1, adapt_damping=False, solver=solver)
        optimizer.step(lambda model=model, g=g: g @ model.x + 0.5 * model.x @ A @ model.x)

        # A direction of CG has negative curvature as soon as the Krylov space has some.
        bases = [krylov_basis(shifted, g, k) for k in range(1, 7)]
        steps = sum(float(torch.linalg.eigvalsh(Q.T @ shifted @ Q)[0]) > 0 for Q in bases)
        steepest = g * (g @ g) / (g @ shifted @ g).abs()
        expected = -krylov_minimiser(shifted, g, steps) if steps else -steepest
        lengths.add(steps)
        assert relative_error(model.x.detach(), expected) < 1e-8
        assert float(model.x.detach() @ g) < 0
    assert len(lengths) >= 3
    assert 6 not in lengths


@pytest.mark.parametrize("solver", [CG(max_steps=6), MINRES(max_steps=6)])
def test_along_negative_curvature_the_step_is_steepest_descent(solver):
    """The gradient is the eigenvector of −0.5 + 0.1, so the step is g/0.4 downhill."""
    A = symmetric([[-0.5, 0.2, 0.5, 2.0, 6.0, 7.0]], seed=5)[0]
    g = torch.linalg.qr(randn(1, 6, 6, seed=5)).Q[0, :, 0]
    model = Point(torch.zeros(6).double())
    optimizer = Newton(model, damping=0.1, adapt_damping=False, solver=solver)
    optimizer.step(lambda: g @ model.x + 0.5 * model.x @ A @ model.x)
    assert relative_error(model.x.detach(), -g / 0.4) < 1e-10


def test_the_step_of_a_network_is_the_dense_one_with_either_solver():
    model = tanh_network()
    other = copy.deepcopy(model)
    start = vector(model)
    g, H = dense_curvature(model, F.cross_entropy, LABELS, "hessian")
    shift = 1.1 * float(torch.linalg.eigvalsh(H)[0].abs())

    by_products = Newton(other, damping=shift, adapt_damping=False, solver=EXACT)
    by_products.step(lambda: F.cross_entropy(other(X), LABELS))
    shifted = H + shift * torch.eye(len(g)).to(g)
    assert relative_error(vector(other), start - torch.linalg.solve(shifted, g)) < 1e-10

    dense = Newton(model, damping=shift, adapt_damping=False)
    dense.step(lambda: F.cross_entropy(model(X), LABELS))
    eigenvalues, Q = torch.linalg.eigh(H)
    step = Q @ ((Q.T @ g) / eigenvalues.abs().clamp(min=shift))
    assert relative_error(vector(model), start - step) < 1e-10


def test_large_models_have_an_iterative_solver():
    assert isinstance(Newton(nn.Linear(31, 32)).solver, Dense)
    assert Newton(nn.Linear(32, 32)).solver == CG(max_steps=50, tol=1e-3)
