"""Logistic regression whose example weights, decay, step size and momentum are learnt."""

import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit import BilevelProblem, FromMeta, GradientDescent

N = 4  # features
POINTS = 12  # in the training set and in the validation set
X = randn(POINTS, N, seed=1)
Y = (randn(POINTS, seed=2) > 0).double()
XV = randn(POINTS, N, seed=3)
YV = (randn(POINTS, seed=4) > 0).double()
POINT = (X, Y, XV, YV)
META = {
    "eta": torch.tensor(0.4, dtype=torch.float64),
    "mu": torch.tensor(0.6, dtype=torch.float64),
    "decay": torch.tensor(0.3, dtype=torch.float64),
    "weights": 1 + randn(POINTS, seed=5).tanh() / 2,
}
LOOP = GradientDescent(steps=15, lr=FromMeta("eta"), momentum=FromMeta("mu"))


def training_loss(params, meta, data):
    logits = data[0] @ params["w"]
    losses = F.binary_cross_entropy_with_logits(logits, data[1], reduction="none")
    decay = 0.5 * meta["decay"] * params["w"].square().sum()
    return (meta["weights"] * losses).mean() + decay


def validation_loss(params, meta, data):
    return F.binary_cross_entropy_with_logits(data[2] @ params["w"], data[3])


PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": torch.zeros(N, dtype=torch.float64)},
    inner_loss=training_loss,
    outer_loss=validation_loss,
)
