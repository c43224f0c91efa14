"""Problems of one or two scalar parameters, in float64."""

import torch

from metaimplicit import BilevelProblem


def number(x):
    return torch.tensor(x, dtype=torch.float64)


def zero(meta, data):
    """An initialisation at w = 0."""
    return {"w": number(0.0)}


def scalar_problem(inner, outer, init=zero):
    """A problem of one parameter w, whose losses are functions of w and meta."""
    return BilevelProblem(
        init,
        lambda params, meta, data: inner(params["w"], meta),
        lambda params, meta, data: outer(params["w"], meta),
    )
