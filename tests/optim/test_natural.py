"""Gauss–Newton and the natural gradient against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from oracles import generator, randn, relative_error
from second_order import (
    CLASSES,
    EXACT,
    EXAMPLES,
    INPUTS,
    LABELS,
    TARGETS,
    X,
    dense_curvature,
    gradient_vector,
    half_square,
    per_example_gradients,
    tanh_network,
    vector,
)
from torch import nn

from metaimplicit.optim import GaussNewton, NaturalGradient, Newton


@pytest.mark.parametrize("solver", [None, EXACT])
@pytest.mark.parametrize(
    ("make", "loss", "targets", "kind"),
    [
        (GaussNewton, F.cross_entropy, LABELS, "gauss-newton"),
        (GaussNewton, F.mse_loss, TARGETS, "gauss-newton"),
        (NaturalGradient, F.cross_entropy, LABELS, "softmax"),
        (NaturalGradient, half_square, TARGETS, "gaussian"),
    ],
)
def test_the_step_is_the_dense_one(make, loss, targets, kind, solver):
    model = tanh_network()
    g, C = dense_curvature(model, loss, targets, kind)
    damped = C + 1e-2 * torch.eye(len(g)).to(g)
    expected = vector(model) - 0.7 * torch.linalg.solve(damped, g)
    options = {"likelihood": kind} if make is NaturalGradient else {}
    optimizer = make(
        model, loss, lr=0.7, damping=1e-2, adapt_damping=False, solver=solver, **options
    )
    value = loss(model(X), targets).detach()
    assert float(optimizer.step(lambda: (model(X), targets))) == float(value)
    assert relative_error(vector(model), expected) < 1e-9
    assert relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]), g) < 1e-13


@pytest.mark.parametrize("make", [GaussNewton, NaturalGradient])
def test_a_run_with_products_is_that_with_the_dense_solver(make):
    ends = []
    dampings = []
    for solver in (None, EXACT):
        model = tanh_network()
        optimizer = make(model, F.cross_entropy, solver=solver)
        for _ in range(3):
            optimizer.step(lambda model=model: (model(X), LABELS))
        ends.append(vector(model))
        dampings.append(optimizer.param_groups[0]["damping"])
    assert relative_error(*ends) < 1e-8
    assert dampings[0] == dampings[1]


def test_gauss_newton_solves_linear_least_squares_in_one_step_as_newton_does():
    def start():
        torch.manual_seed(0)
        return nn.Linear(INPUTS, CLASSES).double()

    one = start()
    gauss_newton = GaussNewton(one, half_square, damping=0.0, adapt_damping=False)
    gauss_newton.step(lambda: (one(X), TARGETS))
    two = start()
    newton = Newton(two, damping=0.0, adapt_damping=False)
    newton.step(lambda: half_square(two(X), TARGETS))
    design = torch.cat([X, torch.ones(EXAMPLES, 1).double()], 1)
    best = torch.linalg.lstsq(design, TARGETS).solution.T
    for model in (one, two):
        weights = torch.cat([model.weight, model.bias[:, None]], 1).detach()
        assert relative_error(weights, best) < 1e-10


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_gauss_newton_of_a_recurrent_network_is_the_dense_step():
    torch.manual_seed(0)
    model = Recurrent().double()
    inputs = randn(5, 4, 2, seed=3)
    targets = randn(5, 2, seed=4)
    J = torch.stack([gradient_vector(z, model) for z in model(inputs).flatten()])
    residual = (model(inputs) - targets).flatten().detach()
    damped = J.T @ J / 5 + 0.1 * torch.eye(J.shape[1]).double()
    expected = vector(model) - torch.linalg.solve(damped, J.T @ residual / 5)
    optimizer = GaussNewton(model, half_square, damping=0.1, adapt_damping=False)
    optimizer.step(lambda: (model(inputs), targets))
    assert relative_error(vector(model), expected) < 1e-10


class Reparametrised(nn.Module):
    """The network 3-2-4 with parameters θ = T φ, where φ is its one parameter.

    It is linear in its second layer, and its Fisher matrix has full rank.
    """

    def __init__(self, transform, theta):
        super().__init__()
        self.register_buffer("transform", transform)
        self.phi = nn.Parameter(torch.linalg.solve(transform, theta))

    def forward(self, x):
        theta = self.transform @ self.phi
        weight1, bias1, weight2, bias2 = torch.split(theta, [6, 2, 8, 4])
        hidden = torch.tanh(x @ weight1.reshape(3, 2) + bias1)
        return hidden @ weight2.reshape(2, 4) + bias2


def test_the_natural_gradient_does_not_depend_on_the_coordinates():
    theta = randn(20, seed=7)
    eye = torch.eye(20).double()
    inputs = 2 * randn(40, INPUTS, seed=8)
    targets = randn(40, CLASSES, seed=9)
    natural = []
    plain = []
    for transform in (eye, eye + 0.3 * randn(20, 20, seed=10)):
        model = Reparametrised(transform, theta)
        options = {"damping": 0.0, "adapt_damping": False, "likelihood": "gaussian"}
        optimizer = NaturalGradient(model, half_square, lr=0.5, **options)
        optimizer.step(lambda model=model: (model(inputs), targets))
        natural.append(model(inputs).detach())

        model = Reparametrised(transform, theta)
        half_square(model(inputs), targets).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        plain.append(model(inputs).detach())
    assert relative_error(*natural) < 1e-8
    assert relative_error(*plain) > 1e-2
    assert relative_error(natural[0], Reparametrised(eye, theta)(inputs).detach()) > 1e-2


def test_the_empirical_fisher_is_that_of_the_gradients_of_the_examples():
    model = tanh_network()
    rows = per_example_gradients(model, X, LABELS)
    fisher = rows.T @ rows / EXAMPLES + 0.1 * torch.eye(rows.shape[1]).double()
    expected = vector(model) - torch.linalg.solve(fisher, rows.mean(0))
    optimizer = NaturalGradient(
        model, F.cross_entropy, damping=0.1, adapt_damping=False, expectation="empirical"
    )
    optimizer.step(lambda: (model(X), LABELS))
    assert relative_error(vector(model), expected) < 1e-10


def test_every_step_draws_targets_of_its_own():
    model = tanh_network()
    random = generator(3)
    options = {"damping": 0.1, "adapt_damping": False, "expectation": "monte-carlo", "seed": 3}
    optimizer = NaturalGradient(model, F.cross_entropy, lr=0.3, **options)
    for _ in range(3):
        draws = generator(int(torch.randint(2**62, (), generator=random)))
        probabilities = model(X).detach().softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=draws)[:, 0]
        rows = per_example_gradients(model, X, labels)
        fisher = rows.T @ rows / EXAMPLES + 0.1 * torch.eye(rows.shape[1]).double()
        g = gradient_vector(F.cross_entropy(model(X), LABELS), model)
        expected = vector(model) - 0.3 * torch.linalg.solve(fisher, g)
        optimizer.step(lambda: (model(X), LABELS))
        assert relative_error(vector(model), expected) < 1e-10


def test_convexity_is_judged_in_the_type_of_tensors_that_the_loss_holds():
    """A loss with class weights in single precision accepts no outputs in double precision."""
    torch.manual_seed(0)
    x = 1000 * torch.randn(30, 6)
    y = torch.arange(30).remainder(4)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    start = vector(model)
    GaussNewton(model, weighted, damping=1e-6).step(lambda: (model(x), y))
    assert not torch.equal(vector(model), start)
    concave = GaussNewton(model, lambda z, y: -weighted(z, y), damping=1e-6)
    with pytest.raises(ValueError, match="GaussNewton loss: got one that is not convex"):
        concave.step(lambda: (model(x), y))


@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_a_concave_loss_is_refused_even_if_the_damping_outweighs_its_curvature(damping):
    model = tanh_network()
    concave = GaussNewton(model, lambda z, y: -F.mse_loss(z, y), damping=damping)
    message = "GaussNewton loss: got one that is not convex in the outputs; use Newton"
    with pytest.raises(ValueError, match=message):
        concave.step(lambda: (model(X), TARGETS))
