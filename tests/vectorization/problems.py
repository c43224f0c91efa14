"""Problems of a network for `hypergradient`, whose data are (support, query)."""

import torch
from reported.helpers import cross_entropy
from torch import nn
from torch.nn import functional as F

from metaimplicit import BilevelProblem, Composite


def network(layer):
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), layer), nn.Linear(6, 5))


def problem_of(model):
    return BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=Composite(
            outputs=lambda params, meta, data: torch.func.functional_call(
                model, params, (data[0][0],)
            ),
            loss=lambda outputs, data: F.cross_entropy(outputs, data[0][1]),
            module=model,
        ),
        outer_loss=lambda params, meta, data: cross_entropy(model, params, data[1]),
    )


def meta_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}
