"""Inputs that went wrong silently, or in torch's own words: they are right, or named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaimplicit import GradientDescent, MetaLearner

pytestmark = pytest.mark.usefixtures("float64")

TASKS = 2
M = 6
INNER = GradientDescent(steps=2, lr=0.1)


def own_loss(z, y):
    return (z - y).square().mean()


def draw(*shape):
    return torch.randn(TASKS, M, *shape)


def learn(outputs, targets, loss=own_loss, model=None, **options):
    model = nn.Linear(4, outputs) if model is None else model
    learner = MetaLearner(model, loss, inner=INNER, **options)
    return learner.backward(((draw(4), targets), (draw(4), targets)))


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze(-1)


BROADCAST = {
    "[m] with [m, m]": lambda: learn(M, draw()),
    "[m] with [m, 1]": lambda: learn(1, draw()),
    "[m, 1] with [m]": lambda: learn(1, draw(1), model=Squeezed(4, 1)),
    "[m, m] with [m]": lambda: learn(1, draw(M), model=Squeezed(4, 1)),
    "integers [m] with [m, 1]": lambda: learn(1, draw().long()),
    "torch's own, [m, 1] with [m, 3]": lambda: learn(3, draw(1), loss=F.mse_loss),
}
MEANT = {
    "one target for all outputs": lambda: learn(3, draw(1)),
    "one shape": lambda: learn(M, draw(M)),
    "aligned in the loss": lambda: learn(M, draw(), loss=lambda z, y: own_loss(z, y[:, None])),
    "pairs in the loss": lambda: learn(
        M, draw(), loss=lambda z, y: own_loss(z, y[:, None] - y[None])
    ),
    "weights of outputs": lambda: learn(
        M, {"y": draw(M), "w": draw()}, loss=lambda z, t: (t["w"] * (z - t["y"]).square()).mean()
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("case", BROADCAST)
def test_targets_whose_examples_meet_another_axis_are_refused(case):
    with pytest.raises(ValueError, match=r"support: got targets of shape .* which broadcast"):
        BROADCAST[case]()


@pytest.mark.parametrize("case", MEANT)
def test_what_a_loss_means_is_accepted(case):
    assert MEANT[case]().loss.isfinite()


class Prototypes(nn.Module):
    """As many outputs as there are candidates among the inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 3)

    def forward(self, x, candidates):
        return -(self.embed(x)[:, None] - self.embed(candidates)).square().sum(-1)


class Pointer(nn.Module):
    """Scores of the positions of a sequence, whose length differs between batches."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(4, 1)

    def forward(self, x):
        return self.score(x).squeeze(-1)


def prototypes(ways):
    return (draw(4), torch.randn(TASKS, ways, 4))


@pytest.mark.parametrize(
    ("model", "inputs"), [(Prototypes, prototypes), (Pointer, lambda ways: draw(ways, 4))]
)
def test_labels_are_checked_against_the_outputs_of_their_batch(model, inputs):
    learner = MetaLearner(model(), F.cross_entropy, inner=INNER)
    for ways in (5, 3, 7):
        labels = (torch.arange(M) % ways).expand(TASKS, -1)
        last = learner.backward(((inputs(ways), labels), (inputs(ways), labels)))
        assert 0 <= last.accuracy <= 1
        wrong = labels.clone()
        wrong[0, 0] = ways
        with pytest.raises(ValueError, match=f"labels: got {ways}, .* from 0 to {ways - 1}"):
            learner.backward(((inputs(ways), wrong), (inputs(ways), labels)))


LABELS = (torch.arange(M) % 5).expand(TASKS, -1)
NAMED = {
    "a query loss of two parts": (
        {"query_loss": lambda z, y: (F.cross_entropy(z, y), 0)},
        "query loss: got tuple, expected a scalar tensor; .* metric=",
    ),
    "a metric of several names": (
        {"metric": lambda z, y: {"accuracy": 1.0}},
        "metric: got dict, expected a number, or one for each example",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_a_function_may_not_return_is_named(name):
    options, message = NAMED[name]
    with pytest.raises(ValueError, match=message):
        learn(5, LABELS, loss=F.cross_entropy, **options)


@pytest.mark.parametrize("inputs", [lambda x: (x, x), lambda x: {"image": x}])
def test_inputs_that_the_model_does_not_take_are_named(inputs):
    episodes = ((inputs(draw(4)), LABELS), (inputs(draw(4)), LABELS))
    with pytest.raises(ValueError, match=r"model: got .*, but its forward .*two tasks are a list"):
        MetaLearner(nn.Linear(4, 5), F.cross_entropy).backward(episodes)


def test_two_tasks_in_a_tuple_are_told_from_two_tasks_in_a_list():
    task = ((torch.randn(M, 4), LABELS[0]), (torch.randn(M, 4), LABELS[0]))
    learner = MetaLearner(nn.Linear(4, 5), F.cross_entropy)
    with pytest.raises(ValueError, match=r"two tasks are a list, \[task, task\]"):
        learner.backward((task, task))
    assert learner.backward([task, task]).loss.isfinite()


def test_one_number_to_learn_may_be_a_string():
    logs = [
        list(MetaLearner(nn.Linear(4, 5), F.cross_entropy, learn=learn).learnt.by_name())
        for learn in ("lr", ["lr"])
    ]
    assert logs == [["log_lr"], ["log_lr"]]
    with pytest.raises(ValueError, match=r"learn: got \['l'\], expected some of"):
        MetaLearner(nn.Linear(4, 5), F.cross_entropy, learn="l")


class Hooked(nn.Module):
    """Registers a hook on a tensor, whether or not it requires grad."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        z = self.body(x)
        z.register_hook(lambda g: 2 * g)
        return self.head(z)


def test_a_model_that_needs_a_graph_is_called_with_one():
    model = Hooked()
    x = draw(4)
    inner = GradientDescent(steps=1, lr=0.1)
    learner = MetaLearner(model, F.cross_entropy, inner=inner, vectorize="loop")
    learner.backward(((x, LABELS), (x, LABELS)))

    meta = dict(model.named_parameters())
    losses = []
    for task in range(TASKS):
        f = F.cross_entropy(model(x[task]), LABELS[task])
        slopes = torch.autograd.grad(f, list(meta.values()), create_graph=True)
        theta = {n: p - 0.1 * g for (n, p), g in zip(meta.items(), slopes, strict=True)}
        z = torch.func.functional_call(model, theta, (x[task],))
        losses.append(F.cross_entropy(z, LABELS[task]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(meta.values()))
    for p, g in zip(meta.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
