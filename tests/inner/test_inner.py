"""Inner loops against `torch.optim`, and what they do at zero gradients, at a tolerance, without a graph."""

import gc
import weakref

import pytest
import torch
from oracles import randn, relative_error, symmetric

from metaimplicit import BilevelProblem, FromMeta, GradientDescent, TorchOptimizer, hypergradient

TASKS, N, STEPS = 3, 5, 12
H = symmetric([[0.5, 1, 2, 3, 4], [1, 1, 2, 2, 8], [0.1, 0.2, 0.4, 0.8, 1.6]])
B = randn(TASKS, N, seed=1)
START = {"a": randn(TASKS, 2, seed=2), "b": randn(TASKS, 3, seed=3)}


def loss(params, _=0):
    theta = torch.cat([params["a"], params["b"]], dim=1)
    return (
        0.5 * torch.einsum("ti,tij,tj->t", theta, H, theta)
        - (theta * B).sum(1)
        + 0.1 * theta.sin().sum(1)
    )


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
    (torch.optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-4, 0.1)}),
]


def torch_steps(optimizer, options, steps):
    params = {name: p.clone().requires_grad_() for name, p in START.items()}
    stepper = optimizer(params.values(), **options)
    for _ in range(steps):
        stepper.zero_grad()
        loss(params).sum().backward()
        stepper.step()
    return params


@pytest.mark.parametrize("differentiated_steps", [0, 5, STEPS])
@pytest.mark.parametrize(
    ("optimizer", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_steps_are_those_of_torch(optimizer, options, differentiated_steps):
    end = (
        TorchOptimizer(optimizer, steps=STEPS, **options)
        .run(loss, START, {}, differentiated_steps=differentiated_steps)
        .params
    )
    for name, p in torch_steps(optimizer, options, STEPS).items():
        # torch keeps ASGD's step size in float32
        assert relative_error(end[name].detach(), p.detach()) < (
            1e-6 if optimizer is torch.optim.ASGD else 1e-12
        )


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_gradient_descent_is_torch_sgd(momentum):
    end = GradientDescent(steps=STEPS, lr=0.05, momentum=momentum).run(
        loss, START, {}, differentiated_steps=0
    )
    for name, p in torch_steps(torch.optim.SGD, {"lr": 0.05, "momentum": momentum}, STEPS).items():
        assert relative_error(end.params[name], p.detach()) < 1e-13
    assert end.steps.tolist() == [STEPS] * TASKS


LEARNABLE = [(o, x) for o, x in OPTIMIZERS if o is not torch.optim.Rprop]


@pytest.mark.parametrize(
    ("optimizer", "options"), LEARNABLE, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_zero_gradients_do_not_make_nan(optimizer, options):
    """A coordinate no loss ever touches: every optimiser divides by √0 there, or differentiates it."""
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": meta["start"]},
        inner_loss=lambda params, meta, data: params["theta"][0] ** 2 * data,
        outer_loss=lambda params, meta, data: params["theta"].square().sum(),
    )
    meta = {
        "start": torch.tensor([1.0, 0.0], dtype=torch.float64),
        "lr": torch.tensor(0.1, dtype=torch.float64),
    }
    inner = TorchOptimizer(optimizer, steps=3, **(options | {"lr": FromMeta("lr")}))
    grads = hypergradient(
        problem, meta, torch.tensor(1.0).double(), inner=inner, method="unrolled"
    ).grads
    assert grads["start"].isfinite().all()
    assert grads["lr"].isfinite()
    assert grads["start"][1] == 0


def test_tolerance_stops_each_task_by_itself():
    free = GradientDescent(steps=1500, lr=0.1).run(
        loss, START, {}, differentiated_steps=0, keep_iterates=True
    )
    stopped = GradientDescent(steps=1500, lr=0.1, tol=1e-3).run(
        loss, START, {}, differentiated_steps=0, keep_iterates=True
    )
    assert len(set(stopped.steps.tolist())) == TASKS
    assert (
        len(stopped.iterates) == int(stopped.steps.max()) + 2 < 1501
    )  # θ₀, the steps, and the look that ended it
    for task, steps in enumerate(stopped.steps.tolist()):
        point = {name: free.iterates[steps][name][task] for name in START}
        for name in START:
            assert torch.equal(stopped.params[name][task], point[name])
        norms = [gradient_norm(free.iterates[t])[task] for t in (steps - 1, steps)]
        assert norms[1] <= 1e-3 < norms[0]
    assert (stopped.gradient_norm <= 1e-3).all()


def gradient_norm(params):
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return torch.cat(torch.autograd.grad(loss(leaves).sum(), list(leaves.values())), dim=1).norm(
        dim=1
    )


def test_a_stopped_task_keeps_the_derivative_of_its_own_steps():
    def problem(task):
        return BilevelProblem(
            init=lambda meta, data: {"theta": meta["start"]},
            inner_loss=lambda params, meta, data: (
                0.5 * params["theta"] @ data[0] @ params["theta"] - params["theta"] @ data[1]
            ),
            outer_loss=lambda params, meta, data: params["theta"].sum(),
        )

    meta = {"start": randn(N, seed=4)}
    batch = hypergradient(
        problem(0),
        meta,
        (H, B),
        inner=GradientDescent(steps=300, lr=0.1, tol=1e-2),
        method="unrolled",
        batched=True,
    )
    each = [
        hypergradient(
            problem(i),
            meta,
            (H[i], B[i]),
            inner=GradientDescent(steps=int(s), lr=0.1),
            method="unrolled",
        ).grads["start"]
        for i, s in enumerate(batch.report.inner_steps)
    ]
    assert relative_error(batch.grads["start"], torch.stack(each).mean(0)) < 1e-12


def test_untracked_steps_leave_no_graph():
    """The optimiser's state must not chain the steps together when nothing is tracked."""
    seen = []

    def watched(params, t):
        seen.append(weakref.ref(params["a"]))
        return loss(params)

    TorchOptimizer(torch.optim.SGD, steps=6, lr=0.1, momentum=0.9, weight_decay=0.1).run(
        watched, START, {}, differentiated_steps=0
    )
    gc.collect()
    assert [ref() for ref in seen] == [None] * 6


def test_bad_loops_are_refused():
    cases = [
        (lambda: GradientDescent(steps=0), "steps: got 0, expected at least 1"),
        (lambda: GradientDescent(tol=0.0), "tol: got 0.0, expected a gradient norm > 0"),
        (lambda: GradientDescent(lr=-0.1), "Invalid learning rate"),
        (lambda: TorchOptimizer(torch.optim.LBFGS), "expected one of torch.optim's ASGD, Adadelta"),
        (
            lambda: TorchOptimizer(torch.optim.SGD, lr=0.1, maximize=True),
            r"SGD options: got \['maximize'\]",
        ),
        (lambda: TorchOptimizer(torch.optim.AdamW, decoupled_weight_decay=False), "AdamW options"),
        (
            lambda: TorchOptimizer(torch.optim.RMSprop, centered=True),
            r"RMSprop options: got \['centered'\]",
        ),
        (lambda: TorchOptimizer(torch.optim.Adam, betas=(1.5, 0.9)), "Invalid beta"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_loops_can_be_changed():
    loop = TorchOptimizer(torch.optim.Adam, steps=3, lr=0.1, eps=1e-3)
    changed = loop.updated(steps=7, lr=0.2)
    assert (changed.steps, changed.lr, changed.options["eps"]) == (7, 0.2, 1e-3)
    assert (loop.steps, loop.lr) == (3, 0.1)
    assert GradientDescent(steps=2, lr=0.3).updated(steps=5) == GradientDescent(steps=5, lr=0.3)
