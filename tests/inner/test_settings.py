"""Numbers of an inner loop by parameter and by step, and clipped gradients, against torch.optim."""

import copy

import pytest
import torch
from oracles import finite_difference, randn, relative_error, symmetric

from metaimplicit import (
    BilevelProblem,
    FromMeta,
    GradientDescent,
    TorchOptimizer,
    Truncated,
    hypergradient,
)
from metaimplicit.inner.settings import resolve_setting

TASKS = 3
STEPS = 4
H = symmetric([[0.5, 1, 2, 3, 4], [1, 1, 2, 2, 8], [0.1, 0.2, 0.4, 0.8, 1.6]])
B = randn(TASKS, 5, seed=1)
START = {
    "body.weight": randn(2, seed=2),
    "head.weight": randn(2, seed=3),
    "head.bias": randn(1, seed=4),
}


def inner_loss(params, matrix, vector):
    """A quadratic with a little sine, of one task."""
    theta = torch.cat([params[name] for name in START])
    return 0.5 * theta @ matrix @ theta - theta @ vector + 0.1 * theta.sin().sum()


PROBLEM = BilevelProblem(
    init=lambda meta, data: {name: meta[name] for name in START},
    inner_loss=lambda params, meta, data: inner_loss(params, *data),
    outer_loss=lambda params, meta, data: sum(p.cos().sum() for p in params.values()),
)


def run(inner, method="unrolled", **meta):
    numbers = {k: torch.tensor(v, dtype=torch.float64) for k, v in meta.items()}
    return run_at(START | numbers, inner, method)


def run_at(meta, inner, method):
    return hypergradient(PROBLEM, meta, (H, B), inner=inner, method=method, batched=True)


def torch_end(task, optimizer, groups, *, clip=None, steps=STEPS, **options):
    """Where torch.optim ends for one task.

    `groups` maps a parameter to its options, of which a list holds one value for each step.
    """
    params = {name: p.clone().requires_grad_() for name, p in START.items()}
    own = [{"params": [p]} | pick(groups.get(name, {}), 0) for name, p in params.items()]
    stepper = optimizer(own, **pick(options, 0))
    for step in range(steps):
        for group, name in zip(stepper.param_groups, params, strict=True):
            group.update(pick(options | groups.get(name, {}), step))
        stepper.zero_grad()
        inner_loss(params, H[task], B[task]).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(params.values()), clip)
        stepper.step()
    return {name: p.detach() for name, p in params.items()}


def pick(options, step):
    return {key: x[step] if isinstance(x, list) else x for key, x in options.items()}


def assert_ends_as_torch(inner, optimizer, groups, **options):
    end = run(inner).params
    for task in range(TASKS):
        expected = torch_end(task, optimizer, groups, steps=inner.steps, **options)
        for name, p in expected.items():
            assert relative_error(end[name][task], p) < 1e-12, (task, name)


SGD = torch.optim.SGD
LAYERS = {"body.weight": 0.1, "head.weight": 0.2, "head.bias": 0.3}
SIZES = [0.2, 0.1, 0.05, 0.3]


def each(**by_name):
    """The groups of torch for one option: its value for each parameter."""
    names = {"body": "body.weight", "weight": "head.weight", "bias": "head.bias"}
    return {names[key]: {"lr": value} for key, value in by_name.items()}


SCHEDULES = {
    "by parameter": (LAYERS, each(body=0.1, weight=0.2, bias=0.3)),
    "by module": ({"body": 0.1, "head": 0.2}, each(body=0.1, weight=0.2, bias=0.2)),
    "by pattern": ({"*.bias": 0.3, "*": 0.1}, each(body=0.1, weight=0.1, bias=0.3)),
    "the first key that fits": ({"head": 0.2, "*": 0.1}, each(body=0.1, weight=0.2, bias=0.2)),
    "by step": (SIZES, each(body=SIZES, weight=SIZES, bias=SIZES)),
    "more numbers than steps": ([*SIZES, 9.0], each(body=SIZES, weight=SIZES, bias=SIZES)),
    "steps of one module": (
        {"head": SIZES, "*": 0.1},
        each(body=0.1, weight=SIZES, bias=SIZES),
    ),
    "modules of each step": (
        [{"head": 0.3, "*": lr} for lr in SIZES],
        each(body=SIZES, weight=0.3, bias=0.3),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_step_sizes_are_those_of_groups_and_schedules_of_torch(name):
    lr, groups = SCHEDULES[name]
    assert_ends_as_torch(GradientDescent(steps=STEPS, lr=lr), SGD, groups, lr=0.0)
    adam = torch.optim.Adam
    assert_ends_as_torch(TorchOptimizer(adam, steps=STEPS, lr=lr), adam, groups, lr=0.0)


OTHER_OPTIONS = {
    "momentum by step": (SGD, {"lr": 0.1, "momentum": [0.0, 0.5, 0.9, 0.0]}),
    "momentum that rests": (torch.optim.RMSprop, {"lr": 0.1, "momentum": [0.9, 0.0, 0.8, 0.0]}),
    "Nesterov that rests": (SGD, {"lr": 0.1, "momentum": [0.9, 0.0, 0.9, 0.8], "nesterov": True}),
    "decay by step": (SGD, {"lr": 0.1, "weight_decay": [0.1, 0.0, 0.2, 0.3]}),
    "betas by step": (
        torch.optim.Adam,
        {"lr": 0.1, "betas": [(0.8, 0.9), (0.9, 0.9), (0.7, 0.99), (0.9, 0.9)]},
    ),
    "size and momentum by step": (
        torch.optim.RMSprop,
        {"lr": SIZES, "momentum": [0.1, 0.2, 0.3, 0.4], "centered": True},
    ),
}


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_any_option_may_change_from_step_to_step(name):
    optimizer, options = OTHER_OPTIONS[name]
    inner = TorchOptimizer(optimizer, steps=STEPS, **options)
    assert_ends_as_torch(inner, optimizer, {}, **options)


CLIPPED = {
    "never": (SGD, 100.0, {"lr": 0.1}),
    "always": (SGD, 1e-3, {"lr": 0.1}),
    "some steps of some tasks": (SGD, 1.0, {"lr": 0.1}),
    "with momentum": (SGD, 1.0, {"lr": 0.1, "momentum": 0.9}),
    "before decay": (SGD, 1.0, {"lr": 0.1, "weight_decay": 0.5}),
    "before Adam": (torch.optim.Adam, 0.5, {"lr": 0.1}),
    "before decoupled decay": (torch.optim.AdamW, 0.5, {"lr": 0.1, "weight_decay": 0.3}),
    "with a schedule": (SGD, 1.0, {"lr": SIZES}),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_gradients_are_clipped_by_the_norm_of_each_task(name):
    optimizer, limit, options = CLIPPED[name]
    inner = TorchOptimizer(optimizer, steps=STEPS, max_grad_norm=limit, **options)
    assert_ends_as_torch(inner, optimizer, {}, clip=limit, **options)
    if set(options) == {"lr"} and optimizer is SGD:
        descent = GradientDescent(steps=STEPS, max_grad_norm=limit, **options)
        assert torch.equal(run(descent).params["head.bias"], run(inner).params["head.bias"])


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_the_clipped_steps_are_differentiated(method):
    inner = GradientDescent(steps=STEPS, lr=FromMeta("lr"), max_grad_norm=FromMeta("limit"))
    numbers = {"lr": 0.2, "limit": 1.5}
    grads = run(inner, method, **numbers).grads
    start = START["head.weight"]
    direction = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def loss_at(value):
        meta = START | {"head.weight": value}
        meta |= {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        return run_at(meta, inner, Truncated(1)).outer_loss

    slope = finite_difference(loss_at, start, direction, step=1e-4)
    assert float((grads["head.weight"] * direction).sum()) == pytest.approx(float(slope), rel=1e-7)
    for name, value in numbers.items():

        def loss_of(x, name=name):
            return run(inner, Truncated(1), **(numbers | {name: float(x)})).outer_loss

        at = torch.tensor(value, dtype=torch.float64)
        slope = finite_difference(loss_of, at, torch.ones_like(at), step=1e-4)
        assert float(grads[name]) == pytest.approx(float(slope), rel=1e-7), name


@pytest.mark.parametrize("max_grad_norm", [0.1, 10.0])
def test_a_task_with_zero_gradients_is_clipped_to_zero_with_a_finite_derivative(max_grad_norm):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda params, meta, data: data * params["w"].square().sum(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    inner = GradientDescent(steps=3, lr=0.1, max_grad_norm=max_grad_norm)
    result = hypergradient(
        problem,
        {"w": torch.zeros(2)},
        torch.tensor([1.0, 0.0]),
        inner=inner,
        method="unrolled",
        batched=True,
    )
    assert result.params["w"].abs().max() == 0
    assert result.grads["w"].isfinite().all()


def test_a_tolerance_looks_at_the_gradient_before_it_is_clipped():
    inner = GradientDescent(steps=50, lr=0.1, tol=0.1, max_grad_norm=0.05)
    assert (run(inner).report.inner_gradient_norm > 0.1).any()
    assert run(inner).report.inner_steps.max() == 50


def test_every_method_takes_constant_schedules():
    schedule = GradientDescent(steps=STEPS, lr=SIZES)
    same = {flag: run(schedule, flag).params["head.bias"] for flag in ("unrolled", "forward")}
    same["first-order"] = run(schedule, "first-order").params["head.bias"]
    same["truncated"] = run(schedule, Truncated(2)).params["head.bias"]
    for params in same.values():
        assert torch.allclose(params, same["unrolled"], rtol=1e-14)


def test_truncated_refuses_to_learn_numbers_of_steps_that_it_skips():
    late = [0.1, 0.1, 0.1, FromMeta("lr")]
    early = [FromMeta("lr"), 0.1, 0.1, 0.1]
    run(GradientDescent(steps=STEPS, lr=late), Truncated(1), lr=0.1)
    with pytest.raises(ValueError, match="Truncated: got an inner loop that reads the numbers of"):
        run(GradientDescent(steps=STEPS, lr=early), Truncated(1), lr=0.1)
    with pytest.raises(ValueError, match="first-order cannot give the gradient"):
        run(GradientDescent(steps=STEPS, lr=early), "first-order", lr=0.1)


def test_a_step_outside_of_the_loop_has_no_number():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (params["w"] - meta["w"]).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    meta = {"w": torch.ones(2, dtype=torch.float64)}
    options = {"inner": GradientDescent(steps=2, lr=[0.1, 0.2]), "method": "sama"}
    with pytest.raises(ValueError, match="lr: got numbers for steps 0 to 1, but the method needs"):
        hypergradient(problem, meta, None, **options)


REFUSED = [
    (lambda: GradientDescent(steps=3, lr=[0.1, 0.2]), r"got the numbers \[0.1, 0.2\] for 3 steps"),
    (lambda: GradientDescent(steps=2, lr={"w": [0.1]}), r"got the numbers \[0.1\] for 2 steps"),
    (lambda: GradientDescent(steps=2, lr=[0.1, -0.2]), "Invalid learning rate"),
    (lambda: GradientDescent(lr={"w": 0.1, "*": -0.2}), "Invalid learning rate: -0.2"),
    (lambda: GradientDescent(steps=2, lr=[0.1, 0.2]).updated(steps=3), "for 3 steps, expected one"),
    (lambda: GradientDescent(steps=2, lr=(0.1, 0.2)), "a dict of .* or a list of numbers by step"),
    (lambda: GradientDescent(max_grad_norm=0.0), "max_grad_norm: got 0.0, expected a norm > 0"),
    (
        lambda: TorchOptimizer(torch.optim.Adam, betas=[(0.9, 0.9)] * 4 + [(1.5, 0.9)]),
        "Invalid beta",
    ),
    (
        lambda: TorchOptimizer(torch.optim.Adam, betas=[0.9, 0.99], steps=2),
        r"betas: got \[0.9, 0.99\], expected a tuple of two numbers",
    ),
    (lambda: TorchOptimizer(torch.optim.Adam, betas={"*": (0.9,)}), "betas: .* a tuple of two"),
    (lambda: TorchOptimizer(torch.optim.Rprop, etas=0.5), "etas: got 0.5, expected a tuple of two"),
    (
        lambda: resolve_setting({"head": 0.1}, {}, "body.weight", option="lr"),
        r"lr: got a dict with the keys \['head'\], expected one that fits .*'body.weight'",
    ),
    (
        lambda: run(GradientDescent(steps=2, lr={"head": 0.1})),
        "add its name, or '\\*' for all others",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_numbers_that_fit_no_loop_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tensor_that_requires_grad_in_a_schedule_is_refused():
    lr = torch.tensor(0.1, requires_grad=True)
    for setting in ([lr, 0.1], {"*": lr}):
        with pytest.raises(
            ValueError, match=r"lr: got a tensor that requires grad, expected FromM"
        ):
            run(GradientDescent(steps=2, lr=setting))


def test_loops_with_schedules_can_be_copied_and_compared():
    inner = GradientDescent(steps=2, lr={"head": [0.1, 0.2], "*": 0.3})
    assert copy.deepcopy(inner) == inner
    assert inner.updated(steps=1).lr == inner.lr
    optimizer = TorchOptimizer(SGD, steps=2, lr=[0.1, 0.2], max_grad_norm=1.0)
    assert optimizer.updated(steps=1).max_grad_norm == 1.0
