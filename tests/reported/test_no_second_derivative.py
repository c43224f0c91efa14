"""Operations that torch differentiates once at most: a refusal names them, and names what works."""

from dataclasses import replace

import pytest
import torch
from reported.helpers import INNER, assert_same, draw, refuses
from torch import nn
from torch.nn import functional as F

from metaimplicit import CG, FirstOrder, Implicit, MetaLearner, Unrolled
from metaimplicit.learner import vectorization

ONCE = "first-order|finite-differences"


class Bag(nn.Embedding):
    """nn.EmbeddingBag's mean, of operations with every derivative."""

    def forward(self, x):
        return super().forward(x).mean(-2)


def plain_margin(outputs, labels):
    """F.multi_margin_loss, Σ_{j ≠ y} max(0, 1 − z_y + z_j)/classes, with every derivative."""
    margins = 1 - outputs.gather(1, labels[:, None]) + outputs
    return (margins.relu().sum(1) - 1).mean() / outputs.shape[1]


def words():
    return draw(tasks=2, inputs=lambda *shape: torch.randint(0, 9, (*shape, 4)))


def margin(loss=F.multi_margin_loss):
    torch.manual_seed(0)
    return nn.Linear(4, 5), loss, draw(tasks=2)


def bag(layer=nn.EmbeddingBag):
    torch.manual_seed(0)
    return nn.Sequential(layer(9, 6), nn.Linear(6, 5)), F.cross_entropy, words()


def sparse():
    layers = nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(24, 5)
    return nn.Sequential(*layers), F.cross_entropy, words()


@pytest.mark.parametrize(
    ("case", "method", "patterns"),
    [
        pytest.param(margin, Unrolled(), ["multi_margin_loss", ONCE], id="margin loss"),
        pytest.param(bag, Unrolled(), ["[Ee]mbedding_?[Bb]ag", ONCE], id="EmbeddingBag"),
        pytest.param(sparse, Unrolled(), ["Embedding", "sparse=False"], id="sparse, unrolled"),
        pytest.param(sparse, FirstOrder(), ["Embedding", "sparse=False"], id="sparse, first-order"),
    ],
)
def test_an_operation_without_the_derivative_is_refused_with_a_remedy(
    case, method, patterns, real_clock, monkeypatch
):
    # With the clock of users, who do not see torch's warning of a missing batching rule.
    monkeypatch.setattr(vectorization, "_shortest_time", real_clock)
    model, loss, episodes = case()
    with refuses(*patterns):
        MetaLearner(model, loss, inner=INNER, method=method).backward(episodes)


def meta_gradient(method, case):
    model, loss, episodes = case
    # These operations have no batching rule, of which torch warns under vmap.
    options = {"inner": INNER, "proximal": 1.0, "vectorize": "loop"}
    MetaLearner(model, loss, method=method, **options).backward(episodes)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


twins = pytest.mark.parametrize(
    ("case", "twin"),
    [(margin, plain_margin), (bag, Bag)],
    ids=["margin loss", "EmbeddingBag"],
)


@twins
def test_first_order_has_the_meta_gradient_of_a_twin_with_every_derivative(case, twin):
    expected = meta_gradient(FirstOrder(), case(twin))
    assert_same(meta_gradient(FirstOrder(), case()), expected)


@twins
def test_finite_differences_have_the_meta_gradient_of_a_twin_with_every_derivative(case, twin):
    exact = Implicit(CG(max_steps=50, tol=1e-12), curvature="hessian")
    expected = meta_gradient(exact, case(twin))
    differences = replace(exact, products="finite-differences")
    # The differences are known to about 1e-9.
    assert_same(meta_gradient(differences, case()), expected, rtol=1e-7)
