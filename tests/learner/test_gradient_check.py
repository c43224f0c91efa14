"""`MetaLearner.check`: a learner's meta-gradient against finite differences, in float64."""

import re

import pytest
import torch
from learner.few_shot import INPUTS, WAYS, draw_episodes
from oracles import randn
from torch import nn
from torch.nn import functional as F

from metaimplicit import CG, GradientDescent, Implicit, MetaLearner, NewtonCG
from metaimplicit.learner.double import in_float64

EXACT_CG = Implicit(CG(max_steps=60, tol=1e-12), curvature="hessian")
TWO_STEPS = GradientDescent(steps=2, lr=0.01)  # a check runs the loop dozens of times


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
        {"learn": "lr", "inner": TWO_STEPS},
        {"adapt": "2.*", "inner": TWO_STEPS},
        {"head": "ridge"},
        {"method": EXACT_CG, "inner": NewtonCG(steps=6, tol=1e-12), "proximal": 20.0},
    ],
    ids=["learnt step size", "last layer", "ridge", "cg"],
)
def test_a_learner_of_float32_is_checked_in_float64_and_left_alone(options):
    learner = MetaLearner(new_model(), F.cross_entropy, **options)
    before = {name: p.clone() for name, p in learner.named_parameters()}
    check = learner.check(draw_episodes(), directions=1)
    assert check.verdict == "Right: it agrees with finite differences."
    assert check.error < 1e-8
    for name, p in learner.named_parameters():
        assert p.grad is None
        assert p.dtype == torch.float32
        assert torch.equal(p, before[name])


@pytest.mark.parametrize(
    ("layers", "method", "verdict"),
    [
        ([], "first-order", "Wrong by .* leaves out part of it; 'unrolled' is exact"),
        ([], EXACT_CG, "Wrong: the solve is fine, but θ_T is no stationary point"),
        ([Halving()], "unrolled", "Wrong by .* look for what autograd does not see"),
    ],
    ids=["first-order", "two steps", "a wrong derivative"],
)
def test_the_verdict_says_what_is_wrong(layers, method, verdict):
    # This form of autograd.Function has no batching rule.
    learner = MetaLearner(
        new_model(*layers), F.cross_entropy, inner=TWO_STEPS, method=method, vectorize="loop"
    )
    check = learner.check(draw_episodes(), directions=1)
    assert check.error > 1e-2
    assert re.match(verdict, check.verdict)


def test_random_models_and_tasks_of_several_sizes_are_refused():
    learner = MetaLearner(new_model(nn.Dropout()), F.cross_entropy, inner=TWO_STEPS)
    with pytest.raises(ValueError, match=r"got two values .*; fix the seed, or switch dropout off"):
        learner.check(draw_episodes(), directions=1)
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


def test_tasks_with_different_numbers_of_classes_are_refused():
    """They are of one size, and their heads are not."""
    learner = MetaLearner(new_model(), F.cross_entropy, head="ridge")
    tasks = [
        (
            (randn(6, INPUTS, seed=1), torch.arange(6) % ways),
            (randn(6, INPUTS, seed=2), torch.arange(6) % ways),
        )
        for ways in (2, 3)
    ]
    with pytest.raises(ValueError, match="episodes: got tasks with different numbers of classes"):
        learner.check(tasks)


class Keeping(nn.Module):
    """Keeps what its first layer returns, with or without its graph."""

    def __init__(self, detached):
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 5), nn.Linear(5, WAYS)
        self.detached = detached

    def forward(self, x):
        features = self.first(x)
        self.kept = features.detach() if self.detached else features
        return self.last(features.tanh())


@pytest.mark.parametrize("detached", [True, False])
def test_a_loss_that_reads_the_model_reads_it_in_float64(detached):
    """After a forward pass, the model holds a tensor with a graph, which cannot be copied."""
    torch.manual_seed(0)
    model = Keeping(detached)

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + model.kept.square().mean()

    learner = MetaLearner(model, loss, inner=TWO_STEPS, vectorize="loop")
    model(torch.zeros(2, INPUTS))
    assert learner.check(draw_episodes(), directions=1).verdict.startswith(
        "Wrong" if detached else "Right"
    )


def in_float32(episodes):
    return {name: (pair[0].float(), pair[1]) for name, pair in vars(episodes).items()}


def test_nothing_is_left_of_a_check():
    learner = MetaLearner(
        new_model(), F.cross_entropy, inner=TWO_STEPS, method="nystrom", adapt="2.*"
    )
    learner.backward(in_float32(draw_episodes()))
    vectorize, gradient = learner.vectorize, learner.model[0].weight.grad.clone()
    storage, state = [p.data_ptr() for p in learner.parameters()], torch.get_rng_state()
    with torch.inference_mode():
        learner.check(draw_episodes(), directions=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.data_ptr() for p in learner.parameters()] == storage
    assert torch.equal(learner.model[0].weight.grad, gradient)
    assert learner.vectorize == vectorize
    learner.backward(in_float32(draw_episodes()))


def test_a_loss_that_holds_float32_is_told_so():
    weight = torch.ones(WAYS)
    learner = MetaLearner(new_model(), lambda z, y: F.cross_entropy(z, y, weight=weight))
    with pytest.raises(ValueError, match=r"check: it computes in float64.*`weight.to\(outputs\)`"):
        learner.check(draw_episodes(), directions=1)
    assert learner.model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_forward_passes_leave_in_a_model_is_put_back(dtype):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(INPUTS, WAYS)
            self.mean = torch.zeros(WAYS)

        def forward(self, x):
            z = super().forward(x)
            self.mean = z.detach().mean(0)
            return z

    model = Counting().to(dtype)
    mean = model.mean
    learner = MetaLearner(nn.Sequential(model), F.cross_entropy, inner=TWO_STEPS, vectorize="loop")
    learner.check(draw_episodes(), directions=1)
    assert model.mean is mean


def test_buffers_and_parameters_that_are_written_to_are_put_back():
    module = nn.Linear(2, 2).double()
    module.register_buffer("count", torch.tensor(0))
    with in_float64(module):
        module.count.add_(1)
        with torch.no_grad():
            module.weight.fill_(9.0)
        module.register_buffer("other", torch.ones(1))
    assert module.count == 0
    assert not (module.weight == 9).any()
    assert list(module.state_dict()) == ["weight", "bias", "count"]
