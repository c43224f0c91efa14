"""Models that write to their inputs."""

import warnings

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


# Where torch notices the write itself, its error becomes one that says what to do.
IN_PLACE = r"a forward pass writes to a tensor of shape .* in place"


def says_so():
    return pytest.raises((ValueError, RuntimeWarning), match=IN_PLACE)


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("method", ["unrolled", "first-order", "cg"])
def test_a_learner_says_so(method, vectorize):
    inner = GradientDescent(steps=3, lr=0.1)
    learner = MetaLearner(
        Centred(), F.cross_entropy, inner=inner, method=method, vectorize=vectorize
    )
    with says_so():
        learner.backward(batch())


def test_evaluation_and_adaptation_say_so():
    learner = MetaLearner(Centred(), F.cross_entropy)
    episodes = batch()
    with says_so():
        learner.evaluate(episodes)
    with says_so():
        learner.adapt(episodes["support"], batched=True)


def test_a_write_that_is_the_same_each_time_is_right():
    model = nn.Sequential(nn.Hardtanh(inplace=True), nn.Linear(4, 3))
    plain = nn.Sequential(nn.Hardtanh(), model[1])
    inner = GradientDescent(steps=3, lr=0.1)
    grads = []
    for net in (plain, model):
        torch.manual_seed(0)
        model.zero_grad()
        learner = MetaLearner(
            net, F.cross_entropy, inner=inner, method="first-order", vectorize="vmap"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.backward(batch())
        grads.append(model[1].weight.grad)
    assert torch.equal(*grads)


def loss(params, meta, data):
    data -= 1
    return (params["w"] - data).square().sum() + meta["phi"] * params["w"].square().sum()


PROBLEM = BilevelProblem(lambda meta, data: {"w": torch.zeros(3)}, loss, loss)
META = {"phi": torch.tensor(0.5)}


def test_a_hypergradient_and_a_tuner_say_so():
    inner = GradientDescent(steps=3, lr=0.1)
    with says_so():
        hypergradient(PROBLEM, META, torch.ones(3), inner=inner, method="unrolled")
    with says_so():
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
