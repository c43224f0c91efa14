"""Towers in loops that are less than ideal: written numbers, gaps, resumption, bad input. One or two short tensors."""

import copy

import pytest
import torch
from torch import nn

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Box, Interval, Positive, Real
from metaimplicit.tuning.hyperoptimizers import SGD, Adam

LR = {"lr": Real()}
REAL = {"lr": Real(), "momentum": Real()}


def tensor(*numbers, dtype=torch.float64):
    return nn.Parameter(torch.tensor(numbers, dtype=dtype))


def step(optimizer, *gradients):
    """One step with these gradients, a number or None for each parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else torch.full_like(p, g)
    optimizer.step()


def learnt(optimizer, name="lr", group=0):
    return optimizer.hyperparameters[group][0][name]


def test_a_parameter_that_did_not_move_has_no_part_in_the_derivative():
    """b has no gradient at the second step, so the third loss depends on lr through a alone, and there it is flat."""
    for tower in (SGD(0.1, momentum=0.9), Adam(0.1)):
        a, b = tensor(1.0, 2.0), tensor(3.0)
        optimizer = Hyperoptimizer(
            [a, b], tower.__class__(**tower.initial_values, optimizer=SGD(1e-3))
        )
        step(optimizer, 1.0, 1.0)
        step(optimizer, 1.0, None)
        before, saved = optimizer.hyperparameters[0][0], copy.deepcopy(optimizer.state_dict())
        step(optimizer, 0.0, 1.0)
        assert all(learnt(optimizer, name) == x for name, x in before.items())
        optimizer.load_state_dict(saved)
        step(optimizer, 0.0, 1.0)
        assert all(learnt(optimizer, name) == x for name, x in before.items())
        step(optimizer, 0.0, 1.0)
        assert learnt(optimizer) != before["lr"]


def test_the_derivative_is_in_the_numbers_that_made_the_step():
    """b = 1 before the second step of lr = 0.1, so dℓ/dμ = −0.1 · 1 · g, whatever lr is written since."""
    optimizer = Hyperoptimizer(
        [tensor(1.0)], SGD(0.1, momentum=0.5, optimizer=SGD(1.0), learn=("momentum",), domains=REAL)
    )
    step(optimizer, 1.0)
    step(optimizer, 2.0)
    optimizer.param_groups[0]["lr"] = 0.01
    step(optimizer, 3.0)
    assert learnt(optimizer, "momentum").item() == pytest.approx(0.5 + 0.1 * 3.0, rel=1e-12)


def test_momentum_is_weighed_by_the_step_size_of_each_tensor():
    """lr becomes (0.2, 0.3); then dℓ/dμ = −Σ lrᵢ bᵢ gᵢ with b = (1, 2), g = 1."""
    tower = SGD(
        0.1,
        momentum=0.5,
        optimizer=SGD(0.1),
        learn={"lr": "per-tensor", "momentum": "scalar"},
        domains=REAL,
    )
    optimizer = Hyperoptimizer([tensor(1.0), tensor(1.0)], tower)
    step(optimizer, 1.0, 2.0)
    step(optimizer, 1.0, 1.0)
    assert learnt(optimizer).tolist() == pytest.approx([0.2, 0.3], rel=1e-12)
    step(optimizer, 1.0, 1.0)
    assert learnt(optimizer, "momentum").item() == pytest.approx(
        0.5 + 0.1 * (0.2 * 1 + 0.3 * 2), rel=1e-12
    )


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_it_may_be_learnt_from_zero_where_its_domain_has_a_zero(name):
    """Of the second step dℓ/dμ = −0.1 b g with b = 1, of the first dℓ/dλ = −0.1 θ g with θ = 1."""
    box = {name: Box(0.0, 0.99)}
    optimizer = Hyperoptimizer(
        [tensor(1.0)], SGD(0.1, optimizer=SGD(1.0), learn=(name,), domains=box)
    )
    expected = {"momentum": [0.0, 0.0, 0.1], "weight_decay": [0.0, 0.1]}[name]
    for value in expected:
        step(optimizer, 1.0)
        assert learnt(optimizer, name).item() == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize(
    "tower",
    [
        SGD(0.1),
        Adam(0.1),
        SGD(0.1, optimizer=SGD(1e-4)),
        Adam(0.1, optimizer=SGD(0.1), learn=("beta1",)),
        SGD(0.2, optimizer=SGD(0.1), domains={"lr": Interval(0.001, 0.5)}),
    ],
)
def test_a_scheduled_tower_goes_on_to_the_same_bits(tower):
    """Stopped just after the scheduler has written, whether lr is learnt or not; and so does a copy."""

    def built(p):
        optimizer = Hyperoptimizer([p], tower)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)

    def descend(p, optimizer):
        optimizer.zero_grad()
        (p**3).sum().backward()
        optimizer.step()

    p = tensor(1.0, 2.0)
    optimizer, scheduler = built(p)
    for _ in range(3):
        descend(p, optimizer)
        scheduler.step()
    q = tensor(*p.tolist())
    resumed, its = built(q)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its.load_state_dict(scheduler.state_dict())
    twin, other = copy.deepcopy((p, optimizer))
    descend(twin, other)
    for number in range(3):
        for each, stepping, schedule in ((p, optimizer, scheduler), (q, resumed, its)):
            descend(each, stepping)
            schedule.step()
        assert number > 0 or torch.equal(p, twin)
        assert torch.equal(p, q)
        assert torch.equal(
            *(torch.as_tensor(o.param_groups[0]["lr"]) for o in (optimizer, resumed))
        )


@pytest.mark.parametrize("size", ["scalar", "per-tensor", "per-element"])
def test_a_single_tensor_has_step_sizes_of_each_size(size):
    """g = (1, 2) twice, so dℓ/dlr = −1, −4, or −5 in all; lr = 0.1 + κ times that."""
    p = tensor(1.0, 1.0)
    optimizer = Hyperoptimizer([p], SGD(0.1, optimizer=SGD(0.01), learn={"lr": size}, domains=LR))
    for _ in range(2):
        p.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
        optimizer.step()
    lr = torch.tensor([0.11, 0.14] if size == "per-element" else [0.15, 0.15], dtype=torch.float64)
    torch.testing.assert_close(
        p.detach(), 1 - (0.1 + lr) * torch.tensor([1.0, 2.0], dtype=torch.float64)
    )


def test_what_is_written_is_what_is_told():
    optimizer = Hyperoptimizer(
        [tensor(1.0), tensor(1.0)], SGD(0.1, optimizer=SGD(0.1), learn={"lr": "per-tensor"})
    )
    optimizer.param_groups[0]["lr"] = 0.05
    assert learnt(optimizer).tolist() == [0.05, 0.05]
    step(optimizer, 1.0, 1.0)
    assert [p.item() for p in optimizer.param_groups[0]["params"]] == [0.95, 0.95]


def test_a_value_at_the_edge_of_its_domain_is_loaded_again():
    """A step size that came to 0 in round-off is no new input."""
    optimizer = Hyperoptimizer(
        [tensor(1.0)], SGD(0.1, optimizer=SGD(1e4), domains={"lr": Positive()})
    )
    step(optimizer, 1.0)
    step(optimizer, -1.0)
    assert learnt(optimizer) == 0
    other = Hyperoptimizer([tensor(1.0)], SGD(0.1, optimizer=SGD(1e4), domains={"lr": Positive()}))
    other.load_state_dict(optimizer.state_dict())
    assert learnt(other) == 0


def test_of_low_precision_parameters_the_numbers_are_single():
    """0.1 + 3e-5 is no number of bfloat16."""
    p = tensor(1.0, 2.0, 3.0, dtype=torch.bfloat16)
    optimizer = Hyperoptimizer([p], SGD(0.1, optimizer=SGD(1e-5)))
    step(optimizer, 1.0)
    step(optimizer, 1.0)
    assert learnt(optimizer).dtype == torch.float32
    assert learnt(optimizer).item() == pytest.approx(0.1 + 3e-5, abs=1e-8)


def test_an_average_of_slow_decay_keeps_its_digits():
    """v = (1 − β₂)g² at first, in single precision too: 20 steps of Adam at 1 − β₂ = 2⁻²⁰ against torch's."""
    beta2 = 1 - 2.0**-20
    p, q = tensor(1.0, dtype=torch.float32), tensor(1.0, dtype=torch.float32)
    ours, theirs = (
        Hyperoptimizer([p], Adam(0.01, beta2=beta2)),
        torch.optim.Adam([q], 0.01, betas=(0.9, beta2)),
    )
    for i in range(20):
        step(ours, 0.3 + 0.1 * (i % 3))
        step(theirs, 0.3 + 0.1 * (i % 3))
    assert p.item() == pytest.approx(q.item(), rel=1e-5)


def test_no_group_moves_where_one_fails():
    a, b = tensor(1.0), tensor(1.0)
    optimizer = Hyperoptimizer(
        [{"params": [a]}, {"params": [b]}], SGD(0.1, optimizer=SGD(1.0), domains=LR)
    )
    step(optimizer, 1.0, 1.0)
    before = a.item()
    with pytest.raises(
        FloatingPointError,
        match=r"SGD lr: got -0\.9 after 1 steps, expected a number in \[0, inf\)",
    ):
        step(optimizer, 1.0, -1.0)
    assert a.item() == before


def test_a_beta_of_one_is_an_error():
    tower = Adam(0.1, optimizer=SGD(1e3), learn=("beta1",), domains={"beta1": Box(0.0, 1.0)})
    optimizer = Hyperoptimizer([tensor(1.0)], tower)
    step(optimizer, 1.0)
    step(optimizer, -1.0)
    with pytest.raises(
        FloatingPointError, match=r"Adam beta1: got 1\.0 after 2 steps, expected .* in \[0, 1\)"
    ):
        step(optimizer, 1.0)
    for tower in (Adam(0.1), Adam(0.1, optimizer=SGD(0.1))):
        optimizer = Hyperoptimizer([tensor(1.0)], tower)
        optimizer.param_groups[0]["beta1"] = 1.0
        with pytest.raises(
            ValueError, match=r"Adam beta1: got 1\.0, expected a number in \[0, 1\)"
        ):
            step(optimizer, 1.0)
        optimizer.param_groups[0].update(beta1=0.9, lr=-0.1)
        with pytest.raises(ValueError, match=r"Adam lr: got -0\.1, expected a finite number ≥ 0"):
            step(optimizer, 1.0)


def test_a_failure_of_many_step_sizes_names_the_worst():
    tower = SGD(0.1, optimizer=SGD(1.0), learn={"lr": "per-element"}, domains=LR)
    p = nn.Parameter(torch.ones(1000, dtype=torch.float64))
    optimizer = Hyperoptimizer([p], tower)
    step(optimizer, 1.0)
    p.grad = torch.linspace(1.0, -2.0, 1000, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"SGD lr: got -1\.9 after") as error:
        optimizer.step()
    assert len(str(error.value)) < 300


def test_what_it_cannot_do_is_refused():
    optimizer = Hyperoptimizer([tensor(1.0)], SGD(0.1))
    with pytest.raises(ValueError, match=r"SGD lr: got -1\.0"):
        optimizer.add_param_group({"params": [tensor(1.0)], "lr": -1.0})
    with pytest.raises(
        ValueError,
        match=r"param group 1: got \['betas', 'maximize'\], expected some of the tower's own",
    ):
        optimizer.add_param_group({"params": [tensor(1.0)], "betas": (0.5, 0.6), "maximize": True})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(
        {"params": [tensor(1.0)], "momentum": 0.5, "name": "head", "maximize": False}
    )
    with pytest.raises(
        ValueError, match="param group 0: got parameters that are not real floating-point numbers"
    ):
        Hyperoptimizer([nn.Parameter(torch.ones(2, dtype=torch.complex64))], SGD(0.1))
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Hyperoptimizer(embedding.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="step: got a sparse gradient, expected dense ones"):
        optimizer.step()
