"""Targets of every type and shape: as the loss means them, or refused with both shapes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tuning_loop import INDEX, C, M, Y, draw

from metaimplicit import tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightDecay

BCE = F.binary_cross_entropy_with_logits
MANY = torch.tensor([[1, 0, 1], [0, 1, 1]]).repeat(M // 2, 1)
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
LABELS = {
    "bool": Y > 0,
    "one-hot": F.one_hot(Y, C),
    "one-hot uint8": F.one_hot(Y, C).to(torch.uint8),
    "one-hot bool": F.one_hot(Y, C).bool(),
}


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_type_are_weighed_by_class(name, loss):
    """Σ w_{yᵢ} ℓᵢ / m."""
    y = LABELS[name]
    case = draw()
    problem, meta, _ = tuning_problem(case.model, loss, [ClassWeights(C)])
    params = problem.init(meta, None)
    got = problem.inner_loss(params, {"class_weights": CLASS_WEIGHTS}, (case.x, y))
    labels = y.long() if y.dim() == 1 else Y
    losses = -case.model(case.x).log_softmax(1)[torch.arange(M), labels]
    torch.testing.assert_close(got, (CLASS_WEIGHTS[labels] * losses).mean())
    torch.testing.assert_close(problem.outer_loss(params, meta, (case.x, y)), losses.mean())


@pytest.mark.parametrize("loss", [BCE, lambda z, y, **options: BCE(z, y, **options)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_several_answers_of_any_type_are_weighed_by_class(dtype, loss):
    case = draw()
    problem, meta, _ = tuning_problem(case.model, loss, [ClassWeights(C)])
    batch = (case.x, MANY.to(dtype))
    got = problem.inner_loss(problem.init(meta, None), {"class_weights": CLASS_WEIGHTS}, batch)
    z = case.model(case.x)
    torch.testing.assert_close(got, (CLASS_WEIGHTS * (F.softplus(z) - MANY * z)).mean())


def test_a_loss_that_takes_bools_receives_them():
    def signed(z, y):
        assert y.dtype == torch.bool
        return torch.where(y, z, -z).mean()

    case = draw()
    problem, meta, _ = tuning_problem(case.model, signed, [ExampleWeights(20)])
    got = problem.inner_loss(problem.init(meta, None), meta, (case.x, MANY.bool(), INDEX))
    torch.testing.assert_close(got, signed(case.model(case.x), MANY.bool()))


@pytest.mark.parametrize("first", [Y, Y + 1, -1 - Y], ids=["later", "too large", "negative"])
@pytest.mark.parametrize("variable", [ClassWeights(C), WeightDecay()])
@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda z, y: -z.log_softmax(1).gather(1, y[:, None]).mean(),
        lambda z, y: (z - F.one_hot(y, C)).square().mean(),
    ],
    ids=["cross-entropy", "gather", "one-hot"],
)
def test_a_label_that_is_no_class_is_named(loss, variable, first):
    case = draw()
    problem, meta, _ = tuning_problem(case.model, loss, [variable])
    params = problem.init(meta, None)
    if first is Y:
        problem.inner_loss(params, meta, (case.x, Y))
    wrong = Y + 1 if first is Y else first
    message = rf"targets: got torch.int64 \(8,\) from {wrong.min()} to {wrong.max()} for outputs"
    for evaluate in (problem.inner_loss, problem.outer_loss):
        with pytest.raises(ValueError, match=message):
            evaluate(params, meta, (case.x, wrong))


def own_error(z, y):
    return (z - y).square().mean()


def of_named(z, y):
    return own_error(z, y["y"])


def gaussian(outputs, y):
    mean, log_variance = outputs
    return ((mean - y).square() / log_variance.exp() + log_variance).mean()


class Gaussian(nn.Linear):
    def forward(self, x):
        z = super().forward(x)
        return z[:, :1], z[:, 1:]


REAL = torch.linspace(-1, 1, M, dtype=torch.float64)
BROADCAST = {
    "integers": (nn.Linear(5, 1), own_error, torch.arange(M)),
    "integers after equal ones": (nn.Linear(5, 1), own_error, torch.arange(M)),
    "a dict": (nn.Linear(5, 1), of_named, {"y": REAL}),
    "a square": (nn.Linear(5, M), own_error, REAL),
    "integers and a square": (nn.Linear(5, M), own_error, torch.arange(M)),
    "two outputs": (Gaussian(5, 2), gaussian, REAL),
}


@pytest.mark.parametrize("variable", [ExampleWeights(20), WeightDecay()])
@pytest.mark.parametrize("name", BROADCAST)
def test_targets_of_other_examples_are_refused_with_both_shapes(name, variable):
    model, loss, y = BROADCAST[name]
    problem, meta, _ = tuning_problem(model.double(), loss, [variable])
    params = problem.init(meta, None)
    x = draw().x
    if name == "integers after equal ones":
        problem.outer_loss(params, meta, (x, torch.ones(M, dtype=torch.int64)))
    message = r"targets: got shape \(8,\) for outputs of shape \(8, .\), which broadcast to"
    for evaluate in (problem.inner_loss, problem.outer_loss):
        with pytest.raises(ValueError, match=message):
            evaluate(params, meta, (x, y, INDEX))


SQUARE_LABELS = torch.arange(M).flip(0)
MEANT = {
    "one target for all outputs of an example": (3, own_error, REAL[:, None]),
    "labels of as many classes as examples": (M, F.cross_entropy, SQUARE_LABELS),
    "one-hot in the loss": (
        M,
        lambda z, y: (z.sigmoid() - F.one_hot(y, M)).square().mean(),
        SQUARE_LABELS,
    ),
    "indexed in the loss": (
        M,
        lambda z, y: -z.log_softmax(1)[torch.arange(len(y)), y].mean(),
        SQUARE_LABELS,
    ),
    "flattened in the loss": (1, lambda z, y: own_error(z.flatten(), y), torch.arange(M)),
    "unsqueezed in the loss": (3, lambda z, y: own_error(z, y[:, None]), REAL),
}


@pytest.mark.parametrize("name", MEANT)
def test_targets_of_another_shape_that_are_meant_are_taken(name):
    outputs, loss, y = MEANT[name]
    case = draw(outputs=outputs)
    problem, meta, _ = tuning_problem(case.model, loss, [WeightDecay(start=0.0)])
    got = problem.inner_loss(problem.init(meta, None), meta, (case.x, y))
    torch.testing.assert_close(got, loss(case.model(case.x), y))
