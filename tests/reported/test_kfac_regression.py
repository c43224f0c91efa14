"""K-FAC and the Fisher matrix of a regression take the likelihood of its loss."""

import pytest
import torch
from reported.helpers import assert_same
from torch import nn
from torch.nn import functional as F

from metaimplicit import Dense, GradientDescent, Implicit, Unrolled, hypergradient, tuning_problem
from metaimplicit.operators import Fisher
from metaimplicit.tuning import WeightDecay


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Implicit(Dense()), id="dense"),
        pytest.param(Unrolled(), id="unrolled"),
        "kfac",
        "ekfac",
        pytest.param(Implicit(Dense(), curvature=Fisher), id="Fisher"),
    ],
)
def test_the_curvature_of_one_linear_layer_and_one_datum_is_exact_for_mse_loss(method):
    model = nn.Linear(3, 1, bias=False)
    x = 2 * F.normalize(torch.randn(1, 3))
    y = torch.randn(1, 1)
    problem, meta, _ = tuning_problem(model, F.mse_loss, [WeightDecay(start=0.1)])

    # f = (xᵀw − y)² + λ/2 ‖w‖²:  A = 2 x xᵀ + λI,  w* = A⁻¹ 2 x y,  dw*/dλ = −A⁻¹ w*
    a = 2 * x.T @ x + 0.1 * torch.eye(3)
    w = torch.linalg.solve(a, 2 * x[0] * y[0, 0])
    right = 2 * (x[0] @ w - y[0, 0]) * (x[0] @ -torch.linalg.solve(a, w))

    inner = GradientDescent(steps=50, lr=0.1)
    grads = hypergradient(problem, meta, (x, y), inner=inner, method=method).grads
    assert_same(grads["weight_decay"], right, rtol=1e-9)  # xᵀw − y cancels three digits
