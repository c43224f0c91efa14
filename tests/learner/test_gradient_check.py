"""`MetaLearner.check`: a learner's meta-gradient against finite differences, in float64."""

import re

import pytest
import torch
from learner.few_shot import INPUTS, WAYS, draw_episodes
from oracles import randn
from torch import nn
from torch.nn import functional as F

from metaimplicit import CG, Implicit, MetaLearner, NewtonCG

EXACT_CG = Implicit(CG(max_steps=60, tol=1e-12), curvature="hessian")


class HalvedGradient(torch.autograd.Function):
    """The identity, whose derivative is wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class Halving(nn.Module):
    def forward(self, x):
        return HalvedGradient.apply(x)


def new_model(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), *layers, nn.Linear(5, WAYS))


@pytest.mark.parametrize(
    "options",
    [
        {"learn": "lr"},
        {"adapt": "2.*"},
        {"head": "ridge"},
        {"method": EXACT_CG, "inner": NewtonCG(steps=12, tol=1e-12)},
    ],
    ids=["learnt step size", "last layer", "ridge", "cg"],
)
def test_a_learner_of_float32_is_checked_in_float64_and_left_alone(options):
    learner = MetaLearner(new_model(), F.cross_entropy, **options)
    before = {name: p.clone() for name, p in learner.named_parameters()}
    check = learner.check(draw_episodes())
    assert check.verdict == "Right: it agrees with finite differences."
    assert check.error < 1e-8
    for name, p in learner.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("layers", "method", "verdict"),
    [
        ([], "first-order", "Wrong by .* leaves out part of it; 'unrolled' is exact"),
        ([], EXACT_CG, "Wrong: the solve is fine, but θ_T is no stationary point"),
        ([Halving()], "unrolled", "Wrong by .* look for what autograd does not see"),
    ],
    ids=["first-order", "five steps", "a wrong derivative"],
)
def test_the_verdict_says_what_is_wrong(layers, method, verdict):
    # This form of autograd.Function has no batching rule.
    learner = MetaLearner(new_model(*layers), F.cross_entropy, method=method, vectorize="loop")
    check = learner.check(draw_episodes())
    assert check.error > 1e-2
    assert re.match(verdict, check.verdict)


def test_random_models_and_tasks_of_several_sizes_are_refused():
    learner = MetaLearner(new_model(nn.Dropout()), F.cross_entropy)
    with pytest.raises(ValueError, match=r"got two values .*; fix the seed, or switch dropout off"):
        learner.check(draw_episodes())
    assert learner.eval().check(draw_episodes()).error < 1e-8
    tasks = [
        (
            (randn(m, INPUTS, seed=m), torch.arange(m) % WAYS),
            (randn(m, INPUTS, seed=9), torch.arange(m) % WAYS),
        )
        for m in (4, 8)
    ]
    with pytest.raises(ValueError, match="episodes: got tasks in 2 sizes, expected one size"):
        learner.check(tasks)
