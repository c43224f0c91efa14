"""Loops that continue: from the state at which each task stopped, and with its derivative."""

import pytest
import torch
from torch.testing import assert_close

from metaimplicit import (
    BilevelProblem,
    FromMeta,
    GradientDescent,
    Stream,
    TorchOptimizer,
    hypergradient,
)
from metaimplicit.methods import SAMA, Unrolled

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 0.15
CURVATURES = torch.tensor([1.0, 0.3, 12.0], dtype=torch.float64)  # the last is solved at the start


def inner_loss(params, meta, data):
    return 0.5 * data * (params["w"] - meta["c"]).square() + 0.1 * params["w"].pow(4)


PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": torch.where(data > 10, 0.968, 0.0).to(data)},
    inner_loss=inner_loss,
    outer_loss=lambda params, meta, data: (params["w"] - 2).square(),
)
FIRST = {"c": torch.tensor(1.0, dtype=torch.float64)}
SECOND = {"c": torch.tensor(2.0, dtype=torch.float64)}
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.1}),
    "adagrad": (
        torch.optim.Adagrad,
        {"lr": 0.3, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.01, "t0": 0}),
    "sgd": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.8}),
    "dampened": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
    "rprop": (torch.optim.Rprop, {"lr": 0.1}),
}


def plain_loop(optimizer, options, curvature):
    """θ after steps to the tolerance and three more on another loss."""
    w = PROBLEM.init(FIRST, curvature)["w"].clone().requires_grad_()
    stepper = optimizer([w], **options)

    def take_gradient(meta):
        stepper.zero_grad()
        inner_loss({"w": w}, meta, curvature).backward()

    for _ in range(60):
        take_gradient(FIRST)
        if w.grad.abs() <= TOLERANCE:
            break
        stepper.step()
    for _ in range(3):
        take_gradient(SECOND)
        stepper.step()
    return w.detach()


REPLAY = Unrolled(memory="replay")
CONTINUED = [(name, "dense", "vmap") for name in OPTIMIZERS]
# Steps with a graph, and steps that are taken again, hold the same states in other ways.
CONTINUED += [(name, "unrolled", "loop") for name in ("adam", "nadam", "asgd", "dampened")]
CONTINUED += [(name, REPLAY, "vmap") for name in ("adam", "nadam", "asgd", "dampened")]


@pytest.mark.parametrize(("name", "method", "vectorize"), CONTINUED)
def test_a_loop_that_continues_goes_on_from_there(name, method, vectorize):
    optimizer, options = OPTIMIZERS[name]
    how = {"method": method, "vectorize": vectorize, "batched": True}
    stopping = TorchOptimizer(optimizer, steps=60, tol=TOLERANCE, **options)
    end = hypergradient(PROBLEM, FIRST, CURVATURES, inner=stopping, **how).end
    more = TorchOptimizer(optimizer, steps=3, **options)
    got = hypergradient(PROBLEM, SECOND, CURVATURES, inner=more, start=end, **how).params["w"]
    expected = torch.stack([plain_loop(optimizer, options, x) for x in CURVATURES])
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_forward_mode_continues_the_derivative_of_the_state():
    optimizer, options = OPTIMIZERS["adam"]

    def grads(tasks, batched):
        end = None
        for meta, tol in ((FIRST, TOLERANCE), (SECOND, None)):
            inner = TorchOptimizer(optimizer, steps=60 if tol else 3, tol=tol, **options)
            result = hypergradient(
                PROBLEM, meta, tasks, inner=inner, method="real-time", batched=batched, start=end
            )
            end = result.end
        return result.grads["c"]

    tasks = CURVATURES[:2]
    expected = torch.stack([grads(x, False) for x in tasks]).mean()
    assert_close(grads(tasks, True), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["asgd", "dampened", "rprop"])
def test_forward_mode_continues_what_a_task_has_before_its_first_step(name):
    optimizer, options = OPTIMIZERS[name]
    lr = options["lr"]
    given = options | {"lr": FromMeta("lr")}
    end = None
    for meta, tol in ((FIRST, TOLERANCE), (SECOND, None)):
        meta = meta | {"lr": torch.tensor(lr)}
        inner = TorchOptimizer(optimizer, steps=60 if tol else 3, tol=tol, **given)
        result = hypergradient(
            PROBLEM, meta, CURVATURES, inner=inner, method="real-time", batched=True, start=end
        )
        end = result.end

    def loss(lr):
        ends = [plain_loop(optimizer, options | {"lr": lr}, x) for x in CURVATURES]
        return (torch.stack(ends) - 2).square().mean()

    h = 1e-6
    expected = (loss(lr + h) - loss(lr - h)) / (2 * h)
    assert_close(result.grads["lr"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("streams", [True, False])
def test_forward_mode_continues_from_a_start_that_meta_holds(streams):
    x = torch.tensor([3.0, -1.0])
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda params, meta, data: 0.5 * (params["w"] - data).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].square().sum(),
    )
    meta = {
        "w": torch.tensor([1.0, 2.0], requires_grad=True),
        "lr": torch.tensor(0.1, requires_grad=True),
    }
    inner = GradientDescent(steps=2, lr=FromMeta("lr"))
    data = Stream(lambda t: x) if streams else x
    end = None
    for _ in range(2):
        result = hypergradient(problem, meta, data, inner=inner, method="real-time", start=end)
        end = result.end
    w = meta["w"]
    for _ in range(4):
        w = w - meta["lr"] * (w - x)
    expected = torch.autograd.grad(w.square().sum(), list(meta.values()))
    assert_close([result.grads[name] for name in meta], list(expected))


def test_sama_takes_the_step_of_that_state():
    """D of Adam by its formulas, from the moments of the steps that the task took."""
    inner = TorchOptimizer(torch.optim.Adam, steps=60, lr=0.1, tol=TOLERANCE)
    tasks = CURVATURES[:2]
    got = hypergradient(PROBLEM, FIRST, tasks, inner=inner, method=SAMA(), batched=True)
    expected = []
    for a in tasks:
        w, mean, square, t = torch.zeros(()), 0.0, 0.0, 0
        while True:
            g = a * (w - 1) + 0.4 * w**3
            if g.abs() <= TOLERANCE:
                break
            t += 1
            mean = 0.9 * mean + 0.1 * g
            square = 0.999 * square + 0.001 * g**2
            root = (square / (1 - 0.999**t)).sqrt()
            w = w - 0.1 * (mean / (1 - 0.9**t)) / (root + 1e-8)

        def step(g, mean=mean, square=square, t=t + 1):
            root = ((0.999 * square + 0.001 * g**2) / (1 - 0.999**t)).sqrt()
            return 0.1 * ((0.9 * mean + 0.1 * g) / (1 - 0.9**t)) / (root + 1e-8)

        d = torch.func.grad(step)(g)
        expected.append(a * d * 2 * (w - 2))  # −(∂²f/∂w∂c) D ∂g/∂w, and ∂²f/∂w∂c = −a
    assert_close(got.grads["c"], torch.stack(expected).mean(), rtol=1e-6, atol=0)


def test_a_lone_task_keeps_plain_numbers():
    inner = GradientDescent(steps=60, lr=0.02, momentum=0.8, tol=TOLERANCE)
    end = hypergradient(PROBLEM, FIRST, CURVATURES[0], inner=inner, method="unrolled").end
    assert end.state["w"]["buffer"].shape == (1,)
    adam = TorchOptimizer(torch.optim.Adam, steps=60, lr=0.1, tol=TOLERANCE)
    result = hypergradient(PROBLEM, FIRST, CURVATURES[0], inner=adam, method="unrolled")
    assert result.end.state["w"]["step"] == result.report.inner_steps.item()
