"""What counts is read from every batch; what cannot be weighed is refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from tuning_loop import (
    IGNORED,
    INDEX,
    WEIGHTS,
    C,
    M,
    Masked,
    Y,
    draw,
)

from metaimplicit import GradientDescent, Tuner, hypergradient, tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightDecay, WeightNetwork

SOFT = torch.randn(M, C, generator=torch.Generator().manual_seed(5)).double().softmax(1)


# Every batch is read for itself, whatever the first batch was.
BALANCED = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "batches"),
    [
        (nn.CrossEntropyLoss(), (Y, IGNORED, Y, torch.where(Y == 0, -100, Y))),
        (nn.CrossEntropyLoss(BALANCED), (torch.arange(6) % 3, torch.tensor([0, 0, 0, 0, 1, 2]))),
        (nn.CrossEntropyLoss(ignore_index=1), (2 * (Y // 2), Y)),
        (nn.CrossEntropyLoss(reduction="sum"), (Y[:1], Y, Y[:3])),
        (Masked(), (torch.tensor([0, 2, 2]), torch.tensor([0, 1, 2]))),
    ],
    ids=["ignored later", "balanced at first", "class ignored later", "one example", "mask"],
)
def test_every_batch_counts_for_itself(loss, batches):
    """With unit weights, f is the loss."""
    model = draw().model
    problem, meta, _ = tuning_problem(model, loss, [ClassWeights(C)])
    params = problem.init(meta, None)
    for i, y in enumerate(batches * 2):
        torch.manual_seed(i)
        x = torch.randn(len(y), 5, dtype=torch.float64)
        expected = loss(functional_call(model, params, x), y)
        torch.testing.assert_close(problem.inner_loss(params, meta, (x, y)), expected)


def test_targets_that_change_in_place_are_read_again():
    model = draw().model
    problem, meta, _ = tuning_problem(model, F.cross_entropy, [ClassWeights(C)])
    params = problem.init(meta, None)
    x, y = draw().x, Y.clone()
    for _ in range(2):
        expected = F.cross_entropy(model(x), y)
        torch.testing.assert_close(problem.inner_loss(params, meta, (x, y)), expected)
        y[:3] = -100


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (nn.CrossEntropyLoss(), Y),
        (nn.CrossEntropyLoss(), IGNORED),
        (nn.CrossEntropyLoss(WEIGHTS), Y),
        (Masked(), Y),
    ],
    ids=["plain", "ignored", "weights of classes", "mask"],
)
def test_vmap_over_batches_is_a_loop_over_them(loss, y):
    problem, meta, _ = tuning_problem(draw().model, loss, [ClassWeights(C)])
    meta = {"class_weights": torch.tensor([0.5, 1.0, 3.0]).double()}
    options = {"inner": GradientDescent(steps=2, lr=0.3), "method": "unrolled"}
    x = torch.randn(2, M, 5, dtype=torch.float64)
    labels = torch.stack([y, y.flip(0)])

    together = hypergradient(problem, meta, (x, labels), batched=True, **options)
    alone = [
        hypergradient(problem, meta, (x[i], labels[i]), **options).grads["class_weights"]
        for i in range(2)
    ]
    torch.testing.assert_close(together.grads["class_weights"], (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_low_precision(dtype, weight):
    """f of unit weights is the loss to a few units of round-off."""
    torch.manual_seed(0)
    model = nn.Linear(5, C).to(dtype)
    loss = nn.CrossEntropyLoss(None if weight is None else weight.to(dtype))
    problem, meta, _ = tuning_problem(model, loss, [ClassWeights(C)])
    x = torch.randn(M, 5).to(dtype)
    got = problem.inner_loss(problem.init(meta, None), meta, (x, IGNORED))
    expected = loss(model(x), IGNORED)
    torch.testing.assert_close(got, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def root_mean_square(z, y, reduction="mean"):
    squares = (z - y).square()
    return squares if reduction == "none" else squares.mean().sqrt()


@pytest.mark.parametrize(
    ("loss", "y", "variable", "message"),
    [
        (
            root_mean_square,
            SOFT,
            ExampleWeights(20),
            "loss: the value of root_mean_square is no multiple of the mean of its losses for "
            r"reduction='none': at some outputs they differ by .* %.*; use a loss that is",
        ),
        (
            lambda z, y: (z - y).square().mean().sqrt(),
            SOFT,
            ExampleWeights(20),
            "loss: the value of <lambda> is no mean of its values at single examples.*give it an "
            "argument `reduction`",
        ),
        (
            lambda z, y: F.cross_entropy(z, y, WEIGHTS),
            Y,
            ExampleWeights(20),
            "loss: the value of <lambda> is no mean of its values at single examples",
        ),
        (
            nn.CrossEntropyLoss(),
            torch.full((M,), -100),
            ClassWeights(C),
            "loss: CrossEntropyLoss counts no example of the batch",
        ),
        (
            nn.MSELoss(),
            SOFT,
            ClassWeights(C + 1),
            r"ClassWeights: got targets \(8, 3\) of torch.float64 for losses \(8, 3\), expected "
            r"the number of a class for each loss, or scores \[m, 4\]",
        ),
        (
            F.cross_entropy,
            SOFT,
            WeightNetwork(5, classes=2),
            r"WeightNetwork: got targets \(8, 3\), expected scores \[m, 2\]",
        ),
    ],
)
def test_what_cannot_be_weighed_is_refused_by_name(loss, y, variable, message):
    case = draw()
    problem, meta, domains = tuning_problem(case.model, loss, [variable])
    tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=2))
    with pytest.raises(ValueError, match=message):
        tuner.step((case.x, y, INDEX), (case.x_valid, y))


def test_a_label_that_counts_and_has_no_weight_is_refused():
    case = draw()
    problem, meta, _ = tuning_problem(case.model, F.cross_entropy, [ClassWeights(2)])
    with pytest.raises(IndexError):
        problem.inner_loss(problem.init(meta, None), meta, (case.x, Y))


def test_weights_of_another_shape_are_refused():
    class Two(ClassWeights):
        def weights(self, meta, losses, batch):
            return meta["class_weights"][:2]

    case = draw()
    problem, meta, _ = tuning_problem(case.model, F.cross_entropy, [Two(C)])
    with pytest.raises(ValueError, match=r"weights: got shape \(2,\) for losses \(8,\)"):
        problem.inner_loss(problem.init(meta, None), meta, (case.x, Y))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss(), lambda z, y: (z - y).abs().sum()])
def test_targets_that_broadcast_against_the_outputs_are_refused(loss, weighed):
    """(z − y)² of [m, 1] and [m] would be m² differences."""
    case = draw(outputs=1)
    variable = ExampleWeights(20) if weighed else WeightDecay()
    problem, meta, _ = tuning_problem(case.model, loss, [variable])
    params = problem.init(meta, None)
    message = r"targets: got shape \(8,\) for outputs of shape \(8, 1\).*expected the shape of the"
    for evaluate in (problem.inner_loss, problem.outer_loss):
        with pytest.raises(ValueError, match=message):
            evaluate(params, meta, (case.x, SOFT[:, 0], INDEX))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.mse_loss(z.squeeze(1), y),
        lambda z, y: F.mse_loss(z.flatten(), y),
        lambda z, y: F.softplus(-(z - z.T) * (y[:, None] - y).sign()).mean(),
    ],
    ids=["squeezed", "flattened", "pairs of examples"],
)
def test_a_loss_that_takes_targets_of_another_shape_is_not(loss):
    case = draw(outputs=1)
    problem, meta, _ = tuning_problem(case.model, loss, [WeightDecay(start=0.0)])
    got = problem.inner_loss(problem.init(meta, None), meta, (case.x, SOFT[:, 0]))
    torch.testing.assert_close(got, loss(case.model(case.x), SOFT[:, 0]))


# Labels that are read as numbers of classes, and losses that are zero at most outputs.

ANSWERS = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 1]])
SIGNS = torch.tensor([0, 1, 0, 1, 1, 1])
SIX_INPUTS = torch.linspace(0, 7, 30, dtype=torch.float64).sin().reshape(6, 5)


def converting(z, y, reduction="mean"):
    return F.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction=reduction)


def perceptron(z, y, reduction):
    losses = F.relu((1 - 2 * y) * z.squeeze(-1))
    return losses if reduction == "none" else getattr(losses, reduction)()


def summed_perceptron(z, y, reduction="sum"):
    return perceptron(z, y, reduction)


def mean_perceptron(z, y, reduction="mean"):
    return perceptron(z, y, reduction)


def inner_loss_of(loss, variable, y, outputs, **meta):
    torch.manual_seed(0)
    model = nn.Linear(5, outputs, dtype=torch.float64)
    problem, start, _ = tuning_problem(model, loss, [variable])
    params = problem.init(start, None)
    return model(SIX_INPUTS), problem.inner_loss(params, start | meta, (SIX_INPUTS, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.uint8])
def test_several_answers_that_the_loss_converts_have_the_weights_of_their_classes(dtype):
    w = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    z, value = inner_loss_of(
        converting, ClassWeights(3), ANSWERS.to(dtype), outputs=3, class_weights=w
    )
    losses = (1 + z.exp()).log() - ANSWERS * z
    torch.testing.assert_close(value, (w * losses).mean())


@pytest.mark.parametrize("labels", [SIGNS, torch.ones_like(SIGNS), torch.zeros_like(SIGNS)])
@pytest.mark.parametrize("loss", [summed_perceptron, mean_perceptron])
def test_labels_whose_loss_is_zero_on_one_side_count(loss, labels):
    w = torch.tensor([1.0, 5.0], dtype=torch.float64)
    z, value = inner_loss_of(loss, ClassWeights(2), labels, outputs=1, class_weights=w)
    total = 0.0
    for y, score in zip(labels.tolist(), z.squeeze(1), strict=True):
        total = total + w[y] * (-score if y else score).clamp(min=0)
    assert total > 0
    expected = total if loss is summed_perceptron else total / len(labels)
    torch.testing.assert_close(value, expected)


class WithMask(nn.Module):
    """It returns its scores and which examples count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x), x[:, 0] > 0


def mean_of_the_mask(outputs, y, reduction="mean"):
    scores, counts = outputs
    losses = F.cross_entropy(scores, y, reduction="none") * counts
    return losses if reduction == "none" else losses.sum() / counts.sum()


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh labels", "the same labels"])
def test_a_mask_among_the_outputs_is_that_of_its_batch(fresh):
    model = WithMask().double()
    problem, meta, _ = tuning_problem(model, mean_of_the_mask, [ExampleWeights(6)])
    params = dict(model.named_parameters())
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for count in (6, 3, 4):
        mask = torch.where(torch.arange(6) < count, 1.0, -1.0)
        batch = torch.cat([(x[:, :1].abs() + 0.1) * mask[:, None], x[:, 1:]], 1)
        got = problem.inner_loss(params, meta, (batch, y.clone() if fresh else y, torch.arange(6)))
        torch.testing.assert_close(got, mean_of_the_mask(model(batch), y))
