"""`torch.utils.checkpoint` around layers that adapt."""

from contextlib import nullcontext
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import largest_error
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint as checkpoints

from metaimplicit import GradientDescent, MetaLearner, Tuner, tuning_problem
from metaimplicit.optim import GaussNewton
from metaimplicit.recomputation import NAMES
from metaimplicit.tuning import WeightDecay

again = partial(checkpoints.checkpoint, use_reentrant=False)


def sees_a_variable_without_a_value(net, x):
    def run(z):
        return net.layer(z) if net.training else shift

    if not net.training:
        shift = torch.zeros(5)
    return again(run, x)


# How a user hands a layer to `checkpoint`.
WAYS = {
    "plain": lambda net, x: net.layer(x),
    "a module": lambda net, x: again(net.layer, x),
    "a method": lambda net, x: again(net.layer.forward, x),
    "a function that sees it": lambda net, x: again(lambda z: net.layer(z), x),
    "a function that receives it": lambda net, x: again(lambda m, z: m(z), net.layer, x),
    "a partial function": lambda net, x: again(partial(lambda m, z: m(z), net.layer), x),
    "a function that sees an object that has it": lambda net, x: again(
        partial(lambda owner, z: owner.layer(z), SimpleNamespace(layer=net.layer)), x
    ),
    "a function that sees a variable without a value": sees_a_variable_without_a_value,
}


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = WAYS[way]
        self.layer = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.way(self, x))


def episodes():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 2, 6, 4, generator=generator)
    targets = torch.arange(3).repeat(2).expand(2, -1)
    return {"support": (inputs[0], targets), "query": (inputs[1], targets)}


def meta_gradient(way, method):
    net = Net(way)
    inner = GradientDescent(steps=2, lr=0.5)
    learner = MetaLearner(net, F.cross_entropy, inner=inner, method=method, vectorize="loop")
    loss = learner.backward(episodes()).loss
    after = learner.evaluate(episodes())[0][-1].mean()
    assert float(after) == pytest.approx(float(loss), rel=1e-12)
    return {name: p.grad for name, p in net.named_parameters()}


@cache
def without_checkpoints(method):
    return meta_gradient("plain", method)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("way", "method"),
    [
        *((way, "unrolled") for way in WAYS if way != "plain"),
        *(("a module", method) for method in ("first-order", "cg", "fixed-point")),
        ("a function that sees it", "cg"),
    ],
)
def test_the_meta_gradient_is_that_without_checkpoints(way, method):
    assert largest_error(meta_gradient(way, method), without_checkpoints(method)) < 1e-12


@pytest.mark.usefixtures("float64")
def test_a_tuner_takes_the_steps_that_it_takes_without_checkpoints():
    ends = []
    for way in ("plain", "a module"):
        problem, meta, domains = tuning_problem(Net(way), F.cross_entropy, [WeightDecay(start=0.1)])
        inner = GradientDescent(steps=2, lr=0.3)
        tuner = Tuner(problem, meta, domains=domains, inner=inner, method="cg")
        (x, y), (xq, yq) = ((part[0][0], part[1][0]) for part in episodes().values())
        for _ in range(2):
            tuner.step((x, y), (xq, yq))
        ends.append(tuner.params | tuner.meta)
    assert largest_error(ends[1], ends[0]) < 1e-12


def test_nothing_is_left_behind():
    before = [getattr(checkpoints, name, None) for name in NAMES]
    meta_gradient("a module", "unrolled")
    assert [getattr(checkpoints, name, None) for name in NAMES] == before


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_cache_of_parametrized_weights_is_not_used(vectorize):
    """It keeps a weight as it was when it was read first, whatever the parameters are since."""
    gradients = []
    outputs = []
    for block in (nullcontext(), parametrize.cached()):
        net = Net("plain")
        parametrizations.weight_norm(net.head)
        inner = GradientDescent(steps=2, lr=0.5)
        learner = MetaLearner(net, F.cross_entropy, inner=inner, vectorize=vectorize)
        (inputs, targets), (queries, _) = episodes().values()
        with block:
            weight = net.head.weight
            learner.backward(episodes())
            adapted = [learner.adapt((inputs[i], targets[i])) for i in range(2)]
            outputs.append({"outputs": torch.cat([adapted[i](queries[i]) for i in range(2)])})
            assert (net.head.weight is weight) == (len(outputs) == 2)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert largest_error(*gradients) < 1e-12
    assert largest_error(*outputs) < 1e-12


@pytest.mark.usefixtures("float64")
def test_an_optimizer_does_not_use_a_cache_of_parametrized_weights():
    ends = []
    for block in (nullcontext(), parametrize.cached()):
        net = Net("plain")
        parametrizations.weight_norm(net.head)
        optimizer = GaussNewton(net, F.cross_entropy)
        inputs, targets = (part[0] for part in episodes()["support"])
        with block:
            for _ in range(3):
                optimizer.step(lambda: (net(inputs), targets))  # noqa: B023  (it is called here)
        ends.append(net.state_dict())
    assert largest_error(*ends) < 1e-12
