"""Vmap is compared with a loop, which is used where they differ or vmap is impossible."""

import re

import pytest
import torch
from reported.helpers import INNER, assert_learns, cross_entropy, draw, plain_maml, split
from torch import nn
from torch.nn import functional as F
from vectorization import wrong_rules
from vectorization.problems import meta_of, network, problem_of

from metaimplicit import (
    BilevelProblem,
    FirstOrder,
    MetaLearner,
    Stream,
    Unrolled,
    argmin,
    check_hypergradient,
    hypergradient,
)

WRONG = {
    "WrongValue": wrong_rules.WrongValue,
    "WrongFunction": wrong_rules.WrongFunction,
    "WrongGradient": wrong_rules.WrongGradient,
    "WrongSecondDerivative": wrong_rules.WrongSecondDerivative,
    "WrongParameter": wrong_rules.WrongParameter,
    "WrongOperator": wrong_rules.WrongOperator,
}


def differs(name):
    return pytest.warns(RuntimeWarning, match=re.escape(f"{name}: vmap differs from a loop by"))


@pytest.mark.parametrize("name", ["WrongValue", "WrongParameter"])
def test_the_learner_keeps_the_loop_and_names_the_module_that_differs(name):
    model = network(WRONG[name]())
    episodes = draw()
    expected = plain_maml(model, split(episodes))
    with differs(f"module '1.1' ({name})"):
        learner = assert_learns(expected, model, episodes, vectorize="auto")
    assert learner.vectorize == "loop"
    assert f"module '1.1' ({name})" in learner.backward(draw()).report.tasks_by


@pytest.mark.parametrize("name", WRONG)
def test_hypergradient_keeps_the_loop_and_names_the_module_that_differs(name):
    model = network(WRONG[name]())
    episodes = draw()
    loss, gradients = plain_maml(model, split(episodes))
    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "method": Unrolled(), "batched": True}
    problem = problem_of(model)
    with differs(f"module '1.1' ({name})"):
        result = hypergradient(problem, meta_of(model), data, **how)
    torch.testing.assert_close(result.outer_loss, loss)
    torch.testing.assert_close(list(result.grads.values()), list(gradients))


@pytest.mark.parametrize("name", ["WrongValue", "WrongSecondDerivative"])
def test_argmin_keeps_the_loop_as_well(name):
    model = network(WRONG[name]())
    episodes = draw()
    _, gradients = plain_maml(model, split(episodes))
    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "method": Unrolled(), "batched": True}
    problem = problem_of(model)
    meta = {n: m.requires_grad_() for n, m in meta_of(model).items()}
    with differs(f"module '1.1' ({name})"):
        params = argmin(problem.inner_loss, problem.init, meta, data, **how)
    losses = [
        cross_entropy(model, {n: p[i] for n, p in params.items()}, query)
        for i, (_, query) in enumerate(split(episodes))
    ]
    torch.stack(losses).mean().backward()
    torch.testing.assert_close([m.grad for m in meta.values()], list(gradients))


def test_no_hook_is_left_behind():
    modules = torch.nn.modules.module
    of_all_modules = [modules._global_forward_hooks, modules._global_forward_pre_hooks]
    model = network(wrong_rules.WrongValue())
    with differs("module '1.1' (WrongValue)"):
        MetaLearner(model, F.cross_entropy, inner=INNER).backward(draw())
    assert not any(of_all_modules)
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())


def test_the_warning_is_given_once():
    model = network(wrong_rules.WrongValue())
    problem = problem_of(model)
    episodes = draw()
    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "method": Unrolled(), "batched": True}
    with differs("module '1.1' (WrongValue)"):
        first = hypergradient(problem, meta_of(model), data, **how)
    second = hypergradient(problem, meta_of(model), data, **how)
    assert second.report.tasks_by == first.report.tasks_by
    assert second.report.tasks_by.startswith("loop: module '1.1' (WrongValue)")
    assert torch.equal(second.outer_loss, first.outer_loss)


def test_check_hypergradient_uses_the_loop_throughout():
    model = network(wrong_rules.WrongGradient())
    episodes = draw(tasks=2)
    data = (episodes.support, episodes.query)
    with differs("module '1.1' (WrongGradient)"):
        check = check_hypergradient(
            problem_of(model),
            meta_of(model),
            data,
            inner=INNER,
            method="unrolled",
            batched=True,
            directions=1,
        )
    assert check.verdict.startswith("Right")


def test_adapting_alone_is_checked_as_well():
    model = network(wrong_rules.WrongValue())
    support = draw().support
    loop = MetaLearner(model, F.cross_entropy, inner=INNER, vectorize="loop")
    expected = loop.adapt(support, batched=True)
    learner = MetaLearner(model, F.cross_entropy, inner=INNER)
    with differs("module '1.1' (WrongValue)"):
        adapted = learner.adapt(support, batched=True)
    torch.testing.assert_close(adapted.params, expected.params)


def words(highest):
    return draw(inputs=lambda *shape: torch.randint(0, highest, (*shape, 3)))


def test_a_later_batch_is_compared_too():
    model = nn.Sequential(wrong_rules.WrongWord(), nn.Linear(6, 5))
    learner = MetaLearner(model, F.cross_entropy, inner=INNER)
    learner.backward(words(highest=4))
    model.zero_grad()
    episodes = words(highest=5)
    _, gradients = plain_maml(model, split(episodes))
    with differs("module '0' (WrongWord)"):
        learner.backward(episodes)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(gradients))


def test_every_shape_is_compared():
    model = nn.Sequential(wrong_rules.WrongWord(), nn.Linear(6, 5))
    learner = MetaLearner(model, F.cross_entropy, inner=INNER)
    for _ in range(3):
        learner.backward(words(highest=4))
    other = draw(examples=10, inputs=lambda *shape: torch.randint(0, 5, (*shape, 3)))
    with differs("module '0' (WrongWord)"):
        learner.backward(other)


def test_a_difference_outside_of_any_module_is_found_in_each_function():
    def wrong(x):
        return x / 2 if wrong_rules.is_vmapped(x) else x

    functions = {
        "init": lambda meta, data: {"w": meta["w"].clone()},
        "inner_loss": lambda params, meta, data: (params["w"] - data).square().sum(),
        "outer_loss": lambda params, meta, data: params["w"].square().sum(),
    }
    spoilt = {
        "init": lambda meta, data: {"w": meta["w"] + wrong(data)},
        "inner_loss": lambda params, meta, data: wrong((params["w"] - data).square().sum()),
        "outer_loss": lambda params, meta, data: wrong(params["w"].square().sum()),
    }
    loops = {"θ₀": "init", "f": "inner_loss", "g": "outer_loss"}
    data = torch.randn(3, 2)
    for label, name in loops.items():
        problem = BilevelProblem(**(functions | {name: spoilt[name]}))
        with pytest.warns(RuntimeWarning, match=f"^vmap differs from a loop by .* in {label}"):
            result = hypergradient(
                problem, {"w": torch.ones(2)}, data, inner=INNER, method="unrolled", batched=True
            )
        expected = hypergradient(
            problem,
            {"w": torch.ones(2)},
            data,
            inner=INNER,
            method="unrolled",
            batched=True,
            vectorize="loop",
        )
        assert torch.equal(result.grads["w"], expected.grads["w"])


class TwoLosses:
    """Two losses of one object, of which one has a hook that vmap leaves out."""

    def plain(self, params, meta, data):
        return (params["w"] - meta["c"] * data).square().sum()

    def hooked(self, params, meta, data):
        w = params["w"] * 1.0
        if w.requires_grad:
            w.register_hook(lambda g: g.clamp(-0.1, 0.1) * g.norm())
        return (w - meta["c"] * data).square().sum()


def test_every_method_of_an_object_is_compared():
    losses = TwoLosses()
    data = torch.randn(3, 4)

    def solve(loss, vectorize):
        return argmin(
            loss,
            lambda meta, data: {"w": torch.zeros(4)},
            {"c": torch.tensor(0.5)},
            data,
            inner=INNER,
            method="unrolled",
            batched=True,
            vectorize=vectorize,
        )["w"]

    for _ in range(2):
        solve(losses.plain, "auto")
    with pytest.warns(RuntimeWarning, match="vmap differs from a loop by"):
        got = solve(losses.hooked, "auto")
    torch.testing.assert_close(got, solve(losses.hooked, "loop"))


def test_many_tasks_are_compared_by_a_few_of_them():
    calls = []

    def inner_loss(params, meta, data):
        calls.append(0)
        return (params["w"] - data).square()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: params["w"].square(),
    )
    meta = {"w": torch.ones(())}
    numbers = torch.randn(INNER.steps + 1, 1000)
    data = Stream(lambda t: numbers[t])
    result = hypergradient(problem, meta, data, inner=INNER, method="unrolled", batched=True)
    assert result.report.tasks_by == "vmap"
    assert len(calls) < 50


def test_first_order_methods_are_not_asked_for_second_derivatives():
    """Their memory is what they are used for."""
    model = network(wrong_rules.WrongSecondDerivative())
    episodes = draw()
    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "batched": True}
    problem = problem_of(model)
    result = hypergradient(problem, meta_of(model), data, method=FirstOrder(), **how)
    assert result.report.tasks_by == "vmap"
    with differs("module '1.1' (WrongSecondDerivative)"):
        hypergradient(problem, meta_of(model), data, method=Unrolled(), **how)


@pytest.mark.parametrize("name", ["WrongValue", "WrongSecondDerivative"])
def test_vmap_that_is_asked_for_is_taken_with_a_warning_where_it_is_wrong(name):
    model = network(WRONG[name]())
    episodes = draw()
    problem, meta = problem_of(model), meta_of(model)
    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "method": Unrolled(), "batched": True}
    with differs(f"module '1.1' ({name})"):
        result = hypergradient(problem, meta, data, vectorize="vmap", **how)
    assert result.report.tasks_by == "vmap"
    with differs(f"module '1.1' ({name})"):
        argmin(problem.inner_loss, problem.init, meta, data, vectorize="vmap", **how)
    result = hypergradient(problem, meta, data, vectorize="loop", **how)  # without a warning
    assert result.report.tasks_by == "loop"


def test_a_learner_compares_its_vmap_once():
    model = network(wrong_rules.WrongValue())
    learner = MetaLearner(model, F.cross_entropy, inner=INNER, vectorize="vmap")
    with pytest.warns(RuntimeWarning) as caught:
        learner.backward(draw())
    assert sum("vmap differs" in str(warning.message) for warning in caught) == 1


def test_an_error_of_the_users_own_passes_as_it_is():
    model = network(nn.Identity())
    episodes = draw(inputs=lambda *shape: torch.randn(*shape, 3))
    for door in ("backward", "adapt"):
        learner = MetaLearner(model, F.cross_entropy, inner=INNER)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            learner.backward(episodes) if door == "backward" else learner.adapt(
                episodes.support, batched=True
            )
    with pytest.raises(ValueError, match="vectorize: got 'fast', expected"):
        hypergradient(
            problem_of(model),
            meta_of(model),
            (episodes.support, episodes.query),
            inner=INNER,
            method=Unrolled(),
            vectorize="fast",
        )


def test_vmap_is_compared_in_full_precision_and_the_setting_comes_back():
    seen = []

    def loss(params, meta, data):
        seen.append(torch.get_float32_matmul_precision())
        return (params["w"] * data).sum()

    problem = BilevelProblem(lambda meta, data: dict(meta), loss, loss)
    torch.set_float32_matmul_precision("medium")
    try:
        how = {"inner": INNER, "method": Unrolled(), "batched": True}
        hypergradient(problem, {"w": torch.ones(2)}, torch.ones(3, 2), **how)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {"highest", "medium"} == set(seen)


def of_its_own_generator(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def of_the_seeded_global_one(x):
    torch.manual_seed(0)
    return torch.randn(x.shape)


class Noisy(nn.Module):
    """The same noise at every call."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x):
        return x * (1 + self.noise(x))


@pytest.mark.parametrize("noise", [of_its_own_generator, of_the_seeded_global_one])
def test_a_loss_that_seeds_its_generator_draws_the_same_numbers_for_every_task(noise):
    model = nn.Sequential(network(nn.Tanh()), Noisy(noise))
    episodes = draw()
    expected = plain_maml(model, split(episodes))
    with pytest.warns(RuntimeWarning, match="because a loss seeds a generator by itself"):
        learner = assert_learns(expected, model, episodes, vectorize="auto")
    assert learner.vectorize == "loop"
