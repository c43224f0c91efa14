"""Logistic regression with learnt weights of its examples, decay, step size and momentum."""

import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit import BilevelProblem, FromMeta, GradientDescent

N, POINTS = 4, 12
X, Y = randn(POINTS, N, seed=1), (randn(POINTS, seed=2) > 0).double()
XV, YV = randn(POINTS, N, seed=3), (randn(POINTS, seed=4) > 0).double()
META = {
    "eta": torch.tensor(0.4, dtype=torch.float64),
    "mu": torch.tensor(0.6, dtype=torch.float64),
    "decay": torch.tensor(0.3, dtype=torch.float64),
    "weights": 1 + randn(POINTS, seed=5).tanh() / 2,
}
LOOP = GradientDescent(steps=15, lr=FromMeta("eta"), momentum=FromMeta("mu"))


def weighted(params, meta, data):
    losses = F.binary_cross_entropy_with_logits(data[0] @ params["w"], data[1], reduction="none")
    return (meta["weights"] * losses).mean() + 0.5 * meta["decay"] * params["w"].square().sum()


PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": torch.zeros(N, dtype=torch.float64)},
    inner_loss=weighted,
    outer_loss=lambda params, meta, data: F.binary_cross_entropy_with_logits(
        data[2] @ params["w"], data[3]
    ),
)
POINT = (X, Y, XV, YV)
