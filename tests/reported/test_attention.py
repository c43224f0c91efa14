"""Attention calls a fused kernel without a second derivative, where torch's MATH kernel has one."""

import pytest
import torch
from reported.helpers import assert_learns, assert_same, draw, plain_maml, split
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaimplicit import CG, METHODS, GradientDescent, Implicit, MetaLearner


class MultiheadAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class ScaledDotProduct(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(*x.chunk(3, dim=-1))


KINDS = {
    "TransformerEncoderLayer": lambda: [
        nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=8, dropout=0.0, batch_first=True),
    ],
    "MultiheadAttention": lambda: [MultiheadAttention(4, 2, batch_first=True)],
    "ScaledDotProduct": lambda: [nn.Linear(4, 12), ScaledDotProduct()],
}


def network(kind):
    return nn.Sequential(*KINDS[kind](), nn.Flatten(), nn.Linear(12, 5))


def sequences():
    return draw(tasks=2, examples=5, inputs=lambda *shape: torch.randn(*shape, 3, 4))


@pytest.mark.parametrize("vectorize", ["loop", "vmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_has_the_meta_gradient_of_a_plain_loop(kind, vectorize):
    model = network(kind)
    episodes = sequences()
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain_maml(model, split(episodes))
    assert_learns(expected, model, episodes, vectorize=vectorize)


def meta_gradient(kind, method):
    torch.manual_seed(0)
    model = network(kind)
    options = {"inner": GradientDescent(steps=2), "proximal": 1.0, "vectorize": "loop"}
    MetaLearner(model, F.cross_entropy, method=method, **options).backward(sequences())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *[pytest.param(kind, Implicit(CG()), id=kind) for kind in KINDS],
        *[pytest.param("ScaledDotProduct", flag, id=flag) for flag in METHODS],
    ],
)
def test_attention_has_the_numbers_of_the_math_kernel_under_every_method(kind, method):
    with sdpa_kernel(SDPBackend.MATH):
        expected = meta_gradient(kind, method)
    # The kernels may differ by round-off, which a solve amplifies.
    assert_same(meta_gradient(kind, method), expected, rtol=1e-9)
