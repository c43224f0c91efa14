"""LogSoftmax and then nll_loss are the same problem as logits and then cross-entropy."""

import pytest
import torch
from reported.helpers import assert_same, draw
from torch import nn
from torch.nn import functional as F

from metaimplicit import CG, Dense, GradientDescent, Implicit, MetaLearner


def meta_gradient(solver, tail, loss, episodes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), *tail)
    inner = GradientDescent(steps=15, lr=0.3)
    method = Implicit(solver, curvature="gauss-newton")
    learner = MetaLearner(model, loss, inner=inner, method=method, proximal=0.5, vectorize="vmap")
    learner.backward(episodes)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("loss", [F.nll_loss, nn.NLLLoss()], ids=["nll_loss", "NLLLoss"])
@pytest.mark.parametrize("solver", [CG(max_steps=50, tol=1e-12), Dense()], ids=["cg", "dense"])
def test_log_softmax_with_nll_loss_has_the_meta_gradient_of_cross_entropy(solver, loss):
    episodes = draw()
    expected = meta_gradient(solver, [], F.cross_entropy, episodes)
    got = meta_gradient(solver, [nn.LogSoftmax(dim=-1)], loss, episodes)
    assert_same(got, expected, rtol=1e-9)  # 15 inner steps, and a solve to a residual of 1e-12
