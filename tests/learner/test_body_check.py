"""What a body leaves elsewhere than in its output is found, and the whole model runs then."""

import pytest
import torch
import torch.nn.functional as F
from learner import plain_loop
from oracles import relative_error
from torch import nn

from metaimplicit import GradientDescent, MetaLearner

pytestmark = pytest.mark.usefixtures("float64")

STEPS, LR = 2, 0.3


class Store:
    """An object of the user's own, which is no module."""

    value = torch.ones(())


class Net(nn.Module):
    """Features of sequences, and a head on them. The loss may read `self.left`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        self.left = Store()

    def read(self):
        return self.left.value

    def encode(self, x):
        return self.body(x).tanh().mean(1)

    def forward(self, x):
        return self.head(self.encode(x))


class LeavesFeatures(Net):
    def forward(self, x):
        h = self.encode(x)
        self.left.value = h.square().mean()
        return self.head(h)


class LeavesPenaltyOfHead(Net):
    def forward(self, x):
        self.left.value = self.head.weight.square().sum()
        return super().forward(x)


class LeavesLength(Net):
    def forward(self, x):
        self.left.value = 1 / x.shape[1]
        return super().forward(x)


class ModulatedHead(nn.Linear):
    scale = None

    def forward(self, h):
        return super().forward(h * self.scale)


class Modulated(Net):
    """A small network makes numbers that the head reads."""

    def __init__(self):
        super().__init__()
        self.seed = nn.Parameter(torch.randn(2))
        self.modulator = nn.Linear(2, 4)
        self.head = ModulatedHead(4, 3)

    def forward(self, x):
        self.head.scale = self.modulator(self.seed).tanh()
        return super().forward(x)


class KeepsFeatures(Net):
    """A hook keeps them where no module sees them."""

    def __init__(self):
        super().__init__()
        kept = {}
        self.body.register_forward_hook(lambda module, args, h: kept.update(h=h))
        self.read = lambda: kept["h"].square().mean()


class KeepsPenaltyOfHead(Net):
    def __init__(self):
        super().__init__()
        kept = {}
        self.register_forward_hook(lambda model, *_: kept.update(w=model.head.weight))
        self.read = lambda: kept["w"].square().sum()


MODELS = {
    "features": LeavesFeatures,
    "penalty of the head": LeavesPenaltyOfHead,
    "length": LeavesLength,
    "modulated": Modulated,
    "features in a hook": KeepsFeatures,
    "penalty in a hook": KeepsPenaltyOfHead,
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) * (1 + 0.3 * model.read())

    return model, loss


def sequences(words, examples):
    return torch.randn(2, examples, words, 3), (torch.arange(examples) % 3).expand(2, -1)


def descend_in_head(loss, start):
    adapts = {name: p for name, p in start.items() if name.startswith("head")}
    iterates = plain_loop.descend(lambda p: loss(start | p), adapts, lambda *_: LR, STEPS)
    return [start | params for params in iterates]


@pytest.mark.parametrize("way", ["vmap", "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_the_meta_gradient_is_that_of_a_plain_loop(name, way):
    """The query set has longer sequences than the support set."""
    model, loss = make(name)
    data = sequences(5, 4), sequences(9, 5)
    tasks = list(zip(*[zip(*pair, strict=True) for pair in data], strict=True))
    losses, _, expected = plain_loop.plain_maml(model, loss, tasks, descend=descend_in_head)
    inner = GradientDescent(steps=STEPS, lr=LR)
    learner = MetaLearner(
        model, loss, adapt="head.*", inner=inner, method="unrolled", vectorize=way
    )
    step = learner.backward(data)
    assert step.report.features != "once"
    assert relative_error(step.loss, losses.mean()) < 1e-13
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert relative_error(p.grad, gradient) < 1e-11
    assert relative_error(learner.evaluate(data)[0][-1], losses) < 1e-13


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_a_loss_behind_a_fitted_head_may_read_what_the_body_leaves(way):
    """Ridge regression with λ = 30 and logits of 15 times its outputs, by a dense solve."""
    torch.manual_seed(0)
    left = Store()
    body = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh())
    body.register_forward_hook(lambda module, args, h: setattr(left, "value", h.norm()))

    def loss(outputs, targets):
        return F.cross_entropy(outputs / left.value, targets)

    labels = torch.arange(3).repeat(3, 2)
    support, query = (torch.randn(3, 6, 2, 3), labels), (torch.randn(3, 6, 2, 3), labels)
    query[0].mul_(torch.tensor([1.0, 4.0, 7.0])[:, None, None, None])
    learner = MetaLearner(body, loss, head="ridge", vectorize=way)
    step = learner.backward((support, query))

    losses = []
    for x, x_query, y in zip(support[0], query[0], labels, strict=True):
        rows = F.pad(body(x), (0, 1), value=1.0)
        gram = rows.mT @ rows + 30 * torch.eye(5)
        weight = torch.linalg.solve(gram, rows.mT @ F.one_hot(y, 3).double())
        losses.append(loss(15 * F.pad(body(x_query), (0, 1), value=1.0) @ weight, y))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(body.parameters()))
    losses = torch.stack(losses).detach()
    assert relative_error(step.loss, losses.mean()) < 1e-12
    for p, gradient in zip(body.parameters(), expected, strict=True):
        assert relative_error(p.grad, gradient) < 1e-10
    assert relative_error(learner.evaluate((support, query))[0][-1], losses) < 1e-12


def test_attributes_are_compared_where_random_numbers_forbid_to_compare_losses():
    torch.manual_seed(0)
    model = LeavesPenaltyOfHead()
    model.body = nn.Sequential(model.body, nn.Dropout(0.5))
    learner = MetaLearner(model, F.cross_entropy, adapt="head.*", inner=GradientDescent(steps=1))
    reason = learner.backward((sequences(5, 4), sequences(5, 4))).report.features
    assert reason == "a forward pass leaves what depends on parameters that adapt in 'left.value'"


@pytest.mark.parametrize("options", [{"adapt": "head.*"}, {"head": "ridge"}], ids=["last", "ridge"])
def test_a_body_that_leaves_nothing_is_evaluated_once(options):
    torch.manual_seed(0)
    model = Net() if "adapt" in options else nn.Sequential(nn.Flatten(), nn.Linear(15, 4))
    learner = MetaLearner(model, F.cross_entropy, inner=GradientDescent(steps=1), **options)
    assert learner.backward((sequences(5, 4), sequences(5, 4))).report.features == "once"
