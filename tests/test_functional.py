"""Models that hold one layer under two names: they are called, trained and left as other models."""

import pytest
import torch
import torch.nn.functional as F
from oracles import randn
from torch import nn

from metaimplicit import GradientDescent, MetaLearner, Tuner, optim, tuning_problem
from metaimplicit.functional import functional_call
from metaimplicit.tuning import WeightDecay

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
EPISODES = (
    (randn(2, 6, 4, seed=0), LABELS.repeat(2, 1)),
    (randn(2, 6, 4, seed=1), LABELS.repeat(2, 1)),
)


class Twice(nn.Module):
    """One layer, called twice. It may be held under two names."""

    def __init__(self, has_two_names):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        if has_two_names:
            self.again = self.first
        self.last = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        again = getattr(self, "again", self.first)
        return self.last(again(self.first(x).tanh()).tanh())


def test_a_layer_of_two_names_is_replaced_once_and_put_back():
    model = Twice(True)
    weight = model.first.weight
    bias = torch.ones(4).double()
    expected = model.last((weight @ (weight @ EPISODES[0][0][0].T + 1).tanh() + 1).T.tanh())
    for name in ("first.bias", "again.bias"):
        called = functional_call(model, {name: bias}, (EPISODES[0][0][0],))
        torch.testing.assert_close(called, expected, rtol=1e-12, atol=0)
    assert model.first.weight is weight
    assert isinstance(model.again.bias, nn.Parameter)


@pytest.mark.parametrize(
    "options",
    [{"method": "unrolled"}, {"method": "cg"}, {"adapt": "last.*"}, {"head": "ridge"}],
    ids=str,
)
def test_a_learner_takes_the_steps_of_the_model_with_one_name(options):
    losses = []
    for has_two_names in (False, True):
        model = Twice(has_two_names)
        options = {"vectorize": "loop"} | options
        if "head" not in options:
            options["inner"] = GradientDescent(steps=2, lr=0.1)
        learner = MetaLearner(model, F.cross_entropy, **options)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(learner.backward(EPISODES).loss.double())
            optimizer.step()
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-10, atol=0)
    assert losses[2] < losses[0]


def test_a_tuning_problem_leaves_the_model_as_it_was():
    model = Twice(True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    problem, meta, domains = tuning_problem(model, F.cross_entropy, [WeightDecay()])
    inner = GradientDescent(steps=2, lr=0.2)
    batch = (EPISODES[0][0][0], LABELS)
    Tuner(problem, meta, domains=domains, inner=inner, method="unrolled").step(batch, batch)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("kind", [optim.GaussNewton, optim.NaturalGradient, optim.Newton])
def test_a_second_order_optimiser_takes_the_steps_of_the_model_with_one_name(kind):
    ends = []
    for has_two_names in (False, True):
        model = Twice(has_two_names)
        takes_loss = kind is optim.Newton
        optimizer = kind(model) if takes_loss else kind(model, F.cross_entropy)

        def closure(model=model, takes_loss=takes_loss):
            outputs = model(EPISODES[0][0][0])
            return F.cross_entropy(outputs, LABELS) if takes_loss else (outputs, LABELS)

        for _ in range(4):
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(ends[0], torch.cat([p.flatten() for p in Twice(False).parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-12)
