"""LogSoftmax and then nll_loss are the same problem as logits and then cross-entropy."""

import torch
from reported.helpers import assert_same, draw
from torch import nn
from torch.nn import functional as F

from metaimplicit import Dense, GradientDescent, Implicit, MetaLearner


def meta_gradient(tail, loss, episodes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), *tail)
    inner = GradientDescent(steps=2, lr=0.3)
    method = Implicit(Dense(), curvature="gauss-newton")
    learner = MetaLearner(model, loss, inner=inner, method=method, proximal=0.5, vectorize="vmap")
    learner.backward(episodes)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_log_softmax_with_nll_loss_has_the_meta_gradient_of_cross_entropy():
    episodes = draw()
    expected = meta_gradient([], F.cross_entropy, episodes)
    for loss in (F.nll_loss, nn.NLLLoss()):
        got = meta_gradient([nn.LogSoftmax(dim=-1)], loss, episodes)
        assert_same(got, expected, rtol=1e-9)  # a solve amplifies round-off
