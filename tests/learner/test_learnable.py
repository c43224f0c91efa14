"""Numbers of the inner problem that are learnt with the initialisation."""

import pytest
import torch
from learner.few_shot import (
    assert_gradients_match_differences,
    draw_episodes,
    make_learner,
)
from oracles import relative_error

from metaimplicit import CG, GradientDescent, Implicit, TorchOptimizer, Truncated

NAMES = ("weight", "bias")


@pytest.mark.parametrize(
    ("granularity", "count"), [("scalar", 1), ("per-tensor", 4), ("per-element", 4)]
)
def test_the_gradients_of_step_sizes_and_proximal_strength_match_differences(granularity, count):
    learner = make_learner(method="unrolled", learn={"lr": granularity, "proximal": "scalar"})
    assert len(learner.learnt) == count + 1
    logs = [p for name, p in learner.learnt.items() if name.startswith("log_lr")]
    assert all(torch.allclose(p.exp(), torch.full_like(p, 0.3)) for p in logs)
    if granularity == "per-element":
        assert sum(p.numel() for p in logs) == sum(p.numel() for p in learner.model.parameters())
    learner.backward(draw_episodes())
    assert_gradients_match_differences(learner, learner.learnt.values())


def test_the_step_size_of_an_optimiser_of_torch_is_learnt():
    adam = TorchOptimizer(torch.optim.Adam, steps=2, lr=0.1)
    learner = make_learner(method="unrolled", inner=adam, learn={"lr"})
    learner.backward(draw_episodes())
    assert len(learner.learnt) == 1
    assert_gradients_match_differences(learner, learner.learnt.values())


@pytest.mark.slow
def test_an_implicit_method_learns_the_proximal_strength_as_unrolling_to_the_argmin_does():
    options = {"inner": GradientDescent(steps=50, lr=0.3), "learn": {"proximal"}, "proximal": 2.0}
    exact = Implicit(CG(max_steps=60, tol=1e-12), curvature="hessian")
    implicit = make_learner(method=exact, **options)
    unrolled = make_learner(method="unrolled", **options)
    implicit.backward(draw_episodes())
    unrolled.backward(draw_episodes())
    for p, q in zip(implicit.parameters(), unrolled.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-6


def test_learnt_numbers_are_logarithms():
    learner = make_learner(method="unrolled", learn={"lr", "proximal"}, proximal=0.7)
    assert learner.learnt["log_proximal"].exp().item() == pytest.approx(0.7)
    assert learner.learnt["log_lr"].exp().item() == pytest.approx(0.3)


def test_a_state_dict_holds_every_learnt_number():
    learner = make_learner(method="unrolled", learn={"lr": "per-tensor"})
    other = make_learner(method="unrolled", learn={"lr": "per-tensor"})
    assert [name for name in learner.state_dict() if name.startswith("learnt.")] == [
        "learnt.log_lr/0/bias",
        "learnt.log_lr/0/weight",
        "learnt.log_lr/2/bias",
        "learnt.log_lr/2/weight",
    ]
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.1)
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other.evaluate(draw_episodes())[0], learner.evaluate(draw_episodes())[0])


SCHEDULES = {
    "each step": ([0.3, 0.2], "scalar", ["log_lr[0]", "log_lr[1]"]),
    "each layer": ({"0": 0.3, "2": 0.1}, "scalar", ["log_lr.0", "log_lr.2"]),
    "patterns": ({"*.bias": 0.3, "*": 0.1}, "scalar", ["log_lr.*", "log_lr.*.bias"]),
    "each step of a layer": (
        {"0": [0.3, 0.1], "*": 0.2},
        "scalar",
        ["log_lr.*", "log_lr.0[0]", "log_lr.0[1]"],
    ),
    "each layer of a step": (
        [0.3, {"0": 0.2, "2": 0.1}],
        "scalar",
        ["log_lr[0]", "log_lr[1].0", "log_lr[1].2"],
    ),
    "each tensor of each step": (
        [0.3, 0.2],
        "per-tensor",
        [f"log_lr[{t}].{layer}.{name}" for t in range(2) for layer in (0, 2) for name in NAMES],
    ),
    "each element of each step": (
        [0.3, 0.2],
        "per-element",
        [f"log_lr[{t}].{layer}.{name}" for t in range(2) for layer in (0, 2) for name in NAMES],
    ),
    "each tensor of a layer": (
        {"0": 0.3, "2.weight": 0.1, "2.bias": 0.2},
        "per-tensor",
        [
            "log_lr.0.0.bias",
            "log_lr.0.0.weight",
            "log_lr.2.bias.2.bias",
            "log_lr.2.weight.2.weight",
        ],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_step_sizes_of_layers_and_steps_are_learnt(name):
    lr, granularity, names = SCHEDULES[name]
    options = {"inner": GradientDescent(steps=2, lr=lr), "method": "unrolled"}
    learner = make_learner(learn={"lr": granularity}, **options)
    assert sorted(learner.learnt.by_name()) == sorted(names)
    fixed = make_learner(vectorize="loop", **options)
    losses = learner.evaluate(draw_episodes())[0]
    assert torch.allclose(losses, fixed.evaluate(draw_episodes())[0], rtol=1e-12)

    learner.backward(draw_episodes())
    for p in learner.learnt.values():
        assert p.grad.abs().max() > 0
    assert_gradients_match_differences(learner, learner.learnt.values())
    other = make_learner(learn={"lr": granularity}, **options)
    other.load_state_dict(learner.state_dict())
    options |= {"method": "forward", "vectorize": "loop"}
    forward = make_learner(learn={"lr": granularity}, **options)
    forward.backward(draw_episodes())
    for p, q in zip(learner.learnt.values(), forward.learnt.values(), strict=True):
        assert relative_error(q.grad, p.grad) < 1e-10


def test_numbers_of_steps_are_learnt_only_by_methods_that_differentiate_the_steps():
    options = {"inner": GradientDescent(steps=3, lr=[0.3, 0.2, 0.1]), "learn": {"lr"}}
    for method in ("cg", "first-order", "sama"):
        with pytest.raises(ValueError, match=r"learn 'lr': .* cannot give its gradient"):
            make_learner(method=method, **options)
    learner = make_learner(method=Truncated(2), **options)
    with pytest.raises(ValueError, match="reads the numbers of its first 1 steps from meta"):
        learner.backward(draw_episodes())
    learner = make_learner(method=Truncated(3), **options)
    learner.backward(draw_episodes())
    with pytest.raises(ValueError, match="for 9 steps, expected one for each step"):
        learner.evaluate(draw_episodes(), steps=9)
    assert learner.evaluate(draw_episodes(), steps=1)[0].shape[0] == 2
