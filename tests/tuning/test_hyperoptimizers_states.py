"""Towers that are stopped and resumed, copied, or given a state that is not theirs."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from tower_network import (
    TOWERS,
    learnt,
    learnt_values,
    loss,
    network,
    parameter,
    step_with,
    train,
)

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Interval, Positive
from metaimplicit.tuning.hyperoptimizers import SGD, Adam, AdamW, RMSProp


@pytest.mark.parametrize("name", TOWERS)
def test_a_stopped_tower_resumes_to_the_same_bits(name):
    straight = network()
    whole = Hyperoptimizer(straight.parameters(), TOWERS[name])
    train(straight, whole, 8)

    stopped = network()
    before = Hyperoptimizer(stopped.parameters(), TOWERS[name])
    train(stopped, before, 5)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)

    resumed = network()
    resumed.load_state_dict(stored["model"])
    after = Hyperoptimizer(resumed.parameters(), TOWERS[name])
    after.load_state_dict(stored["optimizer"])
    train(resumed, after, 3, first=5)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.hyperparameters[0], after.hyperparameters[0], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_within_inference_mode_is_that_outside(name):
    inside, outside = network(), network()
    expected = Hyperoptimizer(outside.parameters(), TOWERS[name])
    train(outside, expected, 4)

    with torch.inference_mode():
        optimizer = Hyperoptimizer(inside.parameters(), TOWERS[name])
    train(inside, optimizer, 1)
    for i in range(1, 4):
        optimizer.zero_grad()
        loss(inside, i).backward()
        with torch.inference_mode():
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    train(inside, optimizer, 2, first=4)
    train(outside, expected, 2, first=4)
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_towers_can_load_one_state_in_memory():
    """What is loaded is a copy, so the first to step does not move the other."""
    model = network()
    whole = Hyperoptimizer(model.parameters(), TOWERS["Adam/SGD"])
    train(model, whole, 3)
    state = whole.state_dict()
    copies = [network(), network()]
    resumed = [Hyperoptimizer(other.parameters(), TOWERS["Adam/SGD"]) for other in copies]
    for other, optimizer in zip(copies, resumed, strict=True):
        other.load_state_dict(model.state_dict())
        optimizer.load_state_dict(state)
    for other, optimizer in zip(copies, resumed, strict=True):
        train(other, optimizer, 3, first=3)
    for a, b in zip(*(other.parameters() for other in copies), strict=True):
        assert torch.equal(a, b)


def test_a_tower_can_return_to_its_own_state():
    """The parameter b has no gradient at the second step, which the state has to tell."""
    tower = replace(Adam(0.1), optimizer=SGD(1e-3))
    optimizer = Hyperoptimizer([parameter(1.0, 2.0), parameter(3.0)], tower)
    step_with(optimizer, 1.0, 1.0)
    step_with(optimizer, 1.0, None)
    before = learnt_values(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    step_with(optimizer, 0.0, 1.0)
    optimizer.load_state_dict(state)
    step_with(optimizer, 0.0, 1.0)
    assert all(learnt(optimizer, name) == x for name, x in before.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_continues_by_itself(copied):
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), TOWERS["Adam/SGD"])
    train(model, optimizer, 3)
    other, other_optimizer = copied((model, optimizer))
    train(model, optimizer, 3, first=3)
    train(other, other_optimizer, 3, first=3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(learnt(optimizer), learnt(other_optimizer))


SCHEDULED = {
    "constant SGD": SGD(0.1),
    "constant Adam": Adam(0.1),
    "learnt lr": SGD(0.1, optimizer=SGD(1e-4)),
    "learnt beta1": Adam(0.1, optimizer=SGD(0.1), learn=("beta1",)),
    "lr in an interval": SGD(0.2, optimizer=SGD(0.1), domains={"lr": Interval(0.001, 0.5)}),
}


@pytest.mark.parametrize("tower", SCHEDULED.values(), ids=SCHEDULED)
def test_a_tower_under_a_scheduler_resumes_to_the_same_bits(tower):
    """It is stopped, and copied, just after the scheduler has written."""

    def build(p):
        optimizer = Hyperoptimizer([p], tower)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)

    def descend(p, optimizer):
        optimizer.zero_grad()
        (p**3).sum().backward()
        optimizer.step()

    p = parameter(1.0, 2.0)
    optimizer, scheduler = build(p)
    for _ in range(3):
        descend(p, optimizer)
        scheduler.step()
    q = parameter(*p.tolist())
    resumed, resumed_scheduler = build(q)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    twin, twin_optimizer = copy.deepcopy((p, optimizer))
    descend(twin, twin_optimizer)
    for number in range(3):
        descend(p, optimizer)
        scheduler.step()
        descend(q, resumed)
        resumed_scheduler.step()
        if number == 0:
            assert torch.equal(p, twin)
        assert torch.equal(p, q)
        lrs = [torch.as_tensor(o.param_groups[0]["lr"]) for o in (optimizer, resumed)]
        assert torch.equal(*lrs)


def test_a_value_that_rounded_to_the_edge_of_its_domain_can_be_loaded():
    """lr = exp(z) underflowed to 0, which `Positive` would refuse as a new value."""
    tower = SGD(0.1, optimizer=SGD(1e4), domains={"lr": Positive()})
    optimizer = Hyperoptimizer([parameter(1.0)], tower)
    step_with(optimizer, 1.0)
    step_with(optimizer, -1.0)
    assert learnt(optimizer) == 0
    other = Hyperoptimizer([parameter(1.0)], tower)
    other.load_state_dict(optimizer.state_dict())
    assert learnt(other) == 0


def trained(tower, size=3):
    """A tower after two steps."""
    w = nn.Parameter(torch.ones(size))
    optimizer = Hyperoptimizer([w], tower)
    for _ in range(2):
        step_with(optimizer, 1.0)
    return optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SGD(optimizer=SGD()), "got a level Adam, expected SGD"),
        (AdamW(optimizer=SGD()), "got a level Adam, expected AdamW"),
        (Adam(optimizer=RMSProp()), "got a level SGD, expected RMSProp"),
        (Adam(optimizer=SGD(), learn=("lr",)), "got hyperparameters"),
        (Adam(optimizer=SGD(optimizer=SGD())), "a tower of another height"),
    ],
)
def test_the_state_of_another_tower_is_refused_and_changes_nothing(other, message):
    state = trained(Adam(optimizer=SGD())).state_dict()
    optimizer = trained(other)
    before = dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0] == before


def test_the_state_of_other_parameters_or_of_another_optimiser_is_refused():
    tower = Adam(optimizer=SGD())
    with pytest.raises(ValueError, match=r"got states of \[3\] numbers, expected 4"):
        trained(tower, size=4).load_state_dict(trained(tower).state_dict())
    adam = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="got 0 towers, expected 1"):
        trained(Adam()).load_state_dict(adam.state_dict())
