"""Batches of tasks in the forms of other libraries, each against a loop over its tasks."""

from collections import UserDict
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from learner.plain_loop import LR, STEPS, assert_learns, assert_same, call, plain_maml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner import Episode, Pair, read_episodes

TASKS = 3
FEATURES = 4
WAYS = 5
pytestmark = pytest.mark.usefixtures("float64")


def draw_set(examples=10):
    """One set of examples of one task."""
    return torch.randn(examples, FEATURES), torch.arange(examples) % WAYS


def draw_tasks(*sizes):
    """Tasks as ((inputs, targets), (inputs, targets)), with these numbers of support examples."""
    return [(draw_set(size), draw_set()) for size in sizes or (10,) * TASKS]


def stack(sets):
    """The sets of several tasks as one pair with the task axis first."""
    inputs, targets = zip(*sets, strict=True)
    return torch.stack(inputs), torch.stack(targets)


def stacked(tasks):
    supports, queries = zip(*tasks, strict=True)
    return stack(supports), stack(queries)


class Masked(nn.Module):
    """A model of an input and a mask, in any of the ways that a model takes them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, WAYS)

    def forward(self, x, mask=None, scale=1.0):
        return self.linear(x if mask is None else x * mask.sigmoid()) * scale


class Examples(NamedTuple):
    """A pair under names of its own."""

    x: torch.Tensor
    y: torch.Tensor


def namespace(tasks):
    support, query = stacked(tasks)
    return SimpleNamespace(support=support, query=query)


def ours(tasks):
    return Episode(*(Pair(*pair) for pair in stacked(tasks)))


def tuple_of_pairs(tasks):
    return stacked(tasks)


def lists_instead_of_tuples(tasks):
    return [list(pair) for pair in stacked(tasks)]


def torchmeta(tasks):
    support, query = stacked(tasks)
    return {"train": support, "test": query}


def named_in_a_dict(tasks):
    support, query = stacked(tasks)
    names = ("inputs", "targets")
    return {
        "support": dict(zip(names, support, strict=True)),
        "query": dict(zip(names, query, strict=True)),
    }


def named_pairs(tasks):
    support, query = stacked(tasks)
    return SimpleNamespace(support=Examples(*support), query=Examples(*query))


def collated_by_a_loader(tasks):
    """What a `DataLoader` makes of a data set whose items are tasks: lists of lists."""
    return default_collate(tasks)


def collated_dicts(tasks):
    return default_collate([{"train": support, "test": query} for support, query in tasks])


def list_of_tasks(tasks):
    return tasks


def list_of_dicts(tasks):
    return [{"train": support, "test": query} for support, query in tasks]


def tuple_of_objects(tasks):
    return tuple(SimpleNamespace(support=support, query=query) for support, query in tasks)


def lists_in_the_sets(tasks):
    supports, queries = zip(*tasks, strict=True)
    x, y = zip(*supports, strict=True)
    x_query, y_query = zip(*queries, strict=True)
    return SimpleNamespace(support=(list(x), list(y)), query=(list(x_query), list(y_query)))


def lists_in_the_support_alone(tasks):
    return SimpleNamespace(
        support=lists_in_the_sets(tasks).support, query=stack([query for _, query in tasks])
    )


EQUAL = [
    namespace,
    ours,
    tuple_of_pairs,
    lists_instead_of_tuples,
    torchmeta,
    named_in_a_dict,
    named_pairs,
    collated_by_a_loader,
    collated_dicts,
]
PER_TASK = [
    list_of_tasks,
    list_of_dicts,
    tuple_of_objects,
    lists_in_the_sets,
    lists_in_the_support_alone,
]


def make_learner(model, loss=F.cross_entropy, **options):
    inner = GradientDescent(steps=STEPS, lr=LR)
    return MetaLearner(model, loss, **({"inner": inner, "vectorize": "vmap"} | options))


def assert_is_the_plain_loop(learner, episodes, tasks):
    """Gradient, losses, accuracies and adapted models of a learner are those of the loop."""
    expected = plain_maml(learner.model, learner.loss, tasks)
    step = assert_learns(learner, episodes, expected)
    losses, outputs, _ = expected
    accuracies = torch.stack(
        [
            (z.argmax(1) == query[1]).double().mean()
            for z, (_, query) in zip(outputs, tasks, strict=True)
        ]
    )
    assert_same(step.accuracy, accuracies.mean())
    assert step.report.inner_steps.tolist() == [STEPS] * len(tasks)
    evaluated, measured = learner.evaluate(episodes)
    assert evaluated.shape == measured.shape == (STEPS + 1, len(tasks))
    assert_same(evaluated[-1], losses)
    assert_same(measured[-1], accuracies)
    support, query = tasks[1 % len(tasks)]
    assert_same(learner.adapt(support)(query[0]), outputs[1 % len(tasks)])


@pytest.mark.parametrize("form", EQUAL + PER_TASK)
def test_every_form_of_equal_tasks_is_the_plain_loop(form):
    tasks = draw_tasks()
    learner = make_learner(nn.Linear(FEATURES, WAYS), vectorize="loop")
    assert_is_the_plain_loop(learner, form(tasks), tasks)
    assert len(read_episodes(form(tasks))) == 1


@cache
def mean_of_tasks_alone(method):
    """The mean loss of tasks of 10, 5 and 7 examples, each of them alone, and its gradient."""
    torch.manual_seed(0)
    tasks = draw_tasks(10, 5, 7)
    learner = make_learner(nn.Linear(FEATURES, WAYS), method=method)
    losses = [learner.backward([task]).loss for task in tasks]
    return torch.stack(losses).mean(), learner.model.weight.grad / len(tasks)


@pytest.mark.parametrize(
    ("form", "method"),
    [
        *((form, "unrolled") for form in PER_TASK),
        *((list_of_tasks, "first-order"), (lists_in_the_support_alone, "cg")),
    ],
)
def test_tasks_of_different_sizes_are_computed_one_after_another(form, method):
    """The mean over the tasks of the gradient that each of them has alone."""
    tasks = draw_tasks(10, 5, 7)
    learner = make_learner(nn.Linear(FEATURES, WAYS), method=method)
    step = learner.backward(form(tasks))
    loss, gradient = mean_of_tasks_alone(method)
    assert_same(learner.model.weight.grad, gradient)
    assert_same(step.loss, loss)
    assert step.report.inner_gradient_norm.shape == (3,)
    if method == "unrolled":
        learner.zero_grad()
        assert_is_the_plain_loop(learner, form(tasks), tasks)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_hold_tasks_of_different_sizes(layout):
    tasks = draw_tasks(5, 10, 15)
    batch = [
        tuple(
            torch.nested.nested_tensor(list(part), layout=layout)
            for part in zip(*sets, strict=True)
        )
        for sets in zip(*tasks, strict=True)
    ]
    assert_is_the_plain_loop(make_learner(nn.Linear(FEATURES, WAYS)), tuple(batch), tasks)
    learner = make_learner(nn.Linear(FEATURES, WAYS))
    one_by_one = [learner.adapt(support)(query[0]) for support, query in tasks]
    adapted = learner.adapt(batch[0], batched=True)
    assert_same(adapted([query[0] for _, query in tasks])[2], one_by_one[2])


def test_batch_normalisation_sees_no_padding():
    tasks = draw_tasks(10, 5, 7)
    norm = nn.BatchNorm1d(FEATURES, track_running_stats=False)
    learner = make_learner(nn.Sequential(norm, nn.Linear(FEATURES, WAYS)))
    assert_is_the_plain_loop(learner, tasks, tasks)


def test_a_batch_of_adapted_models_takes_a_list_with_the_inputs_of_each_task():
    tasks = draw_tasks(10, 5, 7)
    learner = make_learner(nn.Linear(FEATURES, WAYS))
    supports = [support for support, _ in tasks]
    inputs = [query[0][: 4 + i] for i, (_, query) in enumerate(tasks)]
    x, y = zip(*supports, strict=True)
    for form in (supports, (list(x), list(y))):
        outputs = learner.adapt(form, batched=True)(inputs)
        for z, support, x_query in zip(outputs, supports, inputs, strict=True):
            assert_same(z, learner.adapt(support)(x_query))


# How the inputs of one set become those of a model with several inputs.
SEVERAL_INPUTS = {
    "a tuple": lambda x: (x, x.flip(0)),
    "a dict": lambda x: {"x": x, "mask": x.flip(0)},
    "a dict in another order": lambda x: {"mask": x.flip(0), "x": x},
    "a dict without a default": lambda x: {"x": x},
    "None beside tensors": lambda x: {"x": x, "mask": None},
    "a number beside tensors": lambda x: (x, x.flip(0), 0.5),
    "a mask for all examples": lambda x: (x, x[0]),
}


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [
        *((name, "vmap") for name in SEVERAL_INPUTS),
        *(("a dict", "auto"), ("None beside tensors", "loop"), ("a number beside tensors", "loop")),
        ("a mask for all examples", "loop"),
    ],
)
def test_several_inputs_are_the_arguments_of_the_model(name, vectorize):
    def with_inputs(pair):
        return SEVERAL_INPUTS[name](pair[0]), pair[1]

    tasks = [tuple(map(with_inputs, task)) for task in draw_tasks()]
    learner = make_learner(Masked(), vectorize=vectorize)
    batch = torch.utils._pytree.tree_map(
        lambda *x: torch.stack(x) if isinstance(x[0], torch.Tensor) else x[0], *tasks
    )
    assert_is_the_plain_loop(learner, batch, tasks)
    learner.zero_grad()
    assert_is_the_plain_loop(learner, tasks, tasks)


def test_a_dataclass_of_inputs_has_to_be_registered():
    @dataclass
    class Views:
        left: torch.Tensor
        right: torch.Tensor

    class Difference(nn.Linear):
        def forward(self, views):
            return super().forward(views.left - views.right.sigmoid())

    tasks = [
        tuple((Views(x, x.flip(0)), y) for x, y in (support, query))
        for support, query in draw_tasks()
    ]
    learner = make_learner(Difference(FEATURES, WAYS))
    message = "episodes: got Views, which cannot be split by task, .* torch.export.register_data"
    with pytest.raises(ValueError, match=message):
        learner.backward(tasks)
    torch.export.register_dataclass(Views)
    assert_is_the_plain_loop(learner, tasks, tasks)


def test_tensors_in_tuples_need_not_begin_with_the_examples():
    """A recurrent model that takes time first, and a loss of one target for each set."""

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(FEATURES + WAYS, WAYS)

        def forward(self, x):
            state = torch.zeros(x.shape[1], WAYS)
            for step in x:
                state = self.cell(torch.cat([step, state], dim=1)).tanh()
            return state

    def of_the_set(outputs, targets):
        return F.mse_loss(outputs.mean(0), targets[0])

    sequences = [
        tuple(((torch.randn(7, 10, FEATURES),), torch.arange(10) % WAYS) for _ in range(2))
        for _ in range(TASKS)
    ]
    learner = make_learner(TimeFirst())
    expected = plain_maml(learner.model, F.cross_entropy, sequences)
    assert_learns(learner, sequences, expected)

    sets = [tuple((x, (torch.randn(WAYS),)) for x, _ in task) for task in draw_tasks()]
    learner = make_learner(nn.Linear(FEATURES, WAYS), of_the_set)
    assert_learns(learner, sets, plain_maml(learner.model, of_the_set, sets))


def test_arrays_become_tensors():
    tasks = draw_tasks()
    arrays = [tuple((x.numpy(), y.int().numpy()) for x, y in task) for task in tasks]
    assert_is_the_plain_loop(make_learner(nn.Linear(FEATURES, WAYS)), arrays, tasks)
    support, query = stacked(tasks)
    batch = tuple((x.numpy(), y.numpy()) for x, y in (support, query))
    assert_is_the_plain_loop(make_learner(nn.Linear(FEATURES, WAYS)), batch, tasks)
    stored = tuple((x.astype(">f8"), y.astype(np.uint16)) for x, y in batch)
    assert_is_the_plain_loop(make_learner(nn.Linear(FEATURES, WAYS)), stored, tasks)
    learner = make_learner(nn.Linear(FEATURES, WAYS))
    expected = learner.adapt(tasks[0][0])(tasks[0][1][0])
    assert_same(learner.adapt(arrays[0][0])(tasks[0][1][0]), expected)


def test_inputs_may_be_any_mapping_and_lists_that_a_loader_made_of_tuples():
    tasks = [tuple((UserDict(x=x, mask=x.flip(0)), y) for x, y in task) for task in draw_tasks()]
    plain = [tuple((dict(x), y) for x, y in task) for task in tasks]
    assert_is_the_plain_loop(make_learner(Masked()), tasks, plain)

    plain = [tuple(((x, x.flip(0)), y) for x, y in task) for task in draw_tasks()]
    assert_is_the_plain_loop(make_learner(Masked()), default_collate(plain), plain)


@pytest.mark.parametrize("form", [stacked, list_of_tasks], ids=["stacked", "list"])
def test_tuples_of_inputs_and_targets_are_no_list_of_tasks(form):
    def loss(outputs, targets):
        labels, weights = targets
        return (F.cross_entropy(outputs, labels, reduction="none") * weights).mean()

    plain = draw_tasks(10, 10)
    tasks = [tuple(((x, x.flip(0)), (y, x[:, 0].sigmoid())) for x, y in t) for t in plain]
    batch = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *tasks)
    learner = make_learner(Masked(), loss)
    expected = plain_maml(learner.model, loss, tasks)
    assert_learns(learner, batch if form is stacked else tasks, expected)


def test_an_adapted_model_is_called_with_several_inputs_as_the_model_is():
    (support, (x, _)), *_ = draw_tasks()
    learner = make_learner(Masked())
    pair = ((support[0], support[0].flip(0)), support[1])
    adapted = learner.adapt(pair)
    expected = call(learner.model, adapted.params, (x, x.flip(0)))
    for outputs in (
        adapted((x, x.flip(0))),
        adapted(x, x.flip(0)),
        adapted(x=x, mask=x.flip(0)),
        adapted({"x": x, "mask": x.flip(0)}),
    ):
        assert_same(outputs, expected.detach())
    with pytest.raises(TypeError, match="expected one kind"):
        adapted(x, mask=x)


X, Y = stack([draw_set() for _ in range(TASKS)])
X = X.double()
REFUSED = {
    "no sets": (X, r"episodes: got a tensor of shape \(3, 10, 4\), expected a pair"),
    "unknown keys": ({"train": (X, Y), "valid": (X, Y)}, r"with the keys \['train', 'valid'\]"),
    "three sets": (((X, Y), (X, Y), (X, Y)), "episodes: got tuple of 3, expected a pair"),
    "no targets": (SimpleNamespace(support=X, query=(X, Y)), "episodes.support: got a tensor"),
    "no task": ([], "episodes: got list of 0"),
    "lists of two in lists of two": (
        [[[X, X], [Y, Y]], [[X, X], [Y, Y]]],
        "may be two tasks or two sets; name the sets",
    ),
    "lists of two tasks in a list": (
        [([X[0], X[1]], [Y[0], Y[1]]), ([X[0], X[1]], [Y[0], Y[1]])],
        "may be two tasks or two sets; name the sets",
    ),
    "lists of different lengths": (
        SimpleNamespace(support=([X[0], X[1]], [Y[0], Y[1]]), query=(X, Y)),
        r"got lists and tensors for \[2, 3\] tasks",
    ),
    "a task without the axis of tasks": (((X[0], Y[0]), (X[0], Y[0])), r"\[tasks, examples\]"),
    "a list of batches": (
        [{"support": (X, Y), "query": (X, Y)}] * 2,
        "if they are batches of tasks, call it for each of them.*which the loss refuses",
    ),
    "an empty set in a list": ([((X[0], Y[0]), (X[0, :0], Y[0, :0]))], "neither empty"),
    "tasks of different counts in several inputs": (
        SimpleNamespace(support=((X, X[:2]), Y), query=((X, X), Y)),
        "one task axis of the same size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_forms_are_refused_with_what_is_expected(case):
    episodes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_learner(Masked()).backward(episodes)
