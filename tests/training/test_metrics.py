"""Means with their intervals, and what `evaluate` counts."""

import inspect
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training.sinusoid_run import make_sampler

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner import Episode
from metaimplicit.models import MLP
from metaimplicit.normalization import BatchNorm
from metaimplicit.training import (
    Estimate,
    Predictions,
    evaluate,
    evaluate_one_at_a_time,
    peak_memory,
    predict_classes,
)
from metaimplicit.training.predictions import Confusion


def make_learner(model):
    inner = GradientDescent(2, lr=0.01)
    return MetaLearner(model, F.mse_loss, inner=inner, method="unrolled")


def test_the_interval_is_196_standard_errors_of_the_sample_deviation():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert estimate.mean == 3.0
    # The deviations are −2, −1, 0 and 3, so s² = 14/3.
    assert estimate.interval == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2, rel=1e-14)
    assert estimate.tasks == 4
    with pytest.raises(ValueError, match=r"values: got shape \(1,\), expected \[n\]"):
        Estimate.of(torch.ones(1))


@pytest.mark.parametrize("value", [1 / 3, 0.1, 1e30, -7.7])
@pytest.mark.parametrize("tasks", [2, 7, 600])
def test_equal_values_have_no_deviation(value, tasks):
    estimate = Estimate.of(torch.full((tasks,), value, dtype=torch.float64))
    assert (estimate.mean, estimate.interval) == (value, 0.0)


def test_a_mean_of_what_is_not_finite_is_not_finite():
    for first, second in itertools.permutations([1.0, math.inf, -math.inf, math.nan], 2):
        estimate = Estimate.of(torch.tensor([first, second]))
        assert not math.isfinite(estimate.mean)
        assert not math.isfinite(estimate.interval)


def test_a_paired_interval_is_that_of_the_differences_of_the_tasks():
    values = torch.tensor([0.9, 0.7, 0.8, 1.0], dtype=torch.float64)
    others = torch.tensor([0.8, 0.7, 0.5, 1.0], dtype=torch.float64)
    estimate = Estimate.of_difference(values, others)
    # The differences are 0.1, 0, 0.3 and 0, with the mean 0.1, so s² = (0 + 0.01 + 0.04 + 0.01)/3.
    assert estimate.mean == pytest.approx(0.1, rel=1e-14)
    assert estimate.interval == pytest.approx(1.96 * (0.06 / 3) ** 0.5 / 2, rel=1e-14)
    assert estimate.tasks == 4
    with pytest.raises(ValueError, match=r"others: got shape \(3,\), expected \(4,\)"):
        Estimate.of_difference(values, others[:3])


def test_evaluate_has_the_learners_numbers_for_the_tasks_asked_for():
    learner = make_learner(MLP(1, 1))
    sampler = make_sampler(tasks_per_batch=3, seed=1)
    result = evaluate(learner, (sampler[i] for i in range(2)), tasks=5)
    assert result.metric == "mse"
    assert result.losses.shape == (3, 5)
    expected, _ = learner.evaluate(sampler[0])
    torch.testing.assert_close(result.losses[:, :3], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "options", "name"),
    [
        (F.mse_loss, {}, "mse"),
        (nn.MSELoss(), {}, "mse"),
        (nn.MSELoss(reduction="sum"), {}, "loss"),
        (F.l1_loss, {}, "loss"),
        (F.mse_loss, {"query_loss": F.l1_loss}, "loss"),
        (F.l1_loss, {"query_loss": F.mse_loss}, "mse"),
        (F.mse_loss, {"metric": F.l1_loss}, "metric"),
    ],
)
def test_an_evaluation_names_what_it_measured(loss, options, name):
    learner = MetaLearner(MLP(1, 1), loss, **options)
    result = evaluate(learner, [make_sampler(tasks_per_batch=3, seed=1)[0]], steps=[0])
    assert (result.metric, result.summary()["metric"]) == (name, name)
    has_metric = name == "metric"
    assert result.values is (result.accuracies if has_metric else result.losses)


def test_evaluate_measures_after_plain_gradient_descent():
    learner = make_learner(MLP(1, 1))
    sampler = make_sampler(tasks_per_batch=3, seed=1)
    result = evaluate(learner, [sampler[0]])
    support, query = ([x[1] for x in pair] for pair in (sampler[0].support, sampler[0].query))
    model = MLP(1, 1)
    model.load_state_dict(learner.model.state_dict())
    descent = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        descent.zero_grad()
        F.mse_loss(model(support[0]), support[1]).backward()
        descent.step()
    expected = F.mse_loss(model(query[0]), query[1]).detach()
    torch.testing.assert_close(result.losses[2, 1], expected, rtol=1e-5, atol=0)


def test_an_evaluation_has_the_numbers_of_steps_that_it_was_measured_after():
    sampler = make_sampler(tasks_per_batch=3, seed=1)
    result = evaluate(make_learner(MLP(1, 1)), [sampler[0]], steps=[0, 3, 7])
    assert result.steps == (0, 3, 7)
    assert [row["steps"] for row in result.summary()["after_steps"]] == [0, 3, 7]
    assert result.summary()["inner_steps"] == 7


def test_evaluate_refuses_no_batches_and_negative_steps():
    learner = make_learner(MLP(1, 1))
    with pytest.raises(ValueError, match="batches: got none"):
        evaluate(learner, [])
    with pytest.raises(ValueError, match="steps: got -1"):
        evaluate(learner, [make_sampler(tasks_per_batch=3, seed=1)[0]], steps=-1)
    with pytest.raises(ValueError, match="tasks: got 0, expected at least 1"):
        evaluate(learner, [make_sampler(tasks_per_batch=3, seed=1)[0]], tasks=0)


@pytest.mark.parametrize("measure", [evaluate, evaluate_one_at_a_time])
def test_one_batch_in_the_place_of_several_is_refused(measure):
    batch = make_sampler(tasks_per_batch=3, seed=1)[0]
    for one in (batch, {"support": batch.support, "query": batch.query}):
        with pytest.raises(ValueError, match="batches: got one batch, expected several; put it in"):
            measure(make_learner(MLP(1, 1)), one)


@pytest.mark.parametrize("measure", [evaluate, evaluate_one_at_a_time])
def test_no_more_batches_are_drawn_than_the_tasks_that_count(measure):
    inner = GradientDescent(2, lr=0.01)
    learner = MetaLearner(MLP(1, 1), F.mse_loss, inner=inner, metric=F.mse_loss)
    sampler = make_sampler(tasks_per_batch=3, seed=1)
    result = measure(learner, sampler, tasks=4)
    assert (len(result.losses[0]) if measure is evaluate else result.tasks) == 4
    assert sampler.position == 2
    with pytest.raises(ValueError, match="tasks: got 600, expected at most 3, the tasks of all"):
        measure(learner, [sampler[0]], tasks=600)
    with pytest.raises(ValueError, match="batches: got EpisodeSampler, which has no end, expected"):
        measure(learner, sampler)


class OwnBatches:
    """An iterable with an end that has a method of the same name as a sampler."""

    def __init__(self, batch):
        self.batch = batch

    def batches(self):
        return [self.batch]

    def __iter__(self):
        return iter(self.batches())


@pytest.mark.parametrize("measure", [evaluate, evaluate_one_at_a_time])
def test_batches_with_an_end_are_measured_whatever_methods_they_have(measure):
    inner = GradientDescent(2, lr=0.01)
    learner = MetaLearner(MLP(1, 1), F.mse_loss, inner=inner, metric=F.mse_loss)
    batch = make_sampler(tasks_per_batch=3, seed=1)[0]
    own, plain = measure(learner, OwnBatches(batch)), measure(learner, [batch])
    assert str(own) == str(plain)


def test_outputs_that_are_not_numbers_predict_no_class():
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, torch.nan)
    learner = MetaLearner(model, F.cross_entropy)
    pair = (torch.randn(1, 3, 2), torch.tensor([[0, 1, 2]]))
    assert evaluate(learner, [Episode.of(pair, pair)], steps=[0]).accuracies.tolist() == [[0.0]]
    predictions = predict_classes(learner, [Episode.of(pair, pair)], steps=0, tasks=1)
    assert predictions.accuracies.tolist() == [0.0]
    assert predictions.wrong.all()
    classes = torch.tensor([[4, 5, 6]])
    probabilities = torch.tensor([[[torch.nan] * 3, [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    predictions = Predictions(probabilities, pair[1], classes)
    assert Confusion.of(predictions).counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_evaluate_takes_numbers_of_steps_in_an_array():
    batches = [make_sampler(tasks_per_batch=3, seed=1)[0]]
    learner = make_learner(MLP(1, 1))
    assert evaluate(learner, batches, steps=np.array([0, 2])).steps == (0, 2)
    assert evaluate(learner, batches, steps=np.int64(1)).steps == (0, 1)


def test_evaluate_leaves_every_module_in_the_mode_that_it_had():
    model = nn.Sequential(MLP(1, 8), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(8, 1))
    learner = make_learner(model)
    model[1].eval()
    evaluate(learner, [make_sampler(tasks_per_batch=3, seed=1)[0]])
    assert learner.training
    assert (model.training, model[1].training, model[2].training) == (True, False, True)


class MergesInEvaluationMode(nn.Module):
    """Adds 1 to its weights in evaluation mode, and takes it away for training."""

    def __init__(self):
        super().__init__()
        self.layer = MLP(1, 1)
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            with torch.no_grad():
                for p in self.layer.parameters():
                    p.add_(-1.0 if mode else 1.0)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return self.layer(x)


def test_evaluate_returns_to_training_mode_by_the_modules_own_method():
    model = MergesInEvaluationMode()
    before = [p.detach().clone() for p in model.parameters()]
    evaluate(make_learner(model), [make_sampler(tasks_per_batch=3, seed=1)[0]])
    for p, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-6)


def test_queries_one_at_a_time_are_normalised_without_each_other():
    torch.manual_seed(0)
    patterns = torch.rand(5, 3, 1, 28, 28)

    def draw(examples):
        targets = torch.arange(3).repeat(examples)
        return patterns[:, targets] + torch.rand(5, 3 * examples, 1, 28, 28), targets.expand(5, -1)

    episodes = SimpleNamespace(support=draw(2), query=draw(4))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=9), BatchNorm(4), nn.Flatten(), nn.LazyLinear(3)
    )
    model(episodes.query[0][0])
    inner = GradientDescent(3, lr=0.5)
    learner = MetaLearner(model, F.cross_entropy, inner=inner, method="unrolled")
    estimate = evaluate_one_at_a_time(learner, [episodes])

    accuracies = []
    for task in range(5):
        adapted = learner.adapt(tuple(x[task] for x in episodes.support))
        inputs, targets = (x[task] for x in episodes.query)
        classes = [adapted(inputs[i : i + 1]).argmax().item() for i in range(len(inputs))]
        right = [c == t for c, t in zip(classes, targets.tolist(), strict=True)]
        accuracies.append(sum(right) / len(right))
    assert estimate.mean == pytest.approx(sum(accuracies) / 5, rel=1e-12)
    together = evaluate(learner, [episodes], steps=[3]).curve()[-1]
    assert together.mean != estimate.mean


class NamedNet(nn.Module):
    """The classes of sequences of numbers, of which a mask says how long they are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids, mask):
        return self.head((self.embedding(ids) * mask[..., None]).sum(1))


def draw_named(examples):
    inputs = {"ids": torch.randint(11, (examples, 5)), "mask": torch.ones(examples, 5)}
    return inputs, torch.randint(3, (examples,))


def draw_ignored(ignored):
    """Tasks of 9 queries, of which the last 3 have another label."""
    pair = (torch.randn(4, 9, 2), torch.arange(3).repeat(3).expand(4, -1))
    targets = pair[1].clone()
    targets[:, 6:] = ignored
    return {"support": pair, "query": (torch.randn(4, 9, 2), targets)}


def ragged_tasks():
    tasks = [(draw_named(4), draw_named(5)), (draw_named(6), draw_named(7))]
    return MetaLearner(NamedNet(), F.cross_entropy), tasks


def weighted_learner():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0]))
    return MetaLearner(nn.Linear(2, 3), loss), draw_ignored(0)


def metric_learner():
    learner = MetaLearner(nn.Linear(2, 3), F.cross_entropy, metric=F.cross_entropy)
    return learner, draw_ignored(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (MetaLearner(nn.Linear(2, 3), F.cross_entropy), draw_ignored(-100)),
        weighted_learner,
        metric_learner,
        ragged_tasks,
    ],
    ids=["an ignored label", "a class without weight", "a metric", "named inputs of two sizes"],
)
def test_without_statistics_of_a_batch_queries_one_at_a_time_are_measured_as_together(make):
    torch.manual_seed(0)
    learner, batch = make()
    together = evaluate(learner, [batch], steps=[3]).curve()[-1]
    estimate = evaluate_one_at_a_time(learner, [batch], steps=3)
    assert estimate.mean == pytest.approx(together.mean, rel=1e-5)
    assert estimate.interval == pytest.approx(together.interval, rel=1e-5)


def test_queries_that_are_no_classes_or_have_no_axis_of_their_own_are_refused_one_at_a_time():
    regression = make_learner(MLP(1, 1))
    with pytest.raises(ValueError, match="a loss that treats no targets as classes"):
        evaluate_one_at_a_time(regression, [make_sampler(tasks_per_batch=3, seed=1)[0]])
    with pytest.raises(ValueError, match="batches: got none"):
        evaluate_one_at_a_time(regression, [])

    learner, (episode, _) = ragged_tasks()
    inputs, targets = episode[1]
    with_shared = (inputs | {"mask": torch.ones(1, 5)}, targets)
    with pytest.raises(ValueError, match=r"shapes \[\(1, 5, 5\), \(1, 1, 5\)\], expected each"):
        evaluate_one_at_a_time(learner, [[(episode[0], with_shared)]])


ASK_PEAK = f"""
from __future__ import annotations
import resource, sys
from pathlib import Path
from types import SimpleNamespace

{inspect.getsource(peak_memory)}

print(peak_memory(SimpleNamespace(type="cpu")))  # torch takes long to import
"""


def test_the_peak_memory_is_not_that_of_the_process_that_started_this_one():
    held = b"x" * 2**28
    answer = subprocess.run([sys.executable, "-c", ASK_PEAK], capture_output=True, check=True)
    assert float(answer.stdout) < peak_memory(torch.device("cpu")) - len(held) / 2**21
