"""`NewtonCG` in methods, in the learner, and on the command line."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command_line import RunOptions, build_learner
from oracles import randn, relative_error, ridge
from torch import nn

from metaimplicit import (
    BilevelProblem,
    GradientDescent,
    MetaLearner,
    NewtonCG,
    Unrolled,
    argmin,
    hypergradient,
)

TASKS = 2


def test_hypergradients_are_those_of_the_closed_form_and_of_gradient_descent():
    oracle = ridge(m=60)
    descent = GradientDescent(steps=40, lr=0.68)
    for inner, tolerance in ((NewtonCG(tol=1e-10), 1e-8), (descent, 1e-8), ("newton-cg", 1e-5)):
        result = hypergradient(
            oracle.problem, oracle.meta, oracle.data, inner=inner, method="dense", batched=True
        )
        error = relative_error(result.grads["log_decay"], oracle.exact["log_decay"])
        assert error < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_the_learner_takes_it_by_its_flag(vectorize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    labels = torch.arange(4).expand(TASKS, -1)
    pair = (randn(TASKS, 4, 6, seed=0), labels)
    data = SimpleNamespace(support=pair, query=(randn(TASKS, 4, 6, seed=1), labels))
    options = {"method": "cg", "proximal": 5.0, "vectorize": vectorize}
    grads = {}
    for inner in ("newton-cg", GradientDescent(steps=16, lr=0.18)):
        learner = MetaLearner(model, F.cross_entropy, inner=inner, **options)
        model.zero_grad()
        step = learner.backward(data)
        grads[str(inner)] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert step.report.inner_gradient_norm.max() < 2e-5
    newton, descent = grads.values()
    assert relative_error(newton, descent) < 1e-5

    learner = MetaLearner(
        model, F.cross_entropy, inner="newton-cg", proximal=5.0, vectorize=vectorize
    )
    losses, accuracies = learner.evaluate(data, steps=4)
    assert losses.shape == accuracies.shape == (5, TASKS)
    assert relative_error(losses[-1].mean(), step.loss) < 1e-5
    assert learner.adapt((pair[0][0], labels[0])).params["0.weight"].shape == (5, 6)


def test_the_command_line_builds_it():
    family = SimpleNamespace(kind="regression", input_shape=(1,), outputs=1)
    options = RunOptions(
        inner_optimizer="newton-cg", inner_steps=3, inner_options={"cg_steps": 7}, device="cpu"
    )
    assert build_learner(options, family).inner == NewtonCG(steps=3, cg_steps=7)
    images = SimpleNamespace(kind="classification", input_shape=(1, 16, 16), outputs=2)
    features = build_learner(replace(options, activation="gelu"), images).model.features
    assert sum(isinstance(layer, nn.GELU) for layer in features) == 4


# refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("unrolled", r"NewtonCG with a method that differentiates steps, expected an implicit"),
        ("truncated", r"NewtonCG with a method that differentiates steps, expected an implicit"),
        (Unrolled(iterates=True), r"NewtonCG with a method that differentiates steps"),
        ("forward", r"NewtonCG, whose steps are not differentiable"),
    ],
)
def test_a_method_that_differentiates_steps_is_refused(method, message):
    oracle = ridge()
    with pytest.raises(ValueError, match=f"inner: got {message}"):
        hypergradient(
            oracle.problem,
            oracle.meta,
            oracle.data,
            inner="newton-cg",
            method=method,
            batched=True,
        )


def test_an_unknown_flag_is_refused_with_the_known_ones():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2)},
        inner_loss=lambda params, meta, data: (params["w"] - meta["c"]).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    meta = {"c": torch.ones(2)}
    message = r"inner: got 'tron', expected one of gradient-descent, .*lbfgs, newton-cg, "
    with pytest.raises(ValueError, match=message):
        hypergradient(problem, meta, None, inner="tron", method="cg")
    with pytest.raises(ValueError, match="inner: got 'tron', expected one of"):
        argmin(problem.inner_loss, problem.init, meta, None, inner="tron", method="cg")


def test_it_has_no_step_size_to_learn():
    with pytest.raises(ValueError, match="learn 'lr': got it with NewtonCG, which has no step"):
        MetaLearner(nn.Linear(2, 1), F.mse_loss, inner="newton-cg", method="unrolled", learn={"lr"})
