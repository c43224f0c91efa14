"""Models that write to their inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import BilevelProblem, GradientDescent, MetaLearner, Tuner, hypergradient


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x -= 0.5
        return self.layer(x)


def batch():
    inputs = torch.randn(2, 6, 4)
    pair = (inputs, torch.arange(3).repeat(2).expand(2, -1))
    return {"support": pair, "query": (torch.randn(2, 6, 4), pair[1])}


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("method", ["unrolled", "first-order", "cg"])
def test_a_learner_says_so(method, vectorize):
    inner = GradientDescent(steps=3, lr=0.1)
    learner = MetaLearner(
        Centred(), F.cross_entropy, inner=inner, method=method, vectorize=vectorize
    )
    with pytest.raises(ValueError, match="in place, expected one that stays, as all evaluations"):
        learner.backward(batch())


IN_PLACE = "in place, expected one that stays, as all evaluations"


def test_evaluation_and_adaptation_say_so():
    learner = MetaLearner(Centred(), F.cross_entropy)
    episodes = batch()
    with pytest.raises(ValueError, match=IN_PLACE):
        learner.evaluate(episodes)
    with pytest.raises(ValueError, match=IN_PLACE):
        learner.adapt(episodes["support"], batched=True)


def loss(params, meta, data):
    data -= 1
    return (params["w"] - data).square().sum() + meta["phi"] * params["w"].square().sum()


PROBLEM = BilevelProblem(lambda meta, data: {"w": torch.zeros(3)}, loss, loss)
META = {"phi": torch.tensor(0.5)}


def test_a_hypergradient_and_a_tuner_say_so():
    inner = GradientDescent(steps=3, lr=0.1)
    with pytest.raises(ValueError, match=r"data: got a tensor of shape .* in place"):
        hypergradient(PROBLEM, META, torch.ones(3), inner=inner, method="unrolled")
    with pytest.raises(ValueError, match=r"train: got a tensor of shape .* in place"):
        Tuner(PROBLEM, META, inner=inner, method="unrolled").step(torch.ones(3), torch.ones(3))


def test_batches_that_serve_one_evaluation_may_change():
    tuner = Tuner(PROBLEM, META, inner=GradientDescent(steps=2, lr=0.1), method="unrolled")
    plain = BilevelProblem(
        PROBLEM.init,
        lambda params, meta, data: loss(params, meta, data.clone()),
        lambda params, meta, data: loss(params, meta, data.clone()),
    )
    other = Tuner(plain, META, inner=GradientDescent(steps=2, lr=0.1), method="unrolled")
    batches = list(torch.randn(3, 3))
    expected = other.step([b.clone() for b in batches], torch.ones(3))
    assert tuner.step(batches, torch.ones(3)).norm == pytest.approx(expected.norm, rel=1e-6)
