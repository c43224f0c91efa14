"""Derivatives of towers: by autograd through the update rules, by differences and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from tower_network import (
    LEVELS,
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
from metaimplicit.inner.optimizers import RULES
from metaimplicit.tuning import Real
from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam, AdamW, RMSProp

REAL = {"lr": Real(), "momentum": Real()}


def detached(slots):
    return {k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in slots.items()}


def autograd_trajectory(level, kind, steps, kappa):
    """Parameters and hyperparameters after each step of `level` under SGD(κ).

    The derivatives are those of autograd through torch's rule, one step deep.
    """
    model = network()
    rule = RULES[kind][0]
    defaults = kind([torch.zeros(())]).defaults
    params = {name: p.detach() for name, p in model.named_parameters()}
    constants = {
        name: torch.tensor(x, dtype=torch.float64) for name, x in level.initial_values.items()
    }
    free = {name: level.domain(name).free(constants[name]) for name in level.granularity}
    slots = {name: {} for name in params}
    trajectory = []
    for step in range(steps):
        if step > 0:  # `params` carry the graph of the step before
            slopes = torch.autograd.grad(loss(model, step, params), list(free.values()))
            pairs = zip(free.items(), slopes, strict=True)
            free = {name: x.detach() - kappa * slope for (name, x), slope in pairs}
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        gradients = torch.autograd.grad(loss(model, step, params), list(params.values()))
        free = {name: x.detach().requires_grad_() for name, x in free.items()}
        learnt_values = {name: level.domain(name).value(x) for name, x in free.items()}
        group = defaults | torch_options(level, constants | learnt_values)
        for (name, p), g in zip(list(params.items()), gradients, strict=True):
            slots[name] = detached(slots[name])
            params[name] = rule(group, slots[name], p.detach(), g.detach())
        trajectory.append({name: x.detach() for name, x in (params | learnt_values).items()})
    return trajectory


@pytest.mark.parametrize("name", LEVELS)
def test_hypergradients_are_those_of_autograd(name):
    """All hyperparameters are learnt at once, for ten steps, to round-off."""
    plain, kind = LEVELS[name]
    start = {name: x for name, x in plain.initial_values.items() if x != 0}
    level = replace(plain, optimizer=SGD(0.02), learn=tuple(start))
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), level)
    for step, expected in enumerate(autograd_trajectory(level, kind, 10, 0.02)):
        train(model, optimizer, 1, step)
        got = dict(model.named_parameters()) | learnt_values(optimizer)
        for key, value in expected.items():
            message = f"{key}, step {step}"
            assert_close(
                got[key].detach(),
                value,
                rtol=1e-11,
                atol=1e-13,
                msg=message,
            )
    for name, x in start.items():
        assert abs(math.log(float(learnt(optimizer, name)) / x)) > 1e-7, name


def test_a_hypergradient_is_the_difference_quotient_of_the_next_loss():
    """dℓ/dh of the first step, held against two runs that differ in h alone at that step."""
    plain = Adam(0.05, beta1=0.8, beta2=0.95, eps=0.02)
    values = plain.initial_values
    domains = {name: Real() for name in values}
    level = replace(
        plain,
        optimizer=SGD(1.0),
        learn=tuple(values),
        domains=domains,
    )
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), level)
    train(model, optimizer, 1)

    def next_loss(name, change):
        other = network()
        changed = Adam(**values | {name: values[name] + change})
        train(other, Hyperoptimizer(other.parameters(), changed), 1)
        return loss(other, 1).item()

    before = {name: x.item() for name, x in learnt_values(optimizer).items()}
    train(model, optimizer, 1, first=1)
    for name, x in learnt_values(optimizer).items():
        quotient = (next_loss(name, 1e-6) - next_loss(name, -1e-6)) / 2e-6
        assert before[name] - x.item() == pytest.approx(quotient, rel=1e-6, abs=1e-11), name


def test_three_levels_follow_their_recurrence():
    """With levels α, κ and ρ of SGD:

    w₁ = w₀ − α₀g₀;  α₁ = α₀ + κ₀ g₁·g₀;  w₂ = w₁ − α₁g₁;  κ₁ = κ₀ + ρ (g₂·g₁)(g₁·g₀);
    α₂ = α₁ + κ₁ g₂·g₁;  …
    """
    real = {"lr": Real()}
    tower = SGD(
        0.1,
        optimizer=SGD(0.01, optimizer=SGD(0.02), domains=real),
        domains=real,
    )
    w = parameter(1.0, -2.0, 0.5)
    optimizer = Hyperoptimizer([w], tower)
    spectrum = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    alpha = 0.1
    kappa = 0.01
    expected = w.detach().clone()
    gradients = []
    slopes = []
    for _ in range(6):
        g = spectrum * expected
        if gradients:
            slope = -(g @ gradients[-1]).item()  # dℓ/dα
            if slopes:
                kappa += 0.02 * slope * slopes[-1]
            alpha -= kappa * slope
            slopes.append(slope)
        expected = expected - alpha * g
        gradients.append(g)

        optimizer.zero_grad()
        (0.5 * spectrum * w * w).sum().backward()
        optimizer.step()
        assert_close(w.detach(), expected, rtol=1e-13, atol=1e-14)
    first, second, _ = optimizer.hyperparameters[0]
    assert first["lr"].item() == pytest.approx(alpha, rel=1e-13)
    assert second["lr"].item() == pytest.approx(kappa, rel=1e-13)
    assert kappa != 0.01


@pytest.mark.parametrize("granularity", ["per-tensor", "per-element"])
def test_step_sizes_of_tensors_and_elements_have_their_parts_of_the_inner_product(granularity):
    """dℓ/dlr = −g₁ ∘ u₀, summed over each tensor or not."""
    model = network()
    learn = {"lr": granularity}
    tower = Adam(
        0.01,
        optimizer=SGD(1e-3),
        learn=learn,
        domains={"lr": Real()},
    )
    optimizer = Hyperoptimizer(model.parameters(), tower)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    pairs = list(zip(model.parameters(), before, strict=True))
    minus_u = [(p.detach() - start) / 0.01 for p, start in pairs]
    train(model, optimizer, 1, first=1)

    products = [p.grad * d for p, d in zip(model.parameters(), minus_u, strict=True)]
    slopes = torch.cat([product.flatten() for product in products])
    if granularity == "per-tensor":
        slopes = torch.stack([product.sum() for product in products])
    expected = 0.01 - 1e-3 * slopes
    assert_close(learnt(optimizer), expected, rtol=1e-9, atol=1e-12)
    assert all((p - start).abs().min() > 0 for p, start in pairs)


@pytest.mark.parametrize("granularity", ["scalar", "per-tensor", "per-element"])
def test_a_single_tensor_has_step_sizes_of_each_granularity(granularity):
    """g = (1, 2) twice, so dℓ/dlr = (−1, −4), or −5 in all; lr becomes 0.1 − 0.01 dℓ/dlr."""
    p = parameter(1.0, 1.0)
    tower = SGD(
        0.1,
        optimizer=SGD(0.01),
        learn={"lr": granularity},
        domains={"lr": Real()},
    )
    optimizer = Hyperoptimizer([p], tower)
    gradient = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for _ in range(2):
        p.grad = gradient.clone()
        optimizer.step()
    second_lr = [0.11, 0.14] if granularity == "per-element" else [0.15, 0.15]
    lrs = 0.1 + torch.tensor(second_lr, dtype=torch.float64)
    assert_close(p.detach(), 1 - lrs * gradient)


def test_the_derivative_in_momentum_weighs_each_tensor_by_its_step_size():
    """lr becomes (0.2, 0.3); then dℓ/dμ = −Σ lrᵢ bᵢ gᵢ with b = (1, 2), g = 1."""
    tower = SGD(
        0.1,
        momentum=0.5,
        optimizer=SGD(0.1),
        learn={"lr": "per-tensor", "momentum": "scalar"},
        domains=REAL,
    )
    optimizer = Hyperoptimizer([parameter(1.0), parameter(1.0)], tower)
    step_with(optimizer, 1.0, 2.0)
    step_with(optimizer, 1.0, 1.0)
    assert learnt(optimizer).tolist() == pytest.approx([0.2, 0.3], rel=1e-12)
    step_with(optimizer, 1.0, 1.0)
    expected = 0.5 + 0.1 * (0.2 * 1 + 0.3 * 2)
    assert learnt(optimizer, "momentum").item() == pytest.approx(expected, rel=1e-12)


def test_the_derivative_is_in_the_values_that_made_the_step():
    """b = 1 before the second step of lr = 0.1, so dℓ/dμ = −0.1 · 1 · g. lr is 0.01 now."""
    tower = SGD(
        0.1,
        momentum=0.5,
        optimizer=SGD(1.0),
        learn=("momentum",),
        domains=REAL,
    )
    optimizer = Hyperoptimizer([parameter(1.0)], tower)
    step_with(optimizer, 1.0)
    step_with(optimizer, 2.0)
    optimizer.param_groups[0]["lr"] = 0.01
    step_with(optimizer, 3.0)
    assert learnt(optimizer, "momentum").item() == pytest.approx(0.5 + 0.1 * 3.0, rel=1e-12)


@pytest.mark.parametrize("tower", [SGD(0.1, momentum=0.9), Adam(0.1)], ids=lambda t: t.name)
def test_a_parameter_that_did_not_move_has_no_part_in_the_derivative(tower):
    """At the second step b has no gradient, so the third loss depends on lr through a alone.

    Its gradient in a is zero, so lr stays.
    """
    optimizer = Hyperoptimizer(
        [parameter(1.0, 2.0), parameter(3.0)], replace(tower, optimizer=SGD(1e-3))
    )
    step_with(optimizer, 1.0, 1.0)
    step_with(optimizer, 1.0, None)
    before = learnt_values(optimizer)
    step_with(optimizer, 0.0, 1.0)
    assert all(learnt(optimizer, name) == x for name, x in before.items())
    step_with(optimizer, 0.0, 1.0)
    assert learnt(optimizer) != before["lr"]


def test_clipped_gradients_are_those_of_the_derivative():
    model = network()
    tower = SGD(0.1, optimizer=SGD(1.0), domains={"lr": Real()})
    optimizer = Hyperoptimizer(model.parameters(), tower)
    clipped = []
    for step in range(2):
        optimizer.zero_grad()
        loss(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        clipped.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    expected = 0.1 + (clipped[0] @ clipped[1]).item()
    assert learnt(optimizer).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("level", [AdaGrad(), RMSProp(), Adam(), AdamW()], ids=lambda x: x.name)
def test_a_pullback_has_the_names_that_are_asked_for(level):
    values = {name: torch.tensor(x) for name, x in level.initial_values.items()}
    others = [name for name in values if name != "lr"]
    for name in others:
        slots = {}
        level.direction(values, slots, torch.ones(2), params=torch.ones(2))
        pulled = level.pull_back([name], values, slots, vector=torch.ones(2))
        assert set(pulled) == {name}
        assert level.pull_back([], values, slots, vector=torch.ones(2)) == {}
