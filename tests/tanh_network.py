"""A small tanh network that adapts from a learnt initialisation, three tasks of it."""

import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit import CG, BilevelProblem, Composite, Implicit

TASKS, POINTS = 3, 6
X, Y = randn(TASKS, POINTS, 2, seed=10), randn(TASKS, POINTS, 1, seed=11)
XQ, YQ = randn(TASKS, POINTS, 2, seed=12), randn(TASKS, POINTS, 1, seed=13)
INITIAL = {
    "0.weight": randn(4, 2, seed=14),
    "0.bias": randn(4, seed=15),
    "2.weight": randn(1, 4, seed=16),
    "2.bias": randn(1, seed=17),
}


def forward(params, x):
    return F.linear(
        torch.tanh(F.linear(x, params["0.weight"], params["0.bias"])),
        params["2.weight"],
        params["2.bias"],
    )


def outer(params, meta, data):
    return F.mse_loss(forward(params, data[2]), data[3])


def network(penalty=None):
    return BilevelProblem(
        init=lambda meta, data: {name: meta[name] for name in INITIAL},
        inner_loss=Composite(
            outputs=lambda params, meta, data: forward(params, data[0]),
            loss=lambda z, data: F.mse_loss(z, data[1]),
            penalty=penalty,
        ),
        outer_loss=outer,
    )


DATA = (X, Y, XQ, YQ)
GAUSS_NEWTON = Implicit(CG(max_steps=10), curvature="gauss-newton")
