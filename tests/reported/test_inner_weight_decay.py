"""Weight decay of the inner optimiser moves θ*, so an implicit gradient has to include it."""

from types import SimpleNamespace

import pytest
import torch
from reported.helpers import assert_same
from torch import nn
from torch.nn import functional as F

from metaimplicit import (
    CG,
    BilevelProblem,
    Dense,
    Implicit,
    MetaLearner,
    Neumann,
    TorchOptimizer,
    Unrolled,
    check_hypergradient,
    hypergradient,
)

DECAY = 2.0
LAMBDA = 0.25  # the proximal strength
SGD = TorchOptimizer(torch.optim.SGD, steps=60, lr=0.25, weight_decay=DECAY)
MOMENTUM = TorchOptimizer(torch.optim.SGD, steps=60, lr=0.2, momentum=0.4, weight_decay=DECAY)
# With a large eps Adam converges linearly, to round-off.
ADAM = TorchOptimizer(
    torch.optim.Adam, steps=150, lr=0.15, betas=(0.5, 0.9), eps=0.5, weight_decay=DECAY
)


def regression():
    """f = ‖Xw − s y‖²/m, g = ‖X_v w − y_v‖²/m, m = 20, and dg/ds with weight decay in f."""
    x, x_val = torch.randn(2, 20, 3)
    y, y_val = torch.randn(2, 20)
    scale = torch.tensor(1.3)
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3)},
        inner_loss=lambda params, meta, data: F.mse_loss(x @ params["w"], meta["scale"] * y),
        outer_loss=lambda params, meta, data: F.mse_loss(x_val @ params["w"], y_val),
    )

    # A = 2 XᵀX/m + decay I,  w* = A⁻¹ 2 Xᵀ s y/m,  dw*/ds = A⁻¹ 2 Xᵀy/m
    slope = torch.linalg.solve(x.T @ x / 10 + DECAY * torch.eye(3), x.T @ y / 10)
    right = (x_val.T @ (x_val @ (scale * slope) - y_val) / 10) @ slope
    return problem, {"scale": scale}, right


@pytest.mark.parametrize(
    ("inner", "method"),
    [
        pytest.param(SGD, Unrolled(), id="unrolled"),
        pytest.param(SGD, Implicit(CG(max_steps=20, tol=1e-12)), id="cg"),
        pytest.param(SGD, Implicit(Dense()), id="dense"),
        pytest.param(SGD, Implicit(Neumann(terms=60)), id="neumann"),
        pytest.param(MOMENTUM, Implicit(Dense()), id="momentum"),
        pytest.param(ADAM, Implicit(Dense()), id="adam"),
    ],
)
def test_the_gradient_includes_the_inner_weight_decay(inner, method):
    problem, meta, right = regression()
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    assert_same(result.grads["scale"], right, rtol=1e-10)  # θ_T is θ* to round-off


@pytest.mark.slow
def test_the_check_finds_the_loop_with_weight_decay_stationary_and_the_gradient_right():
    problem, meta, _ = regression()
    check = check_hypergradient(
        problem, meta, None, inner=SGD, method=Implicit(Dense()), directions=1
    )
    assert check.inner_gradient_norm < 1e-10
    assert check.error < 1e-6  # the differences are known to about 1e-8


@pytest.mark.slow
def test_the_learner_includes_the_inner_weight_decay():
    x, x_query = torch.randn(2, 20, 3)
    y, y_query = torch.randn(2, 20, 1)
    model = nn.Linear(3, 1, bias=False)

    # f = ‖Xw − y‖²/m + decay/2 ‖w‖² + λ/2 ‖w − φ‖²:  w* = A⁻¹ (2 Xᵀy/m + λφ),  dw*/dφ = λ A⁻¹
    a = x.T @ x / 10 + (DECAY + LAMBDA) * torch.eye(3)
    w = torch.linalg.solve(a, x.T @ y / 10 + LAMBDA * model.weight.detach().T)
    right = LAMBDA * torch.linalg.solve(a, x_query.T @ (x_query @ w - y_query) / 10)

    episode = SimpleNamespace(support=(x[None], y[None]), query=(x_query[None], y_query[None]))
    learner = MetaLearner(model, F.mse_loss, inner=SGD, method=Implicit(Dense()), proximal=LAMBDA)
    learner.backward(episode)
    assert_same(model.weight.grad, right.T, rtol=1e-10)
