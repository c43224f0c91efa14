"""The hypergradient of two steps of gradient descent, as a plain loop in torch, and its parts."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from metaimplicit import GradientDescent, Stream, Tuner, hypergradient, tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightNetwork

STEPS = 2
LR = 0.3
M = 8  # examples
C = 3  # classes
INNER = GradientDescent(steps=STEPS, lr=LR)


def moved(meta):
    """φ at a random point, whose entries are learnt."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: (m + 0.3 * torch.rand(m.shape, generator=generator, dtype=m.dtype)).requires_grad_()
        for name, m in meta.items()
    }


def plain_hypergradient(model, meta, inner_loss, outer_loss):
    """g after the loop and dg/dφ.

    Args:
        inner_loss: f, `(params, meta) -> scalar`.
        outer_loss: g, `(params) -> scalar`.
    """
    params = dict(model.named_parameters())
    for _ in range(STEPS):
        loss = inner_loss(params, meta)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        pairs = zip(params.items(), gradients, strict=True)
        params = {name: p - LR * gradient for (name, p), gradient in pairs}
    outer = outer_loss(params)
    return outer.detach(), torch.autograd.grad(outer, list(meta.values()))


def assert_tunes(model, loss, variables, train, validation, *, inner_loss, outer_loss):
    """`hypergradient` and `Tuner` have the values of the plain loop, to round-off."""
    problem, meta, domains = tuning_problem(model, loss, variables)
    meta = moved(meta)
    value, expected = plain_hypergradient(model, meta, inner_loss, outer_loss)

    data = Stream(lambda t: train if t < STEPS else validation)
    result = hypergradient(problem, meta, data, inner=INNER, method="unrolled")
    assert_close(result.outer_loss, value, rtol=1e-11, atol=1e-13)
    # Elements far smaller than the gradient are differences of larger numbers.
    scale = max(gradient.abs().max().item() for gradient in expected)
    assert_close(list(result.grads.values()), list(expected), rtol=1e-11, atol=1e-12 * scale)
    assert scale > 1e-4

    tuner = Tuner(problem, meta, domains=domains, inner=INNER, method="forward")
    step = tuner.step(train, validation)
    assert_close(step.outer_loss, value.item(), rtol=1e-6, atol=0)


WEIGHTS = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)


def log_softmax(z, y):
    """−log p_y of one example by hand."""
    return z.logsumexp(0) - z[y]


Y = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])
IGNORED = torch.where(torch.arange(M) % 3 == 1, -100, Y)


def network_weight(meta, loss, scores=None):
    features = loss.detach()[None] if scores is None else torch.cat([loss.detach()[None], scores])
    hidden = torch.relu(meta["weight_network.in"] @ features + meta["weight_network.bias"])
    return 2 * torch.sigmoid(hidden @ meta["weight_network.out"] + meta["weight_network.shift"])


VARIABLES = {
    "classes": (ClassWeights(C), lambda meta, i, y, loss: meta["class_weights"][y]),
    "examples": (ExampleWeights(20), lambda meta, i, y, loss: meta["example_weights"][2 * i + 1]),
    "network": (WeightNetwork(5), lambda meta, i, y, loss: network_weight(meta, loss)),
    "network of classes": (
        WeightNetwork(5, classes=C),
        lambda meta, i, y, loss: network_weight(meta, loss, F.one_hot(y, C).double()),
    ),
}
INDEX = 2 * torch.arange(M) + 1


def draw(seed=0, outputs=C):
    torch.manual_seed(seed)
    return SimpleNamespace(
        model=nn.Linear(5, outputs).double(),
        x=torch.randn(M, 5, dtype=torch.float64),
        x_valid=torch.randn(M, 5, dtype=torch.float64),
    )


class Masked(nn.Module):
    """A user's module that leaves out a class, by an argument of forward."""

    def forward(self, z, y, reduction="mean"):
        losses = (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]) * (y != 1)
        return losses if reduction == "none" else losses.sum() / (y != 1).sum()
