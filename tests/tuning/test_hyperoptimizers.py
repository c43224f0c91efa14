"""Towers against autograd through the update rules, difference quotients, plain optimisers, and themselves."""

import copy
import io
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metaimplicit import Hyperoptimizer
from metaimplicit.inner.rules import RULES
from metaimplicit.tuning import Positive, Real
from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam, AdamW, RMSProp

EVERYTHING = {  # level, and the torch optimiser whose rule it is
    "SGD": (SGD(0.05, momentum=0.8, weight_decay=0.03), torch.optim.SGD),
    "plain SGD": (SGD(0.05), torch.optim.SGD),
    "AdaGrad": (AdaGrad(0.05, eps=0.02, initial=0.1), torch.optim.Adagrad),
    "AdaGrad from 0": (AdaGrad(0.05, eps=0.02), torch.optim.Adagrad),
    "RMSProp": (RMSProp(0.01, alpha=0.9, eps=0.02), torch.optim.RMSprop),
    "Adam": (Adam(0.01, beta1=0.8, beta2=0.95, eps=0.02), torch.optim.Adam),
    "AdamW": (AdamW(0.01, beta1=0.8, beta2=0.95, eps=0.02, weight_decay=0.03), torch.optim.AdamW),
}


def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(step, dtype=torch.float64):
    draws = torch.Generator().manual_seed(step)
    return torch.randn(16, 5, generator=draws, dtype=dtype), torch.randint(
        3, (16,), generator=draws
    )


def loss(model, step, params=None):
    inputs, targets = batch(step, next(model.parameters()).dtype)
    return F.cross_entropy(functional_call(model, params or {}, (inputs,)), targets)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def options(level, numbers):
    """The keyword arguments of torch's optimiser for the numbers of ours."""
    found = dict(numbers)
    if isinstance(level, AdaGrad):
        found["initial_accumulator_value"] = level.initial
    if "beta1" in found:
        found["betas"] = (found.pop("beta1"), found.pop("beta2"))
    return found


def autograd_trajectory(level, kind, steps, kappa):
    """Parameters and hyperparameters after `steps` of `level` under SGD(κ), by autograd through the rules."""
    model, rule = network(), RULES[kind][0]
    defaults = kind([torch.zeros(())]).defaults
    params = {name: p.detach() for name, p in model.named_parameters()}
    numbers = {
        name: torch.tensor(x, dtype=torch.float64) for name, x in level.initial_values.items()
    }
    free = {name: level.domain(name).free(numbers[name]) for name in level.granularity}
    slots = {name: {} for name in params}
    trace = []
    for step in range(steps):
        if step > 0:  # through the last step, whose graph hangs on `params`
            slopes = torch.autograd.grad(loss(model, step, params), list(free.values()))
            free = {
                n: x.detach() - kappa * s for (n, x), s in zip(free.items(), slopes, strict=True)
            }
        params = {n: p.detach().requires_grad_() for n, p in params.items()}
        gradients = torch.autograd.grad(loss(model, step, params), list(params.values()))
        free = {n: x.detach().requires_grad_() for n, x in free.items()}
        h = numbers | {n: level.domain(n).value(x) for n, x in free.items()}
        group = defaults | options(level, h)
        for (name, p), g in zip(list(params.items()), gradients, strict=True):
            kept = {
                k: x.detach() if isinstance(x, torch.Tensor) else x for k, x in slots[name].items()
            }
            params[name], slots[name] = rule(group, kept, p.detach(), g.detach()), kept
        trace.append({n: x.detach() for n, x in (params | {n: h[n] for n in free}).items()})
    return trace


@pytest.mark.parametrize("name", EVERYTHING)
def test_hypergradients_are_those_of_autograd(name):
    """Every hyperparameter at once, ten steps, to round-off."""
    plain, kind = EVERYTHING[name]
    numbers = {n: x for n, x in plain.initial_values.items() if x != 0}
    level = replace(plain, optimizer=SGD(0.02), learn=tuple(numbers))
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), level)
    for step, expected in enumerate(autograd_trajectory(level, kind, 10, 0.02)):
        train(model, optimizer, 1, step)
        found = dict(model.named_parameters()) | optimizer.hyperparameters[0][0]
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key].detach(), value, rtol=1e-11, atol=1e-13, msg=f"{key}, step {step}"
            )
    moved = [
        abs(math.log(float(optimizer.hyperparameters[0][0][n]) / x)) for n, x in numbers.items()
    ]
    assert min(moved) > 1e-7  # each of them


def test_a_hypergradient_is_the_difference_quotient_of_the_next_loss():
    """dℓ/dh of the step before, held against two runs that differ in h alone at that step."""
    level = Adam(
        0.05,
        beta1=0.8,
        beta2=0.95,
        eps=0.02,
        optimizer=SGD(1.0),
        learn=("lr", "beta1", "beta2", "eps"),
    )
    domains = {name: Real() for name in level.initial_values}
    level = Adam(**level.initial_values, optimizer=SGD(1.0), learn=level.learn, domains=domains)
    start = network()
    optimizer = Hyperoptimizer(start.parameters(), level)
    train(start, optimizer, 1)

    def next_loss(name, change):
        model, numbers = network(), dict(level.initial_values)
        train(
            model,
            Hyperoptimizer(model.parameters(), Adam(**numbers | {name: numbers[name] + change})),
            1,
        )
        return loss(model, 1).item()

    before = {name: x.item() for name, x in optimizer.hyperparameters[0][0].items()}
    optimizer.zero_grad()
    loss(start, 1).backward()
    optimizer.step()
    for name, x in optimizer.hyperparameters[0][0].items():
        quotient = (next_loss(name, 1e-6) - next_loss(name, -1e-6)) / 2e-6
        assert before[name] - x.item() == pytest.approx(quotient, rel=1e-6, abs=1e-11), name


def test_three_levels_by_hand():
    """w₁ = w₀ − α₀g₀; α₁ = α₀ + κ₀ g₁·g₀; w₂ = w₁ − α₁g₁; κ₁ = κ₀ + ρ (g₂·g₁)(g₁·g₀); α₂ = α₁ + κ₁ g₂·g₁; …"""
    real = {"lr": Real()}
    tower = SGD(0.1, optimizer=SGD(0.01, optimizer=SGD(0.02), domains=real), domains=real)
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = Hyperoptimizer([w], tower)
    spectrum = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    alpha, kappa, here, gradients, slopes = 0.1, 0.01, w.detach().clone(), [], []
    for _ in range(6):
        g = spectrum * here
        if gradients:
            slope = -(g @ gradients[-1]).item()
            if slopes:
                kappa -= 0.02 * (-slope * slopes[-1])
            alpha -= kappa * slope
            slopes.append(slope)
        here = here - alpha * g
        gradients.append(g)
        optimizer.zero_grad()
        (0.5 * spectrum * w * w).sum().backward()
        optimizer.step()
        torch.testing.assert_close(w.detach(), here, rtol=1e-13, atol=1e-14)
    first, second, _ = optimizer.hyperparameters[0]
    assert first["lr"].item() == pytest.approx(alpha, rel=1e-13)
    assert second["lr"].item() == pytest.approx(kappa, rel=1e-13)
    assert kappa != 0.01


@pytest.mark.parametrize("name", EVERYTHING)
def test_without_a_tower_it_is_torchs_optimiser(name):
    level, kind = EVERYTHING[name]
    ours, theirs = network(), network()
    train(ours, Hyperoptimizer(ours.parameters(), level), 30)
    train(theirs, kind(theirs.parameters(), **options(level, level.initial_values)), 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", EVERYTHING)
def test_in_single_precision_too(name):
    level, kind = EVERYTHING[name]
    ours, theirs = network(torch.float32), network(torch.float32)
    train(ours, Hyperoptimizer(ours.parameters(), level), 30)
    train(theirs, kind(theirs.parameters(), **options(level, level.initial_values)), 30)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_step_sizes_for_each_tensor_and_element():
    """The derivative in each is its part of the inner product: −g₁ ∘ u₀, summed over a tensor or not."""
    for size in ("per-tensor", "per-element"):
        model, real = network(), {"lr": Real()}
        tower = Adam(0.01, optimizer=SGD(1e-3), learn={"lr": size}, domains=real)
        optimizer = Hyperoptimizer(model.parameters(), tower)
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, 1)
        direction = [
            (p.detach() - b) / 0.01 for p, b in zip(model.parameters(), before, strict=True)
        ]
        train(model, optimizer, 1, 1)
        parts = [p.grad * d for p, d in zip(model.parameters(), direction, strict=True)]
        slopes = (
            torch.stack([part.sum() for part in parts])
            if size == "per-tensor"
            else torch.cat([part.flatten() for part in parts])
        )
        torch.testing.assert_close(
            optimizer.hyperparameters[0][0]["lr"], 0.01 - 1e-3 * slopes, rtol=1e-9, atol=1e-12
        )
        moved = [(b - p.detach()) for b, p in zip(before, model.parameters(), strict=True)]
        assert all(m.abs().min() > 0 for m in moved)


def test_zero_gradients_give_finite_hypergradients():
    """A coordinate without a gradient, as of a dead unit, has none in any hyperparameter."""
    for level in (AdaGrad, RMSProp, Adam, AdamW):
        w = nn.Parameter(torch.ones(4))
        learn = tuple(name for name in level().initial_values if name != "weight_decay")
        optimizer = Hyperoptimizer([w], level(optimizer=SGD(1e-4), learn=learn))
        for _ in range(3):
            optimizer.zero_grad()
            (w[:2] ** 2).sum().backward()
            optimizer.step()
        assert all(x.isfinite().all() for x in optimizer.hyperparameters[0][0].values())
        assert (w.detach()[2:] >= 0.99).all()


def test_the_domains_hold():
    """A step size is stopped at 0, from where it can rise again; β stays between 0 and 1, whatever the step above."""
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), Adam(0.5, optimizer=SGD(2.0)))
    train(model, optimizer, 20)
    h = optimizer.hyperparameters[0][0]
    assert h["lr"] >= 0
    assert 0 < h["beta1"] < 1
    assert 0 < h["beta2"] < 1
    for beta in (optimizer.tower.domain("beta2"), optimizer.tower.domain("beta1")):
        for dtype in (torch.float32, torch.float64):
            far = beta.project(torch.tensor([-1e3, 1e3], dtype=dtype))
            assert beta.value(far).tolist() == pytest.approx([0, 1], abs=2e-7)
            assert ((beta.value(far) > 0) & (beta.value(far) < 1)).all()
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer, seen = Hyperoptimizer([w], SGD(1.5, optimizer=SGD(1.0))), []
    for g in (1.0, -2.0, -0.5, -0.25):  # dℓ/dlr = −g g₋ = 2, −1, −1/8
        w.grad = torch.full_like(w, g)
        optimizer.step()
        seen.append((optimizer.hyperparameters[0][0]["lr"].item(), w.item()))
    assert seen == [(1.5, -0.5), (0.0, -0.5), (1.0, 0.0), (1.125, 0.28125)]


def test_it_is_an_optimizer_of_torch():
    model = network()
    ids, leaves = [id(p) for p in model.parameters()], [p.is_leaf for p in model.parameters()]
    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    assert isinstance(optimizer, torch.optim.Optimizer)

    def closure():
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        return value

    expected = loss(model, 0).item()
    assert optimizer.step(closure).item() == expected
    assert [id(p) for p in model.parameters()] == ids
    assert [p.is_leaf for p in model.parameters()] == leaves
    assert all(p.grad.grad_fn is None for p in model.parameters())
    optimizer.step(closure)
    assert (
        float(optimizer.param_groups[0]["lr"])
        == optimizer.hyperparameters[0][0]["lr"].item()
        != 0.1
    )


def test_groups_have_towers_of_their_own():
    """Two groups are two optimisers, each of its own parameters."""
    tower = SGD(0.1, optimizer=SGD(0.3), learn=("lr",))
    together, apart = network(), network()
    pair = Hyperoptimizer(
        [{"params": together[0].parameters()}, {"params": together[2].parameters(), "lr": 0.02}],
        tower,
    )
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


def test_what_is_written_into_a_group_is_taken_up():
    """By hand or by a scheduler, learnt or not."""
    for tower in (SGD(0.1), SGD(0.1, optimizer=SGD(1e-9))):
        model, other = network(), network()
        optimizer, plain = (
            Hyperoptimizer(model.parameters(), tower),
            torch.optim.SGD(other.parameters(), 0.1),
        )
        schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (optimizer, plain)]
        for step in range(5):
            for m, o, schedule in zip((model, other), (optimizer, plain), schedules, strict=True):
                train(m, o, 1, step)
                schedule.step()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        optimizer.param_groups[0]["lr"] = 0.0625
        train(model, optimizer, 1)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0625, rel=1e-7)


def test_what_is_written_counts_from_the_first_step_and_where_there_was_a_zero():
    model, other = network(), network()
    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(1e-9)))
    optimizer.param_groups[0].update(lr=0.05, momentum=0.5, weight_decay=0.2)
    plain = torch.optim.SGD(other.parameters(), 0.05, momentum=0.5, weight_decay=0.2)
    for step in range(3):
        train(model, optimizer, 1, step)
        train(other, plain, 1, step)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_clipped_gradients_are_what_it_learns_from():
    model, real = network(), {"lr": Real()}
    optimizer, clipped = (
        Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(1.0), domains=real)),
        [],
    )
    for step in range(2):
        optimizer.zero_grad()
        loss(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        clipped.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    assert optimizer.hyperparameters[0][0]["lr"].item() == pytest.approx(
        0.1 + (clipped[0] @ clipped[1]).item(), rel=1e-12
    )


def test_parameters_without_a_gradient_stay():
    """Frozen, or no part of the loss: they change nothing for the others, and weight decay does not move them."""
    level = AdamW(0.01, optimizer=SGD(0.1))
    model, other, spare = network(), network(), nn.Parameter(torch.ones(3, dtype=torch.float64))
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
        torch.testing.assert_close(
            a, network()[0].weight if name == "0.weight" else b, rtol=1e-12, atol=1e-13
        )


def test_a_group_that_is_refused_is_not_there():
    optimizer = Hyperoptimizer(network().parameters(), SGD(0.1, optimizer=SGD(0.1)))
    with pytest.raises(ValueError, match="param group 1: got no parameter that requires grad"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
    assert len(optimizer.param_groups) == len(optimizer.hyperparameters) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1, 0.5])


TOWERS = {
    "SGD^3": SGD(0.1, momentum=0.5, optimizer=SGD(0.1, optimizer=SGD(0.1))),
    "Adam/SGD": Adam(0.01, optimizer=SGD(0.1)),
    "AdamW/Adam/SGD": AdamW(
        0.01, optimizer=Adam(0.01, optimizer=SGD(0.1)), learn=("lr", "beta1", "weight_decay")
    ),
    "RMSProp/RMSProp": RMSProp(0.01, optimizer=RMSProp(0.01)),
    "AdaGrad/SGD": AdaGrad(0.1, optimizer=SGD(0.1), learn={"lr": "per-element"}),
    "Adam": Adam(0.01),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_stopped_tower_goes_on_to_the_same_bits(name):
    straight, stopped, resumed = network(), network(), network()
    whole = Hyperoptimizer(straight.parameters(), TOWERS[name])
    train(straight, whole, 8)
    before = Hyperoptimizer(stopped.parameters(), TOWERS[name])
    train(stopped, before, 5)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    resumed.load_state_dict(found["model"])
    after = Hyperoptimizer(resumed.parameters(), TOWERS[name])
    after.load_state_dict(found["optimizer"])
    train(resumed, after, 3, first=5)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.hyperparameters[0], after.hyperparameters[0], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_state_in_memory_may_serve_two():
    """What is loaded is a copy: the first to go on does not move the other."""
    model, copies = network(), (network(), network())
    whole = Hyperoptimizer(model.parameters(), TOWERS["Adam/SGD"])
    train(model, whole, 3)
    state = whole.state_dict()
    resumed = [Hyperoptimizer(each.parameters(), TOWERS["Adam/SGD"]) for each in copies]
    for each, optimizer in zip(copies, resumed, strict=True):
        each.load_state_dict(model.state_dict())
        optimizer.load_state_dict(state)
    for each, optimizer in zip(copies, resumed, strict=True):
        train(each, optimizer, 3, first=3)
    for a, b in zip(*(each.parameters() for each in copies), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_by_itself(copied):
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), TOWERS["Adam/SGD"])
    train(model, optimizer, 3)
    other, its = copied((model, optimizer))
    train(model, optimizer, 3, first=3)
    train(other, its, 3, first=3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(optimizer.hyperparameters[0][0]["lr"], its.hyperparameters[0][0]["lr"])


def test_no_graph_is_kept():
    """Memory does not grow, and what a tower holds requires no gradient but its leaves."""
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), Adam(optimizer=SGD(0.1, optimizer=SGD(0.1))))
    train(model, optimizer, 3)
    held = [x for tower in optimizer.state_dict()["towers"] for x in tower["slots"].values()]
    assert all(
        x.grad_fn is None and not x.requires_grad for x in held if isinstance(x, torch.Tensor)
    )
    assert all(x.grad_fn is None for level in optimizer.hyperparameters[0] for x in level.values())


def test_everything_stays_on_its_device():
    """And no step reads a tensor's value, so that it never waits for the device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        with torch.device("meta"):
            model = nn.Linear(3, 2)
            inputs, targets = torch.empty(4, 3), torch.empty(4, 2)
        optimizer = Hyperoptimizer(model.parameters(), Adam(optimizer=SGD(0.1)))
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        assert all(x.device.type == "meta" for x in optimizer.hyperparameters[0][0].values())
        assert all(p.device.type == "meta" for p in model.parameters())


def _replica(rank, results, address):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = Hyperoptimizer(model.parameters(), Adam(0.01, optimizer=SGD(0.1)))
    for step in range(4):
        optimizer.zero_grad()
        inputs, targets = (x[8 * rank : 8 * rank + 8] for x in batch(step))
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    results[rank] = [p.detach().tolist() for p in model.parameters()] + [
        optimizer.hyperparameters[0][0]["lr"].item()
    ]
    torch.distributed.destroy_process_group()


def test_replicas_learn_the_same_as_one(tmp_path):
    """DistributedDataParallel averages gradients before the step: half a batch each is the whole batch."""
    manager = torch.multiprocessing.Manager()
    results = manager.dict()
    torch.multiprocessing.start_processes(
        _replica, (results, f"file://{tmp_path}/store"), nprocs=2, start_method="fork"
    )
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), Adam(0.01, optimizer=SGD(0.1)))
    train(model, optimizer, 4)
    expected = [p.detach().tolist() for p in model.parameters()] + [
        optimizer.hyperparameters[0][0]["lr"].item()
    ]
    assert results[0] == results[1]
    for a, b in zip(results[0], expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-9)


def test_bad_towers_are_refused():
    with pytest.raises(ValueError, match=r"SGD lr: got -0.1, expected a finite number ≥ 0"):
        SGD(-0.1)
    with pytest.raises(ValueError, match=r"Adam beta1: got 1.0, expected a number in \[0, 1\)"):
        Adam(beta1=1.0)
    with pytest.raises(ValueError, match=r"AdaGrad initial: got -1, expected a finite number ≥ 0"):
        AdaGrad(initial=-1)
    with pytest.raises(
        ValueError, match=r"SGD learn: got \['rate'\], expected some of \['lr', 'momentum'"
    ):
        SGD(optimizer=SGD(), learn=("rate",))
    with pytest.raises(ValueError, match=r"SGD learn: got \('lr',\) and no optimizer"):
        SGD(learn=("lr",))
    with pytest.raises(ValueError, match="SGD: got an optimizer and nothing to learn"):
        SGD(optimizer=SGD(), learn=())
    with pytest.raises(
        ValueError, match=r"SGD learn: got {'momentum': 'per-tensor'}, expected 'scalar'"
    ):
        SGD(optimizer=SGD(), momentum=0.5, learn={"momentum": "per-tensor"})
    with pytest.raises(
        ValueError, match=r"SGD momentum: hyperparameter: got 0, expected numbers between 0 and 1"
    ):
        SGD(optimizer=SGD(), learn=("momentum",))
    with pytest.raises(ValueError, match=r"SGD domains: got \['beta1'\]"):
        SGD(domains={"beta1": Positive()})


def test_bad_loops_are_refused():
    model = network()
    optimizer = Hyperoptimizer(model.parameters(), SGD(optimizer=SGD()))
    with pytest.raises(
        ValueError,
        match=r"step: got no gradient in any parameter, expected loss.backward\(\) before",
    ):
        optimizer.step()
    frozen = [p.detach() for p in model.parameters()]
    with pytest.raises(ValueError, match="param group 0: got no parameter that requires grad"):
        Hyperoptimizer(frozen, SGD(optimizer=SGD()))
    mixed = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    with pytest.raises(
        ValueError, match=r"group 0: got parameters of torch\.float32 on cpu, torch\.float64 on cpu"
    ):
        Hyperoptimizer(mixed, SGD())
    with pytest.raises(ValueError, match=r"SGD lr: got -1\.0"):
        Hyperoptimizer([{"params": mixed[:1], "lr": -1.0}], SGD())
    optimizer.param_groups[0]["lr"] = math.nan
    loss(model, 0).backward()
    with pytest.raises(ValueError, match="SGD lr: got nan, expected a finite number ≥ 0"):
        optimizer.step()


def test_a_step_size_that_turns_negative_or_not_finite_stops_before_the_parameters():
    for domain, kappa, word in ((Real(), 100.0, r"-\d"), (Positive(), 1e38, "inf|nan")):
        w = nn.Parameter(torch.tensor([1.0]))
        optimizer = Hyperoptimizer([w], SGD(3.0, optimizer=SGD(kappa), domains={"lr": domain}))
        (w * w).sum().backward()
        optimizer.step()  # past the minimum: the next gradient points back, and lr shrinks
        w.grad = -w.grad if domain == Positive() else None
        if w.grad is None:
            (w * w).sum().backward()
        before = w.detach().clone()
        message = rf"SGD lr: got ({word}).* after 1 steps.*step size of the SGD above is too large.*No parameter was"
        if domain == Positive():
            w.grad = torch.full_like(w, 1e30)
        with pytest.raises(FloatingPointError, match=message):
            optimizer.step()
        assert torch.equal(w.detach(), before)


def test_states_of_other_towers_are_refused():
    def built(tower, size=3):
        w = nn.Parameter(torch.ones(size))
        optimizer = Hyperoptimizer([w], tower)
        for _ in range(2):
            w.grad = torch.ones(size)
            optimizer.step()
        return optimizer

    state = built(Adam(optimizer=SGD())).state_dict()
    for other in (SGD(optimizer=SGD()), AdamW(optimizer=SGD()), Adam(optimizer=RMSProp())):
        optimizer = built(other)
        before = dict(optimizer.param_groups[0])
        with pytest.raises(
            ValueError, match=r"got a level (Adam, expected (SGD|AdamW)|SGD, expected RMSProp)"
        ):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0] == before
    with pytest.raises(ValueError, match="got hyperparameters"):
        built(Adam(optimizer=SGD(), learn=("lr",))).load_state_dict(state)
    with pytest.raises(ValueError, match=r"got states of \[3\] numbers, expected 4"):
        built(Adam(optimizer=SGD()), size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="a tower of another height"):
        built(Adam(optimizer=SGD(optimizer=SGD()))).load_state_dict(state)
    with pytest.raises(ValueError, match="got 0 towers, expected 1"):
        built(Adam()).load_state_dict(torch.optim.Adam([nn.Parameter(torch.ones(3))]).state_dict())
