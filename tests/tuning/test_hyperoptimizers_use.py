"""Towers in training loops: as optimisers of torch, with groups, schedulers, devices, processes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from tower_network import (
    LEVELS,
    batch,
    learnt,
    learnt_values,
    loss,
    network,
    parameter,
    step_with,
    torch_options,
    train,
)

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import SGD, Adam, AdamW


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, {"rtol": 1e-12, "atol": 1e-13}),
        (torch.float32, {"rtol": 1e-6, "atol": 1e-6}),
    ],
    ids=["double", "single"],
)
@pytest.mark.parametrize("name", LEVELS)
def test_a_tower_of_one_level_is_torchs_optimiser(name, dtype, tolerance):
    level, kind = LEVELS[name]
    model = network(dtype)
    other = network(dtype)
    train(model, Hyperoptimizer(model.parameters(), level), 12)
    train(
        other,
        kind(other.parameters(), **torch_options(level, level.initial_values)),
        12,
    )
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(a, b, **tolerance)


def test_a_slow_average_keeps_its_digits_in_single_precision():
    """v = (1 − β₂)g² at first: 20 steps of Adam at 1 − β₂ = 2⁻²⁰ against torch's."""
    beta2 = 1 - 2.0**-20
    p = parameter(1.0, dtype=torch.float32)
    q = parameter(1.0, dtype=torch.float32)
    tower = Hyperoptimizer([p], Adam(0.01, beta2=beta2))
    adam = torch.optim.Adam([q], 0.01, betas=(0.9, beta2))
    for i in range(20):
        step_with(tower, 0.3 + 0.1 * (i % 3))
        step_with(adam, 0.3 + 0.1 * (i % 3))
    assert p.item() == pytest.approx(q.item(), rel=1e-5)


def test_low_precision_parameters_have_single_precision_hyperparameters():
    """0.1 + 3e-5 is not a number of bfloat16."""
    p = parameter(1.0, 2.0, 3.0, dtype=torch.bfloat16)
    optimizer = Hyperoptimizer([p], SGD(0.1, optimizer=SGD(1e-5)))
    step_with(optimizer, 1.0)
    step_with(optimizer, 1.0)
    assert learnt(optimizer).dtype == torch.float32
    assert learnt(optimizer).item() == pytest.approx(0.1 + 3e-5, abs=1e-8)


def test_it_is_an_optimiser_of_torch():
    """A closure is evaluated, parameters stay the same leaves, and the group shows the value."""
    model = network()
    params = list(model.parameters())
    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    assert isinstance(optimizer, torch.optim.Optimizer)

    def closure():
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        return value

    expected = loss(model, 0).item()
    assert optimizer.step(closure).item() == expected
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    assert all(p.is_leaf and p.grad.grad_fn is None for p in params)
    optimizer.step(closure)
    assert float(optimizer.param_groups[0]["lr"]) == learnt(optimizer).item() != 0.1


def test_two_groups_are_two_optimisers():
    tower = SGD(0.1, optimizer=SGD(0.3), learn=("lr",))
    together = network()
    apart = network()
    groups = [
        {"params": together[0].parameters()},
        {"params": together[2].parameters(), "lr": 0.02},
    ]
    pair = Hyperoptimizer(groups, tower)
    first = Hyperoptimizer(apart[0].parameters(), tower)
    second = Hyperoptimizer(apart[2].parameters(), SGD(0.02, optimizer=SGD(0.3)))
    for step in range(5):
        for model, optimizers in ((together, [pair]), (apart, [first, second])):
            model.zero_grad()
            loss(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)
    assert float(pair.param_groups[0]["lr"]) != float(pair.param_groups[1]["lr"])


@pytest.mark.parametrize(
    "tower", [SGD(0.1), SGD(0.1, optimizer=SGD(1e-9))], ids=["constant", "learnt"]
)
def test_values_that_a_scheduler_or_a_user_writes_take_effect(tower):
    model = network()
    other = network()
    optimizer = Hyperoptimizer(model.parameters(), tower)
    plain = torch.optim.SGD(other.parameters(), 0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (optimizer, plain)]
    for step in range(5):
        train(model, optimizer, 1, step)
        train(other, plain, 1, step)
        for schedule in schedules:
            schedule.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    optimizer.param_groups[0]["lr"] = 0.0625
    train(model, optimizer, 1)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0625, rel=1e-7)


def test_values_written_before_the_first_step_and_over_a_zero_take_effect():
    model = network()
    other = network()
    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(1e-9)))
    optimizer.param_groups[0].update(lr=0.05, momentum=0.5, weight_decay=0.2)
    plain = torch.optim.SGD(
        other.parameters(),
        0.05,
        momentum=0.5,
        weight_decay=0.2,
    )
    for step in range(3):
        train(model, optimizer, 1, step)
        train(other, plain, 1, step)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_one_written_step_size_serves_every_tensor():
    tower = SGD(0.1, optimizer=SGD(0.1), learn={"lr": "per-tensor"})
    optimizer = Hyperoptimizer([parameter(1.0), parameter(1.0)], tower)
    optimizer.param_groups[0]["lr"] = 0.05
    assert learnt(optimizer).tolist() == [0.05, 0.05]
    step_with(optimizer, 1.0, 1.0)
    assert [p.item() for p in optimizer.param_groups[0]["params"]] == [0.95, 0.95]


def test_parameters_without_a_gradient_stay_and_change_nothing_for_the_others():
    """One is frozen and one is not part of the loss. Weight decay does not move them either."""
    level = AdamW(0.01, optimizer=SGD(0.1))
    model = network()
    other = network()
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model[0].weight.requires_grad_(False)
    optimizer = Hyperoptimizer([*model.parameters(), spare], level)
    without = Hyperoptimizer(
        [p for name, p in other.named_parameters() if name != "0.weight"], level
    )
    train(model, optimizer, 4)
    train(other, without, 4)
    assert (spare == 1).all()
    assert torch.equal(model[0].weight, network()[0].weight)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if name != "0.weight":
            assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_no_graph_is_kept():
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), Adam(optimizer=SGD(0.1, optimizer=SGD(0.1))))
    train(model, optimizer, 3)
    slots = [x for tower in optimizer.state_dict()["towers"] for x in tower["slots"].values()]
    tensors = [x for x in slots if isinstance(x, torch.Tensor)]
    assert tensors
    assert all(x.grad_fn is None and not x.requires_grad for x in tensors)
    assert all(x.grad_fn is None for level in optimizer.hyperparameters[0] for x in level.values())


def test_everything_stays_on_its_device_and_no_step_waits_for_it():
    """A fake tensor has no value, so a step that read one would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        with torch.device("meta"):
            model = nn.Linear(3, 2)
            inputs = torch.empty(4, 3)
            targets = torch.empty(4, 2)
        optimizer = Hyperoptimizer(model.parameters(), Adam(optimizer=SGD(0.1)))
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        assert all(x.device.type == "meta" for x in learnt_values(optimizer).values())
        assert all(p.device.type == "meta" for p in model.parameters())


def _results(model, optimizer):
    return [p.detach().tolist() for p in model.parameters()] + [learnt(optimizer).item()]


def _train_replica(rank, results, address):
    torch.distributed.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=2,
    )
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = Hyperoptimizer(model.parameters(), Adam(0.01, optimizer=SGD(0.1)))
    for step in range(4):
        optimizer.zero_grad()
        inputs, targets = (x[8 * rank : 8 * rank + 8] for x in batch(step))
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    results[rank] = _results(model, optimizer)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_replicas_on_half_a_batch_each_learn_the_same_as_one_process(tmp_path):
    """DistributedDataParallel averages the gradients before the step."""
    manager = torch.multiprocessing.Manager()
    results = manager.dict()
    torch.multiprocessing.start_processes(
        _train_replica,
        (results, f"file://{tmp_path}/store"),
        nprocs=2,
        start_method="fork",
    )
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), Adam(0.01, optimizer=SGD(0.1)))
    train(model, optimizer, 4)
    assert results[0] == results[1]
    for a, b in zip(results[0], _results(model, optimizer), strict=True):
        assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-9)
