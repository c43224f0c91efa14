"""Targets of every kind: what the learner computes, and what it measures, against a plain loop."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from learner.plain_loop import LR, STEPS, assert_learns, assert_same, plain_maml
from oracles import randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner import Pair
from metaimplicit.learner.checks import TargetCheck

TASKS = 2
EXAMPLES = 10
FEATURES = 4
LENGTH = 6
WAYS = 5
pytestmark = pytest.mark.usefixtures("float64")


class Reshaped(nn.Module):
    """A linear layer whose outputs have a given shape for each example."""

    def __init__(self, *shape, move=None):
        super().__init__()
        self.linear = nn.Linear(FEATURES, torch.Size(shape).numel())
        self.shape = shape
        self.move = move

    def forward(self, x):
        z = self.linear(x).reshape(len(x), *self.shape)
        return z if self.move is None else z.movedim(*self.move)


class Tagger(nn.Module):
    """Scores for every word of every sequence, with the classes on the last axis."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, FEATURES)
        self.head = nn.Linear(FEATURES, WAYS)

    def forward(self, words):
        return self.head(self.words(words).tanh())


def some_labels(*shape):
    return torch.randint(WAYS, shape or (EXAMPLES,))


def features():
    return torch.randn(EXAMPLES, FEATURES)


def with_holes(labels, value):
    """Labels of which about a third is replaced by a value."""
    return labels.where(torch.rand(labels.shape) > 0.3, value)


def focal_loss(outputs, targets):
    """(1 − p)² of the cross-entropy (Lin et al. 2017)."""
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).mean()


def hinge_loss(outputs, targets):
    """The mean over all pairs of (1 + z_j − z_y)₊², with a margin of one."""
    margins = 1 + outputs - outputs.gather(1, targets[:, None])
    return margins.clamp(min=0).square().mean()


def squared_distance_to_one_hot(outputs, targets):
    return (outputs - F.one_hot(targets, outputs.shape[1])).square().mean()


class OwnCrossEntropy(nn.Module):
    """Cross-entropy from its formula, which skips the examples of a label."""

    def __init__(self, skip):
        super().__init__()
        self.skip = skip

    def forward(self, outputs, targets):
        counts = targets != self.skip
        logs = outputs.log_softmax(1).gather(1, targets.where(counts, 0)[:, None]).squeeze(1)
        return -(logs * counts).sum() / counts.sum()


def classes_last(loss):
    """A loss of outputs with the classes on the last axis."""
    return lambda outputs, targets: loss(outputs.movedim(-1, 1), targets)


def masked_cross_entropy(outputs, targets):
    losses = F.cross_entropy(outputs, targets["label"], reduction="none")
    return (losses * targets["mask"]).sum() / targets["mask"].sum()


@dataclass(frozen=True)
class Kind:
    """Targets, a model and a loss for them, and which predictions count.

    `axis` is that of the classes in the outputs of a task. None: there is no accuracy.
    """

    targets: Callable[[], Any]
    loss: Callable[[Tensor, Any], Tensor] = F.cross_entropy
    model: Callable[[], nn.Module] = lambda: nn.Linear(FEATURES, WAYS)
    axis: int | None = 1
    counts: Callable[[Tensor], Tensor] = field(default=lambda y: torch.ones_like(y, dtype=bool))
    inputs: Callable[[], Tensor] = features

    def draw(self):
        pair = lambda: (self.inputs(), self.targets())  # noqa: E731
        return [(pair(), pair()) for _ in range(TASKS)]


def labels_of(targets):
    return targets["label"] if isinstance(targets, dict) else targets


CLASSES = {
    "int64": Kind(some_labels),
    "uint8": Kind(lambda: some_labels().byte()),
    "int32": Kind(lambda: some_labels().int()),
    "int16": Kind(lambda: some_labels().short()),
    "ignore_index": Kind(lambda: with_holes(some_labels(), -100), counts=lambda y: y != -100),
    "ignore_index of uint8": Kind(
        lambda: with_holes(some_labels(), 255).byte(),
        nn.CrossEntropyLoss(ignore_index=255),
        counts=lambda y: y != 255,
    ),
    "ignore_index among the classes": Kind(
        some_labels, nn.CrossEntropyLoss(ignore_index=0), counts=lambda y: y != 0
    ),
    "ignore_index of the last class": Kind(
        some_labels,
        nn.CrossEntropyLoss(ignore_index=WAYS - 1),
        counts=lambda y: y != WAYS - 1,
    ),
    "the last class without weight": Kind(
        some_labels,
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])),
        counts=lambda y: y != 4,
    ),
    "own loss that skips a class": Kind(
        some_labels, OwnCrossEntropy(skip=3), counts=lambda y: y != 3
    ),
    "own loss that skips -1": Kind(
        lambda: with_holes(some_labels(), -1), OwnCrossEntropy(skip=-1), counts=lambda y: y != -1
    ),
    "a class without weight": Kind(
        some_labels,
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])),
        counts=lambda y: y != 2,
    ),
    "label smoothing": Kind(some_labels, nn.CrossEntropyLoss(label_smoothing=0.2)),
    "sum": Kind(some_labels, nn.CrossEntropyLoss(reduction="sum")),
    "log-softmax": Kind(some_labels, lambda z, y: F.nll_loss(z.log_softmax(1), y)),
    "focal": Kind(some_labels, focal_loss),
    "hinge": Kind(some_labels, hinge_loss),
    "squared distance to one-hot": Kind(some_labels, squared_distance_to_one_hot),
    "one-against-all": Kind(
        some_labels,
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, WAYS).double()),
    ),
    "sequences": Kind(lambda: some_labels(EXAMPLES, LENGTH), model=lambda: Reshaped(WAYS, LENGTH)),
    "sequences with classes last": Kind(
        lambda: some_labels(EXAMPLES, LENGTH),
        classes_last(F.cross_entropy),
        lambda: Reshaped(LENGTH, WAYS),
        axis=2,
    ),
    "as many steps as classes": Kind(
        lambda: some_labels(EXAMPLES, WAYS),
        classes_last(F.cross_entropy),
        lambda: Reshaped(WAYS, WAYS),
        axis=2,
    ),
    "flattened sequences": Kind(
        lambda: with_holes(some_labels(EXAMPLES, LENGTH), -100),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
        lambda: Reshaped(LENGTH, WAYS),
        axis=2,
        counts=lambda y: y != -100,
    ),
    "classes first": Kind(
        some_labels,
        lambda z, y: F.cross_entropy(z.T, y),
        lambda: Reshaped(WAYS, move=(1, 0)),
        axis=0,
    ),
    "as many examples as classes": Kind(
        lambda: some_labels(WAYS), inputs=lambda: torch.randn(WAYS, FEATURES)
    ),
    "segmentation": Kind(
        lambda: with_holes(some_labels(EXAMPLES, 2, 3), 255).byte(),
        nn.CrossEntropyLoss(ignore_index=255),
        lambda: Reshaped(WAYS, 2, 3),
        counts=lambda y: y != 255,
    ),
    "words": Kind(
        lambda: with_holes(some_labels(EXAMPLES, LENGTH), -100),
        classes_last(F.cross_entropy),
        Tagger,
        axis=2,
        counts=lambda y: y != -100,
        inputs=lambda: torch.randint(20, (EXAMPLES, LENGTH)),
    ),
    "one example": Kind(lambda: some_labels(1), inputs=lambda: torch.randn(1, FEATURES)),
    "one class": Kind(
        lambda: torch.zeros(EXAMPLES, dtype=torch.int64), model=lambda: nn.Linear(FEATURES, 1)
    ),
    "many classes": Kind(
        lambda: torch.randint(200, (EXAMPLES,)), model=lambda: nn.Linear(FEATURES, 200)
    ),
    "a mask beside the labels": Kind(
        lambda: {"label": some_labels(), "mask": (torch.rand(EXAMPLES) > 0.3).double()},
        masked_cross_entropy,
    ),
}
NUMBERS = {
    "one number": Kind(lambda: torch.randn(EXAMPLES, 1), F.mse_loss, lambda: Reshaped(1)),
    "one number without an axis": Kind(lambda: torch.randn(EXAMPLES), F.mse_loss, Reshaped),
    "a squeezing loss": Kind(
        lambda: torch.randn(EXAMPLES),
        lambda z, y: F.mse_loss(z.squeeze(-1), y),
        lambda: Reshaped(1),
    ),
    "an indexing loss": Kind(
        lambda: torch.randn(EXAMPLES),
        lambda z, y: (z[:, 0] - y).abs().pow(1.5).mean(),
        lambda: Reshaped(1),
    ),
    "a ranking loss": Kind(
        lambda: torch.randn(EXAMPLES),
        lambda z, y: F.softplus(-(z - z.T) * (y[:, None] - y).sign()).mean(),
        lambda: Reshaped(1),
    ),
    "mean and variance": Kind(
        lambda: torch.randn(EXAMPLES),
        lambda z, y: ((z[:, 0] - y).square() * z[:, 1].exp() - z[:, 1]).mean(),
        lambda: Reshaped(2),
    ),
    "quantiles": Kind(
        lambda: torch.randn(EXAMPLES, 1),
        lambda z, y: ((y - z) * (torch.tensor([0.1, 0.5, 0.9]) - (y < z).double())).mean(),
        lambda: Reshaped(3),
    ),
    "a matrix": Kind(lambda: torch.randn(EXAMPLES, 2, 3), F.huber_loss, lambda: Reshaped(2, 3)),
    "counts": Kind(
        lambda: torch.randint(9, (EXAMPLES, 1)),
        lambda z, y: F.poisson_nll_loss(z, y.double()),
        lambda: Reshaped(1),
    ),
    "multi-label": Kind(
        lambda: torch.randint(2, (EXAMPLES, WAYS)).double(), F.binary_cross_entropy_with_logits
    ),
    "multi-label of integers": Kind(
        lambda: torch.randint(2, (EXAMPLES, WAYS)),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.double()),
    ),
    "soft labels": Kind(lambda: torch.rand(EXAMPLES, WAYS).softmax(1)),
    "embeddings of classes": Kind(
        some_labels,
        lambda z, y: ((z @ z.T).tanh() - (y[:, None] == y).double()).square().mean(),
    ),
    "one number and one example": Kind(
        lambda: torch.randn(1, 1),
        F.mse_loss,
        lambda: Reshaped(1),
        inputs=lambda: torch.randn(1, FEATURES),
    ),
    "targets for the whole set": Kind(
        lambda: (torch.randn(EXAMPLES), torch.randn(3)),
        lambda z, y: F.mse_loss(z.mean(0), y[1]) + F.mse_loss(z.sum(1), y[0]),
        lambda: Reshaped(3),
    ),
}


def make_learner(kind, **options):
    inner = GradientDescent(steps=STEPS, lr=LR)
    options = {"inner": inner, "vectorize": "vmap"} | options
    return MetaLearner(kind.model(), kind.loss, **options)


def long(targets):
    """Integers as int64: torch's losses take no other type in a plain loop."""
    is_short = lambda x: x.dtype in (torch.uint8, torch.int32, torch.int16)  # noqa: E731
    return tree_map(lambda x: x.long() if is_short(x) else x, targets)


def plain_tasks(tasks):
    return [tuple((x, long(y)) for x, y in task) for task in tasks]


def stacked(tasks):
    return tree_map(lambda *x: torch.stack(x), *tasks)


# A loop calls the model and the loss as the plain loop does. What is counted is the same.
IN_A_LOOP = ["uint8", "own loss that skips -1", "classes first", "words", "one example"]
IN_A_LOOP += ["a class without weight", "a mask beside the labels"]


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [*((name, "vmap") for name in CLASSES), *((name, "loop") for name in IN_A_LOOP)],
)
def test_labels_have_the_gradient_and_the_accuracy_of_a_plain_loop(name, vectorize):
    kind = CLASSES[name]
    tasks = kind.draw()
    learner = make_learner(kind, vectorize=vectorize)
    expected = plain_maml(learner.model, kind.loss, plain_tasks(tasks))
    step = assert_learns(learner, stacked(tasks), expected)
    accuracies = []
    for outputs, (_, (_, targets)) in zip(expected[1], tasks, strict=True):
        labels = labels_of(targets)
        counts = targets["mask"].bool() if isinstance(targets, dict) else kind.counts(labels)
        accuracies.append((outputs.argmax(kind.axis) == labels)[counts].double().mean())
    assert_same(step.accuracy, torch.stack(accuracies).mean())
    assert_same(learner.evaluate(stacked(tasks))[1][-1], torch.stack(accuracies))


@pytest.mark.parametrize("name", NUMBERS)
def test_other_targets_have_the_gradient_of_a_plain_loop_and_no_accuracy(name):
    kind = NUMBERS[name]
    tasks = kind.draw()
    learner = make_learner(kind)
    expected = plain_maml(learner.model, kind.loss, plain_tasks(tasks))
    step = assert_learns(learner, stacked(tasks), expected)
    assert step.accuracy is None
    assert learner.evaluate(stacked(tasks))[1] is None


def test_a_function_may_take_the_place_of_a_module_as_the_loss():
    learner = MetaLearner(nn.Linear(3, 5), nn.CrossEntropyLoss(), query_loss=nn.CrossEntropyLoss())
    learner.loss = F.cross_entropy
    learner.query_loss = F.nll_loss
    assert (learner.loss, learner.query_loss) == (F.cross_entropy, F.nll_loss)
    learner.loss = nn.CrossEntropyLoss()
    assert {name for name, _ in learner.named_children()} == {"model", "learnt", "loss"}


WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def replace_loss(learner):
    learner.loss = nn.CrossEntropyLoss(weight=WEIGHTS)


def replace_query_loss(learner):
    learner.query_loss = nn.CrossEntropyLoss(weight=WEIGHTS)


def replace_weights(learner):
    learner.loss.weight = WEIGHTS


def write_weights(learner):
    learner.loss.weight[2] = 0.0


@pytest.mark.parametrize(
    "change", [replace_loss, replace_query_loss, replace_weights, write_weights]
)
def test_the_accuracy_counts_the_examples_of_the_present_loss(change):
    tasks = stacked(CLASSES["a class without weight"].draw())
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    learner = make_learner(replace(CLASSES["int64"], loss=nn.CrossEntropyLoss(weight=weight)))
    before = learner.evaluate(tasks)[1]
    change(learner)
    expected = make_learner(CLASSES["a class without weight"])
    expected.model.load_state_dict(learner.model.state_dict())
    if change is replace_query_loss:
        expected.query_loss, expected.loss = expected.loss, learner.loss
    after = learner.evaluate(tasks)[1]
    assert torch.equal(after, expected.evaluate(tasks)[1])
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "place", ["the support sets", "the query sets", "the query sets of a head"]
)
def test_a_loss_is_looked_at_once_though_what_it_learns_changes(place, monkeypatch):
    plain = F.cross_entropy
    counting = Mock(side_effect=plain)  # what a module holds is no part of the loss
    monkeypatch.setattr(F, "cross_entropy", counting)
    weight = nn.Parameter(torch.zeros(()))

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) + weight.square()

    options = {
        "the support sets": {"query_loss": plain},
        "the query sets": {"query_loss": loss},
        "the query sets of a head": {"head": "ridge"},
    }
    first = plain if place == "the query sets" else loss
    learner = MetaLearner(CLASSES["int64"].model(), first, vectorize="loop", **options[place])
    part = (randn(2, 10, FEATURES, seed=0), (torch.arange(10) % WAYS).expand(2, -1))
    counts = []
    for _ in range(3):
        counting.reset_mock()
        learner.evaluate({"support": part, "query": part})
        counts.append(counting.call_count)
        with torch.no_grad():
            weight.add_(0.1)
    assert counts[0] > counts[1] == counts[2]


def test_a_label_that_the_loss_before_ignored_is_refused():
    kind = CLASSES["own loss that skips -1"]
    tasks = stacked(kind.draw())
    learner = make_learner(kind)
    learner.evaluate(tasks)
    learner.loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="support labels: got -1, expected class indices from 0"):
        learner.evaluate(tasks)


@pytest.mark.parametrize("name", ["the last class without weight", "a class without weight"])
def test_a_loss_that_runs_on_its_own_device_alone_counts_its_examples_all_the_same(name):
    """Its targets cannot be tried on the CPU before they are on the device of its weights."""
    kind = CLASSES[name]
    tried = []

    def loss(outputs, targets):
        if len(tried) < 4:  # twice for the support set, and for the query set
            tried.append(outputs)
            raise RuntimeError("Expected all tensors to be on the same device")
        return kind.loss(outputs, targets)

    tasks = stacked(kind.draw())
    learner = make_learner(replace(kind, loss=loss), vectorize="loop")
    expected = make_learner(kind, vectorize="loop")
    expected.model.load_state_dict(learner.model.state_dict())
    assert torch.equal(learner.evaluate(tasks)[1], expected.evaluate(tasks)[1])
    assert len(tried) == 4


@pytest.mark.parametrize("name", ["ignore_index", "a class without weight", "one number"])
def test_implicit_methods_take_the_same_targets(name):
    kind = (CLASSES | NUMBERS)[name]
    tasks = kind.draw()
    options = {"inner": GradientDescent(steps=20, lr=0.11), "proximal": 6.0}
    dense = make_learner(kind, method="dense", **options)
    unrolled = make_learner(kind, method="unrolled", **options)
    unrolled.model.load_state_dict(dense.model.state_dict())
    dense.backward(stacked(tasks))
    unrolled.backward(stacked(tasks))
    for p, q in zip(dense.parameters(), unrolled.parameters(), strict=True):
        assert_same(p.grad, q.grad, rtol=1e-6)


def test_labels_that_are_ignored_may_come_up_later():
    kind = CLASSES["ignore_index"]
    full, holes = CLASSES["int64"].draw(), kind.draw()
    learner = make_learner(kind)
    assert_learns(learner, stacked(full), plain_maml(learner.model, kind.loss, full))
    learner.zero_grad()
    step = assert_learns(learner, stacked(holes), plain_maml(learner.model, kind.loss, holes))
    assert 0 < step.accuracy < 1


def test_whole_numbers_that_are_no_classes_have_no_accuracy():
    """At zero, the square of an error has no slope, as a loss of one class has none."""
    model = nn.Linear(FEATURES, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    learner = MetaLearner(model, lambda z, y: F.mse_loss(z.squeeze(1), y.to(z)))
    pair = torch.randn(2, 6, FEATURES), torch.randint(10, (2, 6))
    assert learner.backward({"support": pair, "query": pair}).accuracy is None


def test_accuracy_counts_predictions_so_sure_that_the_loss_is_flat():
    labels = torch.tensor([0, 1, 2, 3])
    pair = ((torch.eye(4) * 1e4).unsqueeze(0), with_holes(labels, -100).unsqueeze(0))
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    step = MetaLearner(model, F.cross_entropy).backward((pair, pair))
    assert step.loss == 0
    assert step.accuracy == 1


BROADCAST = {
    "[m] against [m, 1]": (torch.randn(EXAMPLES), F.mse_loss, (1,)),
    "[m, 1] against [m]": (torch.randn(EXAMPLES, 1), F.l1_loss, ()),
    "[m, 1] against [m, 3]": (torch.randn(EXAMPLES, 1), F.smooth_l1_loss, (3,)),
    "an own loss": (torch.randn(EXAMPLES), lambda z, y: (z - y).square().mean(), (1,)),
    "an own loss that sums": (
        torch.randn(EXAMPLES, 1),
        lambda z, y: (z - y).abs().sum(),
        (),
    ),
    "integers": (
        torch.randint(9, (EXAMPLES,)),
        lambda z, y: (z - y.double()).square().mean(),
        (1,),
    ),
    "a module": (torch.randn(EXAMPLES), nn.HuberLoss(), (1,)),
    "one part of the targets": (
        {"y": torch.randn(EXAMPLES), "weight": torch.rand(EXAMPLES, 1)},
        lambda z, t: (t["weight"] * (z - t["y"]).square()).mean(),
        (1,),
    ),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_targets_that_would_broadcast_are_refused_with_both_shapes(name):
    targets, loss, shape = BROADCAST[name]
    pair = (features(), tree_map(lambda x: x.to(torch.get_default_dtype()), targets))
    learner = MetaLearner(Reshaped(*shape), loss)
    outputs = tuple(learner.model(pair[0]).shape)
    message = rf"targets of shape .*\({EXAMPLES}.* for outputs of shape .*{outputs[0]}"
    with pytest.raises(ValueError, match=f"support: got {message}.*broadcast"):
        learner.adapt(pair)
    with pytest.raises(ValueError, match=f"episodes.support: got {message}.*broadcast"):
        learner.backward([(pair, pair)])
    assert all(p.grad is None for p in learner.parameters())


REFUSED = {
    "a label above": ([0, 7, 1], F.cross_entropy, "labels: got 7, expected class indices from 0"),
    "a label below": ([0, -1, 1], F.cross_entropy, "labels: got -1, expected class indices"),
    "below with an ignored one": ([-100, -1, 1], F.cross_entropy, "labels: got -1"),
    "above in an own loss": (
        [0, 9, 1],
        OwnCrossEntropy(skip=-1),
        "got 9, expected class .* 0 to 4",
    ),
    "floats": ([0.0, 1.0, 2.0], F.cross_entropy, r"targets of shape \(3,\).* the loss refuses"),
    "too many axes": ([[0], [1], [2]], F.cross_entropy, r"\(3, 1\) for outputs of shape \(3, 5\)"),
    "other lengths": ([0, 1], F.cross_entropy, r"\[tasks, examples\]"),
    "sizes": (
        [[0.0], [1.0], [2.0]],
        F.binary_cross_entropy_with_logits,
        "the loss refuses: Target",
    ),
}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_the_loss_refuses_are_named(name, vectorize):
    targets, loss, message = REFUSED[name]
    learner = MetaLearner(nn.Linear(FEATURES, WAYS), loss, vectorize=vectorize)
    good = (torch.randn(3, FEATURES), torch.zeros(3, dtype=torch.int64))
    bad = (torch.randn(3, FEATURES), torch.tensor(targets))
    with pytest.raises(ValueError, match=f"support.*{message}"):
        learner.adapt(bad)
    if name in ("floats", "sizes"):
        return
    with pytest.raises(ValueError, match=rf"episodes\.query.*{message}"):
        learner.backward([(good, bad)])


def test_a_loss_that_cannot_be_tried_on_the_cpu_is_taken_for_cross_entropy():
    def elsewhere(outputs, targets):
        raise RuntimeError("Expected all tensors to be on the same device")

    check = TargetCheck(call=lambda x: x, make_loss=lambda: elsewhere)
    scores = torch.randn(2, 3, WAYS)
    labels = torch.tensor([[0, 1, -100], [1, 2, 3]])
    assert check("query", Pair(scores, labels.abs() % WAYS)) == (0, 1, WAYS, False)
    assert check("query", Pair(scores, labels)) == (0, 1, WAYS, False)
    with pytest.raises(ValueError, match="query labels: got 9, expected class indices from 0 to 4"):
        check("query", Pair(scores, labels.clamp(0) + 6))
    assert check("query", Pair(scores, torch.randn(2, 3))) is None


def test_a_metric_replaces_the_accuracy():
    kind = NUMBERS["multi-label"]
    tasks = kind.draw()
    calls = []

    def share_of_exact_rows(outputs, targets):
        assert not outputs.requires_grad
        calls.append(outputs.numpy())  # a metric may leave torch
        return ((outputs > 0) == targets).all(1)

    learner = make_learner(kind, metric=share_of_exact_rows)
    step = learner.backward(stacked(tasks))
    _, outputs, _ = plain_maml(learner.model, kind.loss, tasks)
    exact = [
        ((z > 0) == targets).all(1).double().mean()
        for z, (_, (_, targets)) in zip(outputs, tasks, strict=True)
    ]
    assert_same(step.accuracy, torch.stack(exact).mean())
    assert_same(learner.evaluate(stacked(tasks))[1][-1], torch.stack(exact))
    assert len(calls) == TASKS * (1 + STEPS + 1)
    number = make_learner(kind, metric=lambda outputs, targets: 0.25)
    assert number.backward(stacked(tasks)).accuracy == 0.25


def test_the_first_look_at_a_loss_draws_no_random_number():
    class Noisy(nn.Module):
        def forward(self, outputs, targets):
            return F.cross_entropy(F.dropout(outputs, 0.5), targets)

    kind = Kind(some_labels, Noisy())
    tasks = stacked(kind.draw())
    losses = []
    for calls in (1, 2):
        learner = make_learner(kind, vectorize="loop")
        learner.model.load_state_dict({"weight": torch.ones(5, 4), "bias": torch.zeros(5)})
        for _ in range(calls):
            torch.manual_seed(3)
            losses.append(learner.backward(tasks).loss)
    assert losses[0] == losses[1] == losses[2]


def test_a_task_whose_examples_are_all_masked_tells_nothing_of_the_loss():
    def masked(outputs, targets):
        labels, mask = targets
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return (losses * mask).sum() / mask.sum().clamp(min=1)

    def batch(*counts):
        x = randn(len(counts), EXAMPLES, FEATURES, seed=1)
        labels = torch.arange(EXAMPLES).remainder(WAYS).expand(len(counts), -1)
        mask = torch.stack([(torch.arange(EXAMPLES) < n).double() for n in counts])
        ones = torch.ones_like(mask)
        return {"support": (x, (labels, ones)), "query": (x, (labels, mask))}

    def learner():
        torch.manual_seed(0)
        return MetaLearner(nn.Linear(FEATURES, WAYS), masked)

    expected = learner().backward(batch(8, 9)).accuracy
    for first in ((0, 9), (0, 0)):
        other = learner()
        other.evaluate(batch(*first))
        assert other.backward(batch(8, 9)).accuracy == expected


@pytest.mark.parametrize("examples", [2, 3])
def test_a_loss_that_reduces_as_many_outputs_as_there_are_examples_is_taken(examples):
    """A mean and a log-variance for each example, with targets of one axis."""

    def likelihood(outputs, targets):
        mean, log_variance = outputs[:, 0], outputs[:, 1]
        return ((mean - targets).square() * (-log_variance).exp() + log_variance).mean()

    support = (randn(TASKS, examples, FEATURES, seed=1), randn(TASKS, examples, seed=2))
    query = (randn(TASKS, 7, FEATURES, seed=3), randn(TASKS, 7, seed=4))
    model = nn.Linear(FEATURES, 2)
    episodes = {"support": support, "query": query}
    pairs = [list(zip(*pair, strict=True)) for pair in episodes.values()]
    expected = plain_maml(model, likelihood, list(zip(*pairs, strict=True)))
    inner = GradientDescent(steps=STEPS, lr=LR)
    assert_learns(MetaLearner(model, likelihood, inner=inner), episodes, expected)
    with pytest.raises(ValueError, match="which broadcast against each other in the loss"):
        MetaLearner(nn.Linear(FEATURES, examples), lambda z, y: (z - y).square().mean()).backward(
            {"support": support, "query": support}
        )


def test_a_model_of_one_number_for_a_set_and_inputs_that_begin_with_none_are_taken():
    class Whole(nn.Linear):
        def forward(self, x, lengths=None):
            return super().forward(x).mean()

    x = randn(TASKS, EXAMPLES, FEATURES, seed=1)
    targets = randn(TASKS, EXAMPLES, seed=2)
    episodes = {"support": (x, targets), "query": (x, targets)}

    def loss(outputs, targets):
        return (outputs - targets).square().mean()

    losses, _ = MetaLearner(Whole(FEATURES, 1), loss).evaluate(episodes)
    assert losses.isfinite().all()
    inputs = {"lengths": None, "x": x}
    counts = torch.arange(EXAMPLES).expand(TASKS, -1)
    episodes = {"support": (inputs, counts), "query": (inputs, counts)}
    losses, _ = MetaLearner(Whole(FEATURES, 1), loss).evaluate(episodes)
    assert losses.isfinite().all()
