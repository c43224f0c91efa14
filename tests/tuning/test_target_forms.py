"""Soft labels, several labels of an example, padding: weighed, against a plain loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tuning_loop import (
    INDEX,
    VARIABLES,
    WEIGHTS,
    C,
    M,
    assert_tunes,
    draw,
    log_softmax,
    network_weight,
)

from metaimplicit import tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightNetwork

T = 4  # labels of an example
BCE = F.binary_cross_entropy_with_logits
SOFT = torch.randn(M, C, generator=torch.Generator().manual_seed(5)).double().softmax(1)
MANY = (SOFT > 0.3).double()
HALF = torch.linspace(0, 1, M, dtype=torch.float64)


def soft_loss(z, y):
    return -(y * z.log_softmax(0)).sum()


def binary(z, y):
    return F.softplus(z) - y * z


# The loss, the targets, the variable, the number of outputs, and f of the outputs.
TARGETS = {
    "soft labels and classes": (
        nn.CrossEntropyLoss(),
        SOFT,
        ClassWeights(C),
        lambda z, y, meta: (y @ meta["class_weights"]) * soft_loss(z, y),
    ),
    "soft labels and a network": (
        F.cross_entropy,
        SOFT,
        WeightNetwork(5, classes=C),
        lambda z, y, meta: network_weight(meta, soft_loss(z, y), y) * soft_loss(z, y),
    ),
    "soft labels and examples": (
        lambda z, y: -(y * z.log_softmax(1)).sum(1).mean(),
        SOFT,
        ExampleWeights(20),
        lambda z, y, meta: soft_loss(z, y),
    ),
    "divergence, whose mean is over the batch": (
        nn.KLDivLoss(reduction="batchmean"),
        SOFT,
        ExampleWeights(20),
        lambda z, y, meta: (y * (y.log() - z)).sum(),
    ),
    "several labels and classes": (
        nn.BCEWithLogitsLoss(),
        MANY,
        ClassWeights(C),
        lambda z, y, meta: (meta["class_weights"] * binary(z, y)).mean(),
    ),
    "several labels and a network": (
        BCE,
        MANY,
        WeightNetwork(5, classes=C),
        lambda z, y, meta: network_weight(meta, binary(z, y).mean(), y) * binary(z, y).mean(),
    ),
    "several labels and examples": (
        nn.BCEWithLogitsLoss(reduction="sum"),
        MANY,
        ExampleWeights(20),
        lambda z, y, meta: M * binary(z, y).sum(),
    ),
    "several labels as margins": (
        nn.MultiLabelSoftMarginLoss(),
        MANY,
        ExampleWeights(20),
        lambda z, y, meta: binary(z, y).mean(),
    ),
    "regression": (
        nn.MSELoss(),
        SOFT,
        ExampleWeights(20),
        lambda z, y, meta: (z - y).square().mean(),
    ),
    "regression in a function": (
        lambda z, y: 0.5 * (z - y).square().sum(),
        SOFT,
        WeightNetwork(5),
        lambda z, y, meta: (
            M * network_weight(meta, 0.5 * (z - y).square().sum()) * 0.5 * (z - y).square().sum()
        ),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_are_real_numbers(name):
    loss, y, variable, f = TARGETS[name]
    case = draw(1)

    def mean(params, x, value):
        z = x @ params["weight"].T + params["bias"]
        return sum(value(i, z[i], y[i]) for i in range(M)) / M

    def inner(meta):
        def value(i, z, y):
            weight = meta["example_weights"][INDEX[i]] if "example_weights" in meta else 1.0
            return weight * f(z, y, meta)

        return value

    assert_tunes(
        case.model,
        loss,
        [variable],
        (case.x, y, INDEX),
        (case.x_valid, y),
        inner_loss=lambda params, meta: mean(params, case.x, inner(meta)),
        outer_loss=lambda params: loss(case.x_valid @ params["weight"].T + params["bias"], y),
    )


@pytest.mark.parametrize("y", [HALF, HALF.round(), HALF.round()[:, None]])
def test_binary_targets_have_two_classes(y):
    case = draw(2, outputs=1)
    shape = y.shape

    def outputs(params, x):
        return (x @ params["weight"].T + params["bias"]).reshape(M)

    class Model(nn.Linear):
        def forward(self, x):
            return super().forward(x).reshape(shape)

    model = Model(5, 1).double()
    flat = y.reshape(M)
    assert_tunes(
        model,
        nn.BCEWithLogitsLoss(),
        [ClassWeights(2)],
        (case.x, y),
        (case.x_valid, y),
        inner_loss=lambda params, meta: (
            ((1 - flat) * meta["class_weights"][0] + flat * meta["class_weights"][1])
            * binary(outputs(params, case.x), flat)
        ).mean(),
        outer_loss=lambda params: binary(outputs(params, case.x_valid), flat).mean(),
    )


class Tagger(nn.Linear):
    """Scores of the classes of T words, `[m, classes, T]` or `[m, T, classes]`."""

    def __init__(self, *sizes, classes_last=False):
        super().__init__(*sizes)
        self.classes_last = classes_last

    def forward(self, x):
        scores = super().forward(x).reshape(len(x), C, T)
        return scores.mT if self.classes_last else scores


TAGS = torch.randint(0, C, (M, T), generator=torch.Generator().manual_seed(3))
PADDED = torch.where(torch.arange(T) < torch.tensor([4, 3, 1, 2, 4, 0, 4, 2])[:, None], TAGS, -100)


def flattened(z, y, reduction="mean"):
    """As people write it for words: one row for each."""
    return F.cross_entropy(z.movedim(1, 2).flatten(0, 1), y.flatten(), reduction=reduction)


# A loss, and whether the outputs of its model have the classes last.
SEVERAL = {
    "module": (nn.CrossEntropyLoss(), False),
    "classes last": (nn.CrossEntropyLoss(), True),
    "flattened": (flattened, False),
    "flattened, classes last": (lambda z, y, **options: flattened(z.mT, y, **options), True),
}


# Each variable and each form meets both lengths.
@pytest.mark.parametrize(
    ("variable", "form", "length"),
    [
        ("classes", "module", "padded"),
        ("classes", "flattened", "full"),
        ("examples", "classes last", "padded"),
        ("examples", "module", "full"),
        ("network", "flattened, classes last", "padded"),
        ("network", "classes last", "full"),
        ("network of classes", "flattened", "padded"),
        ("network of classes", "flattened, classes last", "full"),
    ],
)
def test_an_example_of_several_labels(variable, form, length):
    """ClassWeights weigh labels; the others weigh examples and see their mean loss."""
    case = draw()
    loss, classes_last = SEVERAL[form]
    y = TAGS if length == "full" else PADDED
    torch.manual_seed(4)
    model = Tagger(5, C * T, classes_last=classes_last).double()
    weigher, weight_of_one = VARIABLES[variable]

    def mean(params, x, meta):
        z = (x @ params["weight"].T + params["bias"]).reshape(M, C, T)
        total, count = 0.0, 0
        for i in range(M):
            words = [t for t in range(T) if y[i, t] != -100]
            losses = [log_softmax(z[i, :, t], y[i, t]) for t in words]
            if not words:
                continue
            average = sum(losses) / len(words)
            for t, loss_t in zip(words, losses, strict=True):
                if meta is None:
                    weight = 1.0
                elif variable == "network of classes":
                    scores = sum(F.one_hot(y[i, t], C).double() for t in words) / len(words)
                    weight = network_weight(meta, average, scores)
                else:
                    weight = weight_of_one(meta, i, y[i, t], average)
                total = total + weight * loss_t
            count += len(words)
        return total / count

    assert_tunes(
        model,
        loss,
        [weigher],
        (case.x, y, INDEX),
        (case.x_valid, y),
        inner_loss=lambda params, meta: mean(params, case.x, meta),
        outer_loss=lambda params: mean(params, case.x_valid, None),
    )


def test_weights_of_examples_and_of_labels_are_multiplied():
    case = draw()
    model = Tagger(5, C * T).double()
    tuned = tuning_problem(model, F.cross_entropy, [ExampleWeights(20), ClassWeights(C)])
    meta = {
        "example_weights": torch.arange(20.0).double(),
        "class_weights": WEIGHTS,
    }
    weights = tuned.weights(tuned.problem.init(meta, None), meta, (case.x, TAGS, INDEX))
    expected = torch.stack([INDEX[i] * WEIGHTS[TAGS[i]] for i in range(M)])
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("classes_last", [True, False])
def test_as_many_positions_as_classes_are_read_as_other_batches_are(classes_last):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5)).double()
    if not classes_last:
        model.append(Transposed())
    problem, meta, _ = tuning_problem(model, nn.CrossEntropyLoss(), [ExampleWeights(6)])
    params = dict(model.named_parameters())
    for length in (4, 5, 7, 5):
        x = torch.randint(9, (6, length))
        y = torch.randint(5, (6, length))
        scores = model(x).mT if classes_last else model(x)
        got = problem.inner_loss(params, meta, (x, y, torch.arange(6)))
        torch.testing.assert_close(got, F.cross_entropy(scores, y))


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


def test_as_many_positions_as_classes_in_the_first_batch_are_warned_of():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 5)).double()
    problem, meta, _ = tuning_problem(model, nn.CrossEntropyLoss(), [ExampleWeights(6)])
    x, y = torch.randint(9, (6, 5)), torch.randint(5, (6, 5))
    with pytest.warns(RuntimeWarning, match=r"outputs: got shape \(6, 5, 5\).*axis 1 is taken"):
        problem.inner_loss(dict(model.named_parameters()), meta, (x, y, torch.arange(6)))
