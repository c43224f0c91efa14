"""The learner within the modes of autograd, and meta-gradients that mean nothing."""

import copy
import random
import warnings
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crossing import every_pair
from learner.few_shot import draw_episodes, make_learner, make_network
from torch import nn

from metaimplicit import (
    BilevelProblem,
    GradientDescent,
    MetaLearner,
    TorchOptimizer,
    hypergradient,
)
from metaimplicit.gradients import warn_if_useless

MODES = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}


@cache
def results_outside_any_mode(method, vectorize):
    """Losses, accuracies, outputs of all tasks and of the first, and the meta-gradient."""
    learner = make_learner(method=method, vectorize=vectorize)
    data = draw_episodes()
    losses, accuracies = learner.evaluate(data)
    batch = learner.adapt(data.support, batched=True)(data.query[0]).detach()
    one = learner.adapt((data.support[0][0], data.support[1][0]))(data.query[0][0]).detach()
    learner.backward(data)
    return losses, accuracies, batch, one, [p.grad for p in learner.parameters()]


@pytest.mark.parametrize(
    ("mode", "method", "vectorize"),
    every_pair([*MODES, "inference mode from the start"], ["unrolled", "cg"], ["vmap", "loop"]),
)
def test_every_call_is_the_same_in_any_mode_of_autograd(mode, method, vectorize):
    expected, accuracies, batch, one, gradients = results_outside_any_mode(method, vectorize)
    learner = make_learner(method=method, vectorize=vectorize)
    data = draw_episodes()
    with MODES.get(mode, torch.inference_mode)():
        if mode not in MODES:  # inference mode marks the tensors that are drawn in it
            data = draw_episodes()
        losses, measured = learner.evaluate(data)
        assert torch.equal(losses, expected)
        assert torch.equal(measured, accuracies)
        assert torch.equal(learner.adapt(data.support, batched=True)(data.query[0]), batch)
        pair = (data.support[0][0], data.support[1][0])
        assert torch.equal(learner.adapt(pair)(data.query[0][0]), one)
        tasks = [
            tuple((x[i], y[i]) for x, y in (data.support, data.query))
            for i in range(len(data.support[0]))
        ]
        assert torch.allclose(learner.evaluate(tasks)[0], expected, rtol=1e-12)
        learner.backward(data)
    for p, gradient in zip(learner.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)
        assert not p.is_inference()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("method", "vectorize"),
    [("unrolled", "vmap"), ("dense", "vmap"), ("kfac", "vmap"), ("cg", "loop")],
)
def test_anomaly_detection_changes_nothing(method, vectorize):
    def run():
        torch.manual_seed(0)
        learner.zero_grad()
        learner.backward(draw_episodes())
        return [p.grad for p in learner.parameters()]

    inner = GradientDescent(steps=1, lr=0.3)
    learner = make_learner(method=method, inner=inner, vectorize=vectorize)
    expected = run()
    with torch.autograd.detect_anomaly(check_nan=True):
        got = run()
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "unrolled", "proximal": 0.0},
        {"method": "cg"},
        {"method": "nystrom-gaussian", "vectorize": "loop"},
        {"method": "kfac", "vectorize": "loop"},
        *(
            {"head": head, "inner": None, "method": None, "proximal": None, "vectorize": "loop"}
            for head in ("logistic", "prototypes")
        ),
    ],
    ids=lambda options: options.get("head") or options["method"],
)
def test_another_default_device_than_that_of_the_model_changes_nothing(options):
    def run():
        torch.manual_seed(0)
        step = learner.backward(data)
        gradients = [p.grad for p in learner.parameters() if p.grad is not None]
        learner.zero_grad()
        adapted = learner.adapt((data.support[0][0], data.support[1][0]))
        return [step.loss, *gradients, learner.evaluate(data)[0], adapted(data.query[0][0])]

    learner = make_learner(**options)
    data = draw_episodes()
    expected = run()
    with torch.device("meta"):
        got = run()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "unrolled", "proximal": 0.0, "learn": "lr"},
        {
            "head": "ridge",
            "inner": None,
            "method": None,
            "proximal": None,
            "learn": ["lambda", "temperature"],
        },
    ],
    ids=["lr", "ridge"],
)
def test_a_learner_that_is_made_in_inference_mode_is_the_same(options):
    model = make_network()
    gradients = []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            learner = make_learner(model, **options, vectorize="auto")
        learner.zero_grad()
        learner.backward(draw_episodes())
        gradients.append([p.grad.clone() for p in learner.parameters() if p.grad is not None])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_is_made_in_inference_mode_is_refused(frozen):
    with torch.inference_mode():
        body = nn.Linear(6, 6).double().requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"model: got '0.weight' from within torch.inference_mode"):
        make_learner(nn.Sequential(body, make_network()))


def test_a_learner_trains_after_it_was_evaluated_in_inference_mode():
    learner = make_learner(method="unrolled")
    with torch.inference_mode():
        adapted = learner.adapt(draw_episodes().support, batched=True)
        learner.evaluate(draw_episodes())
    learner.backward(draw_episodes())
    loss = adapted(draw_episodes().query[0]).square().mean()
    assert not loss.requires_grad
    assert not any(p.is_inference() for p in adapted.params.values())


class Root(nn.Module):
    """√|w·x|, whose derivative is infinite at zero."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return (x @ self.w).abs().sqrt()


X = torch.randn(2, 4, 3)
Y = torch.randn(2, 4)


@pytest.mark.parametrize("method", ["unrolled", "first-order"])
def test_a_meta_gradient_that_is_not_finite_is_warned_of_by_name(method):
    learner = MetaLearner(Root(), F.mse_loss, method=method)
    with pytest.warns(RuntimeWarning, match=r"of 'w' is not finite \(NaN in the data\?\); lower"):
        step = learner.backward(((X, Y), (X, Y)))
    assert step.loss.isnan() or step.loss.isfinite()
    assert not learner.model.w.grad.isfinite().all()


def test_a_query_set_that_is_ignored_as_a_whole_has_no_loss_and_no_accuracy():
    query = torch.full((2, 4), -100)
    support = torch.randint(5, (2, 4))
    step = MetaLearner(nn.Linear(3, 5), F.cross_entropy).backward(((X, support), (X, query)))
    assert step.loss.isnan()
    assert step.accuracy.isnan()


def test_a_meta_gradient_that_explodes_is_warned_of():
    """Where all gradients are zero, a step of Adam has the derivative 1 − lr H/ε."""
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    inner = TorchOptimizer(torch.optim.Adam, steps=4, lr=0.1)
    learner = MetaLearner(model, F.mse_loss, inner=inner)
    support = (X.double(), torch.zeros(2, 4, 1, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match=r"the meta-gradient has the norm \d\.\de\+\d\d; lower"):
        learner.backward((support, (X.double(), Y.double().unsqueeze(-1))))
    assert learner.model.weight.grad.isfinite().all()


QUIET = {
    "ordinary": {"w": torch.randn(3)},
    "zero": {"w": torch.zeros(3)},
    "large": {"w": torch.full((3,), 1e6)},
    "float64": {"w": torch.full((3,), 1e12, dtype=torch.float64)},
    "bfloat16": {"w": torch.full((3,), 1e4, dtype=torch.bfloat16)},
    "half": {"w": torch.full((3,), 1e4, dtype=torch.float16)},
    "scalar": {"w": torch.tensor(1.0)},
    "two types": {"w": torch.ones(3), "v": torch.ones(3, dtype=torch.float64)},
}
LOUD = {
    "NaN": {"w": torch.tensor([1.0, float("nan")])},
    "infinite": {"w": torch.tensor([1.0, float("-inf")])},
    "one of many": {"v": torch.ones(3), "w": torch.tensor([float("inf")])},
    "beyond round-off": {"w": torch.full((3,), 1e8)},
    "beyond round-off of float64": {"w": torch.full((3,), 1e17, dtype=torch.float64)},
    "bfloat16": {"w": torch.full((3,), 1e8, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("name", QUIET)
def test_gradients_that_mean_something_are_not_warned_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_useless(QUIET[name])


@pytest.mark.parametrize("name", LOUD)
def test_gradients_that_mean_nothing_are_warned_of(name):
    with pytest.warns(RuntimeWarning, match="the meta-gradient"):
        warn_if_useless(LOUD[name])


def test_tasks_of_several_sizes_have_one_report():
    learner = make_learner(method="cg", inner=GradientDescent(steps=3, lr=0.3))
    data = draw_episodes(tasks=3)
    tasks = []
    for i in range(3):
        support, query = ((x[i], y[i]) for x, y in (data.support, data.query))
        keep = slice(None, None if i else 3)  # the first task lacks a class
        tasks.append(((support[0][keep], support[1][keep]), query))
    report = learner.backward(tasks).report
    alone = [learner.backward([task]).report for task in tasks]
    for name in ("inner_steps", "inner_gradient_norm", "residual", "status", "error_bound"):
        joined = torch.cat([getattr(each, name) for each in alone])
        assert torch.allclose(getattr(report, name), joined, rtol=1e-9), name
    assert report.products == max(each.products for each in alone)
    assert (report.sigma, report.curvature) == (0.5, "gauss-newton")


def test_hypergradient_warns_of_a_norm_beyond_round_off():
    """A step of Adam at a zero gradient has the derivative 1 − lr H/ε = −2·10⁷ (Kingma & Ba)."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda params, meta, data: (params["w"] - meta["s"]).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    meta = {"w": torch.ones(1).double(), "s": torch.ones(1).double()}
    inner = TorchOptimizer(torch.optim.Adam, steps=1, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = hypergradient(problem, meta, None, inner=inner, method="unrolled")
    assert abs(one.grads["w"].item() / (1 - 0.1 * 2 / 1e-8) - 1) < 1e-12
    with pytest.warns(RuntimeWarning, match=r"the meta-gradient has the norm \d\.\de\+28; lower"):
        hypergradient(problem, meta, None, inner=inner.updated(steps=4), method="unrolled")


def test_hypergradient_warns_of_nan_where_the_caller_is():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda params, meta, data: params["w"].square().sum().sqrt(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    meta = {"w": torch.zeros(2), "ignored": torch.arange(2)}
    with pytest.warns(RuntimeWarning, match="'w' is not finite") as caught:
        hypergradient(problem, meta, None, inner="gradient-descent", method="unrolled")
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("vectorize", ["loop", "auto"])
def test_what_is_looked_at_first_leaves_all_random_generators_alone(vectorize):
    """A loss that draws from Python's and NumPy's generators, as layer dropout does."""
    draws = []

    def noisy(outputs, targets):
        draws.append(random.random() + np.random.rand())
        return F.cross_entropy(outputs, targets) * draws[-1]

    def draws_of_a_step(learner):
        random.seed(1)
        np.random.seed(1)
        draws.clear()
        learner.backward(draw_episodes())
        return list(draws)

    learner = MetaLearner(
        make_network(), noisy, inner=GradientDescent(steps=2, lr=0.1), vectorize=vectorize
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, _, third = (draws_of_a_step(learner) for _ in range(3))
    assert len(third) < len(first)  # which began with looks at the loss
    assert first[-len(third) :] == third


class Scaled(nn.Module):
    """A layer that keeps a tensor for the last number of rows, and that number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.rows = 0

    def forward(self, x):
        if x.shape[-2] != self.rows:
            self.rows = x.shape[-2]
            self.scale = torch.tensor(1.0 / self.rows, dtype=x.dtype)
        return self.linear(x) * self.scale


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
def test_a_module_that_keeps_a_number_beside_a_tensor_keeps_them_together(vectorize):
    torch.manual_seed(0)
    support = torch.randn(1, 3, 3).double(), torch.randn(1, 3, 1).double()
    query = torch.randn(1, 5, 3).double(), torch.randn(1, 5, 1).double()
    fresh = Scaled().double()
    used = copy.deepcopy(fresh)
    used(support[0])
    losses = []
    for model in (fresh, used):
        learner = MetaLearner(model, F.mse_loss, vectorize=vectorize)
        losses.append(learner.backward((support, query)).loss)
    assert losses[0] == losses[1]
