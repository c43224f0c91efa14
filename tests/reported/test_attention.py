"""Attention calls a fused kernel without a second derivative, where torch's MATH kernel has one."""

import pytest
import torch
from reported.helpers import assert_same, draw
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaimplicit import GradientDescent, MetaLearner


class ScaledDotProduct(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(*x.chunk(3, dim=-1))


def meta_gradient(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), ScaledDotProduct(), nn.Flatten(), nn.Linear(12, 5))
    options = {"inner": GradientDescent(steps=2), "proximal": 1.0, "vectorize": "loop"}
    episodes = draw(tasks=1, examples=5, inputs=lambda *shape: torch.randn(*shape, 3, 4))
    MetaLearner(model, F.cross_entropy, method=method, **options).backward(episodes)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# One method for each matrix and each way to differentiate steps. Solvers do not call the model.
@pytest.mark.parametrize(
    "method",
    ["truncated", "real-time", "cg", "kfac", "diagonal", "soba", "fixed-point", "sama", "f2sa"],
)
def test_attention_has_the_numbers_of_the_math_kernel_under_every_method(method):
    with sdpa_kernel(SDPBackend.MATH):
        expected = meta_gradient(method)
    # The kernels may differ by round-off, which a solve amplifies.
    assert_same(meta_gradient(method), expected, rtol=1e-9)
