"""Inner loops against `torch.optim`; at zero gradients, at a tolerance, and without a graph."""

import gc
import weakref

import pytest
import torch
from oracles import randn, relative_error, symmetric

from metaimplicit import (
    BilevelProblem,
    FromMeta,
    GradientDescent,
    NewtonCG,
    TorchOptimizer,
    hypergradient,
)
from metaimplicit.inner import LBFGS, L1Norm, ProximalGradient

TASKS = 3
N = 5
STEPS = 8
H = symmetric([[0.5, 1, 2, 3, 4], [1, 1, 2, 2, 8], [0.1, 0.2, 0.4, 0.8, 1.6]])
B = randn(TASKS, N, seed=1)
START = {"a": randn(TASKS, 2, seed=2), "b": randn(TASKS, 3, seed=3)}


def loss(params, _=0):
    theta = torch.cat([params["a"], params["b"]], dim=1)
    quadratic = 0.5 * torch.einsum("ti,tij,tj->t", theta, H, theta)
    return quadratic - (theta * B).sum(1) + 0.1 * theta.sin().sum(1)


DECOUPLED = {"decoupled_weight_decay": True}
OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.05}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.2}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}),
    (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}),
    (
        torch.optim.Adagrad,
        {
            "lr": 0.1,
            "lr_decay": 0.1,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.3,
            "eps": 1e-3,
        },
    ),
    (torch.optim.Adamax, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    (torch.optim.ASGD, {"lr": 0.05, "lambd": 0.1, "alpha": 0.6, "t0": 3, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "centered": True}),
    (
        torch.optim.RMSprop,
        {"lr": 0.01, "centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-3},
    ),
    (torch.optim.NAdam, {}),
    (torch.optim.NAdam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 0.1, "momentum_decay": 0.2, "weight_decay": 0.2} | DECOUPLED),
    (torch.optim.RAdam, {}),
    (torch.optim.RAdam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (torch.optim.RAdam, {"lr": 0.1, "betas": (0.9, 0.6), "weight_decay": 0.2} | DECOUPLED),
    (torch.optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-4, 0.1)}),
]
LEARNABLE = [(cls, options) for cls, options in OPTIMIZERS if cls is not torch.optim.Rprop]


def name_of(parameter):
    return getattr(parameter, "__name__", str(parameter))


def torch_steps(optimizer, options, steps):
    params = {name: p.clone().requires_grad_() for name, p in START.items()}
    stepper = optimizer(params.values(), **options)
    for _ in range(steps):
        stepper.zero_grad()
        loss(params).sum().backward()
        stepper.step()
    return params


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=name_of)
def test_steps_are_those_of_torch(optimizer, options):
    """Those without a graph, and those with one after them."""
    loop = TorchOptimizer(optimizer, steps=STEPS, **options)
    end = loop.run(loss, START, {}, differentiated_steps=3).params
    # torch keeps the step size of ASGD and the momentum product of NAdam in float32.
    in_float32 = (torch.optim.ASGD, torch.optim.NAdam)
    tolerance = 1e-6 if optimizer in in_float32 else 1e-12
    for name, p in torch_steps(optimizer, options, STEPS).items():
        assert relative_error(end[name].detach(), p.detach()) < tolerance


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_gradient_descent_is_the_sgd_of_torch(momentum):
    loop = GradientDescent(steps=STEPS, lr=0.05, momentum=momentum)
    end = loop.run(loss, START, {}, differentiated_steps=0)
    options = {"lr": 0.05, "momentum": momentum}
    for name, p in torch_steps(torch.optim.SGD, options, STEPS).items():
        assert relative_error(end.params[name], p.detach()) < 1e-13
    assert end.steps.tolist() == [STEPS] * TASKS


@pytest.mark.parametrize(("optimizer", "options"), LEARNABLE, ids=name_of)
def test_a_coordinate_with_zero_gradients_has_a_finite_hypergradient(optimizer, options):
    """Every optimiser divides by √0 there, or differentiates it."""
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": meta["start"]},
        inner_loss=lambda params, meta, data: params["theta"][0] ** 2 * data,
        outer_loss=lambda params, meta, data: params["theta"].square().sum(),
    )
    meta = {
        "start": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "lr": torch.tensor(0.1, dtype=torch.float64),
    }
    data = torch.tensor(1.0, dtype=torch.float64)
    inner = TorchOptimizer(optimizer, steps=3, **(options | {"lr": FromMeta("lr")}))
    grads = hypergradient(problem, meta, data, inner=inner, method="unrolled").grads
    assert grads["start"].isfinite().all()
    assert grads["lr"].isfinite()
    assert grads["start"][1] == 0


@pytest.mark.slow
def test_a_tolerance_stops_each_task_by_itself():
    def run(tol):
        loop = GradientDescent(steps=150, lr=0.2, tol=tol)
        return loop.run(loss, START, {}, differentiated_steps=0, keep_iterates=True)

    free = run(None)
    stopped = run(0.1)
    assert len(set(stopped.steps.tolist())) == TASKS
    # The iterates are θ_0, one for each step, and one for the gradient that ended the loop.
    assert len(stopped.iterates) == int(stopped.steps.max()) + 2 < 151
    for task, steps in enumerate(stopped.steps.tolist()):
        for name in START:
            expected = free.iterates[steps][name][task]
            assert torch.equal(stopped.params[name][task], expected)
        before = gradient_norm(free.iterates[steps - 1])[task]
        after = gradient_norm(free.iterates[steps])[task]
        assert after <= 0.1 < before
    assert (stopped.gradient_norm <= 0.1).all()


def gradient_norm(params):
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(leaves).sum(), list(leaves.values()))
    return torch.cat(gradients, dim=1).norm(dim=1)


def test_a_stopped_task_keeps_the_derivative_of_the_steps_it_took():
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": meta["start"]},
        inner_loss=lambda params, meta, data: (
            0.5 * params["theta"] @ data[0] @ params["theta"] - params["theta"] @ data[1]
        ),
        outer_loss=lambda params, meta, data: params["theta"].sum(),
    )
    meta = {"start": randn(N, seed=4)}
    batch = hypergradient(
        problem,
        meta,
        (H, B),
        inner=GradientDescent(steps=150, lr=0.2, tol=0.2),
        method="unrolled",
        batched=True,
    )
    gradients = []
    for task, steps in enumerate(batch.report.inner_steps.tolist()):
        inner = GradientDescent(steps=steps, lr=0.2)
        data = (H[task], B[task])
        alone = hypergradient(problem, meta, data, inner=inner, method="unrolled")
        gradients.append(alone.grads["start"])
    assert relative_error(batch.grads["start"], torch.stack(gradients).mean(0)) < 1e-12


def test_a_loop_that_stops_before_its_differentiated_steps_is_the_identity_in_its_start():
    start = {name: p.clone().requires_grad_() for name, p in START.items()}
    loop = GradientDescent(steps=400, lr=0.1, tol=0.5)
    end = loop.run(loss, start, {}, differentiated_steps=2)
    assert (end.steps < 398).all()
    total = sum(p.sum() for p in end.params.values())
    for gradient in torch.autograd.grad(total, list(start.values())):
        assert torch.equal(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("differentiated", range(4))
@pytest.mark.parametrize(
    "make",
    [
        lambda steps: GradientDescent(steps=steps, lr=0.1),
        lambda steps: ProximalGradient(L1Norm(0.1), steps=steps, lr=0.1),
        lambda steps: TorchOptimizer(torch.optim.SGD, steps=steps, lr=0.1),
    ],
    ids=["gradient-descent", "proximal-gradient", "torch"],
)
def test_the_steps_before_the_differentiated_ones_are_the_identity(make, differentiated):
    steps = 3

    def gradients(start, *, steps, differentiated):
        """Those of a sum of the last iterate in the start, and the last iterate."""
        start = {name: p.detach().requires_grad_() for name, p in start.items()}
        end = make(steps).run(loss, start, {}, differentiated_steps=differentiated).params
        total = sum(p.square().sum() for p in end.values())
        return torch.autograd.grad(total, list(start.values())), end

    found, end = gradients(START, steps=steps, differentiated=differentiated)
    middle = START
    if differentiated < steps:
        before = make(steps - differentiated)
        middle = before.run(loss, START, {}, differentiated_steps=0).params
    if differentiated > 0:
        expected, _ = gradients(middle, steps=differentiated, differentiated=differentiated)
    else:
        expected = [2 * p.detach() for p in end.values()]
    for gradient, reference in zip(found, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-14


@pytest.mark.parametrize(
    "loop",
    [
        GradientDescent(steps=2),
        ProximalGradient(L1Norm(0.1), steps=2),
        LBFGS(steps=2),
        NewtonCG(steps=2),
    ],
    ids=lambda loop: type(loop).__name__,
)
def test_iterates_are_kept_on_demand_alone(loop):
    end = loop.run(loss, START, {}, differentiated_steps=0)
    assert end.iterates == ()
    if loop.keeps_iterates:
        kept = loop.run(loss, START, {}, differentiated_steps=0, keep_iterates=True).iterates
        assert len(kept) == 3
        for name, p in end.params.items():
            assert torch.equal(kept[-1][name], p)


@pytest.mark.parametrize(
    ("loop", "where"),
    [
        (GradientDescent(steps=3), -2),
        (TorchOptimizer(torch.optim.Adam, steps=3), -2),
        (ProximalGradient(L1Norm(0.1), steps=3), -2),
        (NewtonCG(steps=3), -1),
    ],
    ids=lambda loop: type(loop).__name__,
)
def test_the_gradient_norm_is_that_of_each_task_where_the_loop_took_it_last(loop, where):
    end = loop.run(loss, START, {}, differentiated_steps=0, keep_iterates=True)
    torch.testing.assert_close(end.gradient_norm, gradient_norm(end.iterates[where]))
    assert end.steps.tolist() == [3] * TASKS


def test_undifferentiated_steps_leave_no_graph():
    """Without differentiated steps, the optimiser's state must not chain the steps together."""
    seen = []

    def recorded(params, t):
        seen.append(weakref.ref(params["a"]))
        return loss(params)

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    loop = TorchOptimizer(torch.optim.SGD, steps=6, **options)
    trajectory = loop.run(recorded, START, {}, differentiated_steps=0)
    gc.collect()
    assert [reference() for reference in seen] == [None] * 6
    assert not trajectory.state["a"]["buffer"].requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(steps=0), "steps: got 0, expected at least 1"),
        (
            lambda: LBFGS(steps=2.5),
            "steps: got 2.5, expected a whole number, at least 1 inner step",
        ),
        (lambda: GradientDescent(tol=0.0), "tol: got 0.0, expected a gradient norm > 0"),
        (lambda: GradientDescent(lr=-0.1), "Invalid learning rate"),
        (lambda: LBFGS(history=0), "LBFGS history: got 0, expected at least 1 pair"),
        (lambda: TorchOptimizer(torch.optim.LBFGS), "expected one of ASGD, Adadelta"),
        (
            lambda: TorchOptimizer(torch.optim.SGD, lr=0.1, maximize=True),
            r"SGD options: got \['maximize'\]",
        ),
        (lambda: TorchOptimizer(torch.optim.AdamW, decoupled_weight_decay=False), "AdamW options"),
        (
            lambda: TorchOptimizer(torch.optim.RMSprop, capturable=True),
            r"RMSprop options: got \['capturable'\]",
        ),
        (lambda: TorchOptimizer(torch.optim.Adam, betas=(1.5, 0.9)), "Invalid beta"),
    ],
)
def test_numbers_and_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_changed_copy_keeps_the_other_numbers():
    loop = TorchOptimizer(torch.optim.Adam, steps=3, lr=0.1, eps=1e-3)
    changed = loop.updated(steps=7, lr=0.2)
    assert (changed.steps, changed.lr, changed.options["eps"]) == (7, 0.2, 1e-3)
    assert (loop.steps, loop.lr) == (3, 0.1)
    assert GradientDescent(steps=2, lr=0.3).updated(steps=5) == GradientDescent(steps=5, lr=0.3)


UNITS = [(1e-6, 1e-6), (1e-3, 1e-6), (1.0, 1e-6), (1e4, 1e-6), (1e-3, 1.0), (1.0, 1.0), (1e4, 1.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("unit", "scale"), [*UNITS, (1.0, 1e6), (1e4, 1e6)])
def test_lbfgs_ends_at_the_same_point_in_other_units(unit, scale, dtype):
    """Torch stops where the loss or θ changes by less than a fixed number."""
    matrix = symmetric([[1.0, 2.0, 4.0, 8.0]]).to(dtype)
    target = torch.tensor([[1.0, -2.0, 3.0, 0.5]], dtype=dtype)

    def scaled_loss(params, _=0):
        w = params["w"] / unit - target
        return scale * (0.5 * (w * (matrix @ w.unsqueeze(-1)).squeeze(-1)).sum(1) + 0.1)

    start = {"w": torch.zeros(1, 4, dtype=dtype)}
    end = LBFGS(steps=200, tol=None).run(scaled_loss, start, {}, differentiated_steps=0)
    error = relative_error(end.params["w"] / unit, target)
    assert error < 10 * torch.finfo(dtype).eps ** 0.5


def test_lbfgs_takes_gradients_in_any_memory_layout():
    """torch views `.grad` as a vector, and these gradients are slices of a larger tensor."""
    end = LBFGS(steps=200, tol=1e-6).run(loss, START, {}, differentiated_steps=0)
    assert (gradient_norm(end.params) <= 1e-6).all()


@pytest.mark.parametrize("lowest", [0.0, 1.0])
def test_lbfgs_without_a_tolerance_ends_where_the_gradient_is_zero(lowest):
    def quadratic_loss(params, _):
        return lowest + (params["w"] - 3).square().sum(1)

    start = {"w": torch.full((1, 2), 3.0)}
    end = LBFGS(steps=50, tol=None).run(quadratic_loss, start, {}, differentiated_steps=0)
    assert end.steps.tolist() == [1]
    assert torch.equal(end.params["w"], start["w"])


def test_lbfgs_ends_where_the_loss_is_too_small_for_units_of_its_own():
    def quadratic_loss(params, _):
        return 1e-32 * (1 + (params["w"] - 3).square().sum(1))

    start = {"w": torch.zeros(1, 2, dtype=torch.float64)}
    end = LBFGS(steps=50, tol=None).run(quadratic_loss, start, {}, differentiated_steps=0)
    assert end.steps.tolist() == [1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("by", [torch.mul, torch.add], ids=["gradient", "value"])
def test_lbfgs_solves_the_other_tasks_beside_one_that_is_not_finite(broken, by):
    """They share a line search, which a sum that is not finite leads astray."""
    factor = torch.ones(3, dtype=torch.float64)

    def quadratic_loss(params, t):
        wrong = torch.where(torch.tensor([False, True, False]), broken, factor)
        return by((params["w"] - 3).square().sum(1), wrong)

    start = {"w": torch.zeros(3, 2, dtype=torch.float64)}
    end = LBFGS(steps=50, tol=1e-8).run(quadratic_loss, start, {}, differentiated_steps=0)
    others = [0, 2]
    assert relative_error(end.params["w"][others], torch.full((2, 2), 3.0).double()) < 1e-8
    assert (end.gradient_norm[others] <= 1e-8).all()
    assert end.params["w"][1].isnan().all()
    assert end.gradient_norm[1].isnan()


def test_lbfgs_without_a_solution_returns_the_point_with_the_lowest_loss():
    """Rosenbrock's valley, where a line search may end at a point that is not the best."""

    def rosenbrock(params, _):
        x, y = params["x"].unbind(1)
        return 100 * (y - x**2) ** 2 + (1 - x) ** 2

    start = {"x": torch.tensor([[-1.2, 1.0]], dtype=torch.float64)}
    last_is_best = []
    for steps in range(1, 11):
        losses = []

        def recorded(params, t, losses=losses):
            value = rosenbrock(params, t)
            losses.append(value.item())
            return value

        end = LBFGS(steps=steps, tol=1e-12).run(recorded, start, {}, differentiated_steps=0)
        assert len(losses) == steps == int(end.steps)
        assert rosenbrock(end.params, 0).item() == min(losses)
        last_is_best.append(losses[-1] == min(losses))
    assert not all(last_is_best)
