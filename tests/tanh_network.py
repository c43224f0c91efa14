"""A small tanh network that adapts from a learnt initialisation to three tasks."""

from functools import cache

import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit import CG, BilevelProblem, Composite, Implicit

TASKS = 3
POINTS = 6  # in the support set and in the query set of a task
X = randn(TASKS, POINTS, 2, seed=10)
Y = randn(TASKS, POINTS, 1, seed=11)
XQ = randn(TASKS, POINTS, 2, seed=12)
YQ = randn(TASKS, POINTS, 1, seed=13)
DATA = (X, Y, XQ, YQ)
INITIAL = {
    "0.weight": randn(4, 2, seed=14),
    "0.bias": randn(4, seed=15),
    "2.weight": randn(1, 4, seed=16),
    "2.bias": randn(1, seed=17),
}
GAUSS_NEWTON = Implicit(CG(max_steps=10), curvature="gauss-newton")


def forward(params, x):
    hidden = torch.tanh(F.linear(x, params["0.weight"], params["0.bias"]))
    return F.linear(hidden, params["2.weight"], params["2.bias"])


def outer(params, meta, data):
    return F.mse_loss(forward(params, data[2]), data[3])


@cache
def network(penalty=None):
    """A problem for all tests, since vmap is compared with a loop in the first calls with one."""
    return new_network(penalty)


def new_network(penalty=None):
    """The problem of one task, with a penalty in the inner loss if one is given."""
    return BilevelProblem(
        init=lambda meta, data: {name: meta[name] for name in INITIAL},
        inner_loss=Composite(
            outputs=lambda params, meta, data: forward(params, data[0]),
            loss=lambda z, data: F.mse_loss(z, data[1]),
            penalty=penalty,
        ),
        outer_loss=outer,
    )
