"""The race for one meta-gradient."""

import multiprocessing
from dataclasses import replace
from importlib.util import find_spec

import gradient_race
import pytest
import torch
from gradient_contenders import CONTENDERS, WORKLOADS
from gradient_race import describe, race
from rank_group import forked_context

ROW = {"slowest": 3.0, "threads": 1, "mebibytes": 100.0, "error": 1e-7}


@pytest.mark.filterwarnings("ignore:We.ve integrated functorch:FutureWarning")  # of TorchOpt
@pytest.mark.parametrize("name", ["sinusoid, 5 steps", "iMAML perceptron, 16 steps"])
def test_all_contenders_compute_the_same_meta_gradient(name):
    workload = replace(WORKLOADS[name], tasks=3)
    taking_part = {
        contender: entry.make(workload)()
        for contender, entry in CONTENDERS.items()
        if entry.implicit in (None, workload.proximal > 0)
        and not contender.endswith("compiled")
        and find_spec(entry.package) is not None
    }
    expected = by_autograd(workload)
    assert "metaimplicit" in taking_part
    for parts in taking_part.values():
        for part, exact in zip(parts, expected, strict=True):
            assert (part.flatten() - exact).norm() <= 1e-4 * exact.norm()


def by_autograd(workload):
    """The mean over the tasks in float64, by plain autograd on one task after another."""
    model = workload.make_model().double()
    start = [p.detach().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def loss(params, x, y):
        by_name = dict(zip(names, params, strict=True))
        return workload.loss(torch.func.functional_call(model, by_name, (x,)), y)

    of_task = implicit if workload.proximal else unrolled
    sets = [part.double() for pair in workload.draw() for part in pair]
    gradients = [of_task(workload, loss, start, data) for data in zip(*sets, strict=True)]
    return torch.stack(gradients).mean(0).split([p.numel() for p in start])


def descend(workload, loss, start, data, create_graph):
    params = start
    for _ in range(workload.steps):
        pairs = zip(params, start, strict=True)
        penalty = workload.proximal / 2 * sum((p - q).square().sum() for p, q in pairs)
        objective = loss(params, *data[:2]) + penalty
        slopes = torch.autograd.grad(objective, params, create_graph=create_graph)
        params = [p - workload.lr * g for p, g in zip(params, slopes, strict=True)]
    return params


def unrolled(workload, loss, start, data):
    end = descend(workload, loss, start, data, create_graph=True)
    return flat(torch.autograd.grad(loss(end, *data[2:]), start))


def implicit(workload, loss, start, data):
    """λ u, where u is the fifth iterate of CG on (∂²f/∂θ² + λ I) u = ∂g/∂θ."""
    params = descend(workload, loss, start, data, create_graph=False)
    params = [p.detach().requires_grad_() for p in params]
    slope = flat(torch.autograd.grad(loss(params, *data[:2]), params, create_graph=True))

    def product(u):
        curved = flat(torch.autograd.grad(slope @ u, params, retain_graph=True))
        return curved + workload.proximal * u

    v = flat(torch.autograd.grad(loss(params, *data[2:]), params))
    return workload.proximal * conjugate_gradients(product, v, steps=5)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def conjugate_gradients(product, v, steps):
    """The K-th iterate of CG from zero, as in a textbook."""
    x, r = torch.zeros_like(v), v
    p = r
    for _ in range(steps):
        q = product(p)
        alpha = r @ r / (p @ q)
        x, previous, r = x + alpha * p, r, r - alpha * q
        p = r + (r @ r) / (previous @ previous) * p
    return x


@pytest.mark.slow
def test_a_race_has_a_row_for_each_contender(monkeypatch):
    few = {name: CONTENDERS[name] for name in ("metaimplicit", "torch.func")}
    monkeypatch.setattr(gradient_race, "CONTENDERS", few)
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: forked_context())
    rows = race("sinusoid, 1 steps", threads=(1,), rounds=1)
    assert [row["contender"] for row in rows] == list(few)
    assert all(row["milliseconds"] > 0 and row["error"] < 1e-4 for row in rows)


def test_a_table_has_ratios_to_the_fastest():
    rows = [
        {"contender": "a", "milliseconds": 2.0, "fastest": 1.0, **ROW},
        {"contender": "b", "milliseconds": 1.0, "fastest": 0.5, **ROW},
    ]
    lines = describe("sinusoid, 1 steps", rows).splitlines()
    assert [line.split()[0] for line in lines] == ["sinusoid,", "a", "b"]
    assert [line.split()[5] for line in lines[1:]] == ["2.00", "1.00"]
