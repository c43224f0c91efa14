"""Vmap is compared with a loop, which is used where they differ or vmap is impossible."""

import re
import warnings

import pytest
import torch
from reported.helpers import INNER, assert_learns, cross_entropy, draw, plain_maml, split
from torch import nn
from torch.nn import functional as F
from vectorization import wrong_rules

from metaimplicit import (
    BilevelProblem,
    Composite,
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


def network(layer):
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), layer), nn.Linear(6, 5))


def differs(name):
    return pytest.warns(RuntimeWarning, match=re.escape(f"{name}: vmap differs from a loop by"))


def problem_of(model):
    return BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=Composite(
            outputs=lambda params, meta, data: torch.func.functional_call(
                model, params, (data[0][0],)
            ),
            loss=lambda outputs, data: F.cross_entropy(outputs, data[0][1]),
            module=model,
        ),
        outer_loss=lambda params, meta, data: cross_entropy(model, params, data[1]),
    )


def meta_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", WRONG)
def test_the_learner_keeps_the_loop_and_names_the_module_that_differs(name):
    model = network(WRONG[name]())
    episodes = draw()
    expected = plain_maml(model, split(episodes))
    with differs(f"module '1.1' ({name})"):
        learner = assert_learns(expected, model, episodes, vectorize="auto")
    assert learner.vectorize == "loop"
    assert f"module '1.1' ({name})" in learner.backward(draw()).report.tasks_by


@pytest.mark.parametrize("name", WRONG)
def test_hypergradient_and_argmin_keep_the_loop_as_well(name):
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

    meta = {n: m.requires_grad_() for n, m in meta_of(model).items()}
    with differs(f"module '1.1' ({name})"):
        params = argmin(problem.inner_loss, problem.init, meta, data, **how)
    losses = [
        cross_entropy(model, {n: p[i] for n, p in params.items()}, query)
        for i, (_, query) in enumerate(split(episodes))
    ]
    torch.stack(losses).mean().backward()
    torch.testing.assert_close([m.grad for m in meta.values()], list(gradients))


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
            problem_of(model), meta_of(model), data, inner=INNER, method="unrolled", batched=True
        )
    assert check.verdict.startswith("Right")


def test_adapting_alone_is_checked_as_well():
    model = network(wrong_rules.WrongValue())
    support = draw().support
    expected = MetaLearner(model, F.cross_entropy, vectorize="loop").adapt(support, batched=True)
    learner = MetaLearner(model, F.cross_entropy)
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
    learner = MetaLearner(model, F.cross_entropy)
    for _ in range(3):
        learner.backward(words(highest=4))
    other = draw(examples=5, inputs=lambda *shape: torch.randint(0, 5, (*shape, 3)))
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


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Branch(nn.Module):
    def forward(self, x):
        return 2 * x if x.sum() > 0 else x


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer(1, 6, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0].mean(1)


class Packed(Recurrent):
    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        pack = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.layer(pack)[0], batch_first=True)[0].mean(1)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)


# What torch cannot vmap, with the module that is named (None where torch raises in the backward).
IMPOSSIBLE = {
    "LSTM": (lambda: Recurrent(nn.LSTM), "LSTM"),
    "GRU": (lambda: Recurrent(nn.GRU), "GRU"),
    "RNN": (lambda: Recurrent(nn.RNN), "RNN"),
    "packed sequences": (lambda: Packed(nn.GRU), "GRU"),
    "a number": (lambda: Function(lambda x: x * x.mean().item()), "Function"),
    "control flow": (Branch, "Branch"),
    "a mask": (lambda: Function(lambda x: x * x[x > 0].mean()), "Function"),
    "in place": (lambda: Function(lambda x: torch.zeros(len(x), 6).add_(x)), "Function"),
    "numpy": (lambda: Function(lambda x: x * float(x.detach().numpy().mean())), "Function"),
    "autograd.Function": (lambda: Function(Square.apply), "Function"),
    "rrelu": (lambda: nn.RReLU().eval(), "RReLU"),
    "checkpointing": (lambda: Function(checkpointed), None),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_loop_is_kept_without_a_word_where_vmap_is_impossible(name):
    make, module = IMPOSSIBLE[name]
    model = nn.Sequential(nn.Linear(4, 6), make(), nn.Linear(6, 5))
    episodes = draw()
    expected = plain_maml(model, split(episodes))
    learner = assert_learns(expected, model, episodes, vectorize="auto")
    assert learner.vectorize == "loop"

    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "method": Unrolled(), "batched": True}
    result = hypergradient(problem_of(model), meta_of(model), data, **how)
    torch.testing.assert_close(list(result.grads.values()), list(expected[1]))
    for report in (result.report, learner.backward(episodes).report):
        assert report.tasks_by.startswith("loop: ")
        if module is not None:
            assert f"({module})" in report.tasks_by


def noisy(generator):
    return Function(lambda x: x + torch.randn(x.shape, generator=generator))


class Counting(nn.Module):
    """A network that counts its calls in a buffer, which each call reads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x)


# What has to stay under vmap, since a loop has the same derivatives.
RIGHT = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: Function(lambda x: F.dropout1d(x.unsqueeze(0)).squeeze(0)),
    "noise": lambda: Function(lambda x: x + torch.randn_like(x)),
    "noise of a generator": lambda: noisy(torch.Generator().manual_seed(0)),
    "a random choice": lambda: Function(lambda x: x * torch.bernoulli(torch.full((6,), 0.5))),
    "nothing": nn.Identity,
    "not a number": lambda: Function(lambda x: x + torch.where(x > 100, 0.0, torch.nan)),
    "amplified round-off": lambda: Function(lambda x: torch.sin(1e9 * x)),
    "batch norm": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "a zero": lambda: Function(lambda x: 0 * x),
}


@pytest.mark.parametrize("name", RIGHT)
def test_vmap_is_kept_without_a_word_where_it_is_right(name):
    model = network(RIGHT[name]())
    episodes = draw()
    data = (episodes.support, episodes.query)
    generator = torch.get_rng_state()
    problem = problem_of(model)
    seen = []
    for vectorize in ("vmap", "auto"):
        torch.set_rng_state(generator)
        result = hypergradient(
            problem,
            meta_of(model),
            data,
            inner=INNER,
            method=Unrolled(),
            batched=True,
            vectorize=vectorize,
        )
        seen.append((result, torch.get_rng_state()))
    (vmap, after_vmap), (auto, after_auto) = seen
    assert auto.report.tasks_by == "vmap"
    assert torch.equal(after_vmap, after_auto)  # the comparison consumes no random numbers
    if name != "noise of a generator":
        torch.testing.assert_close(auto.grads, vmap.grads, rtol=0, atol=0, equal_nan=True)


def test_the_comparison_leaves_buffers_and_gradients_alone():
    model = Counting()
    loop = {"inner": INNER, "method": Unrolled(), "batched": True}
    episodes = draw()
    data = (episodes.support, episodes.query)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = hypergradient(problem_of(model), meta_of(model), data, **loop)
    calls = model.calls.item()
    assert result.report.tasks_by == "vmap"
    model.calls.zero_()
    hypergradient(problem_of(model), meta_of(model), data, vectorize="vmap", **loop)
    assert calls == model.calls.item() > 0
    assert all(p.grad is None for p in model.parameters())


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
    data = Stream(lambda t: torch.randn(1000))
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


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_way_that_is_asked_for_is_taken(vectorize):
    model = network(wrong_rules.WrongValue())
    episodes = draw()
    data = (episodes.support, episodes.query)
    result = hypergradient(
        problem_of(model),
        meta_of(model),
        data,
        inner=INNER,
        method=Unrolled(),
        batched=True,
        vectorize=vectorize,
    )
    assert result.report.tasks_by == vectorize


def test_an_error_of_the_users_own_passes_as_it_is():
    model = network(nn.Identity())
    episodes = draw(inputs=lambda *shape: torch.randn(*shape, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        MetaLearner(model, F.cross_entropy, vectorize="auto").backward(episodes)
    with pytest.raises(ValueError, match="vectorize: got 'fast', expected"):
        hypergradient(
            problem_of(model),
            meta_of(model),
            (episodes.support, episodes.query),
            inner=INNER,
            method=Unrolled(),
            vectorize="fast",
        )
