"""Losses of `reduction="none"` that do not stand in the order of the examples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaimplicit import tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights

M = 4  # examples
C = 3  # classes
INPUTS = torch.linspace(0, 9, M * 5, dtype=torch.float64).sin().reshape(M, 5)
WEIGHTS = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)


class Words(nn.Linear):
    def __init__(self, words):
        torch.manual_seed(0)
        super().__init__(5, words * C, dtype=torch.float64)

    def forward(self, x):
        return super().forward(x).reshape(len(x), -1, C)


def words_first(z, y, reduction="mean"):
    """The rows are ordered by the word, then by the example."""
    return F.cross_entropy(z.transpose(0, 1).reshape(-1, C), y.T.reshape(-1), reduction=reduction)


def transposed(z, y, reduction="mean"):
    """The losses are [words, m]."""
    return F.cross_entropy(z.permute(1, 2, 0), y.T, reduction=reduction)


def masked(z, y, reduction="mean"):
    """Only the words that count have a loss."""
    return F.cross_entropy(z[y != -100], y[y != -100], reduction=reduction)


def draw_labels(words, lengths=None):
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, C, (M, words), generator=generator)
    if lengths is None:
        return y
    return torch.where(torch.arange(words) < torch.tensor(lengths)[:, None], y, -100)


def weighted(model, y):
    """Σ wᵢ ℓᵢⱼ over the words that count, by their number, as two plain loops."""
    z = model(INPUTS)
    total = 0.0
    for i in range(M):
        for j in range(y.shape[1]):
            if y[i, j] >= 0:
                total = total + WEIGHTS[i] * (z[i, j].logsumexp(0) - z[i, j, y[i, j]])
    return total / (y >= 0).sum()


def make_inner_loss(model, loss):
    problem, meta, _ = tuning_problem(model, loss, [ExampleWeights(M)])
    params = problem.init(meta, None)

    def inner_loss(y):
        return problem.inner_loss(
            params, {"example_weights": WEIGHTS}, (INPUTS, y, torch.arange(M))
        )

    return inner_loss


@pytest.mark.filterwarnings("ignore:outputs. got shape .4, 3, 3.:RuntimeWarning")  # as many words
@pytest.mark.parametrize("words", [1, 3, M, 6])
@pytest.mark.parametrize("loss", [words_first, transposed, masked])
def test_weights_go_to_their_examples(loss, words):
    model = Words(words)
    y = draw_labels(words)
    torch.testing.assert_close(make_inner_loss(model, loss)(y), weighted(model, y))


def test_losses_of_a_mask_that_stand_in_order_are_weighed():
    model = Words(6)
    inner_loss = make_inner_loss(model, masked)
    for lengths in ([6, 6, 6, 6], [2, 2, 2, 2], [1, 1, 1, 1]):
        y = draw_labels(6, lengths)
        torch.testing.assert_close(inner_loss(y), weighted(model, y))


@pytest.mark.parametrize("lengths", [[2, 2, 6, 2], [3, 1, 2, 2], [4, 0, 2, 2], [2, 1, 1, 0]])
@pytest.mark.parametrize("before", [[6, 6, 6, 6], [2, 2, 2, 2], [1, 1, 1, 1], None])
def test_losses_of_a_mask_that_are_out_of_order_are_refused(before, lengths):
    inner_loss = make_inner_loss(Words(6), masked)
    if before is not None:
        inner_loss(draw_labels(6, before))
    with pytest.raises(ValueError, match=r"masked .*(order of the examples|single examples)"):
        inner_loss(draw_labels(6, lengths))


def test_class_weights_need_a_loss_for_each_label():
    problem, meta, _ = tuning_problem(Words(6), words_first, [ClassWeights(C)])
    with pytest.raises(ValueError, match=r"ClassWeights: got targets .* for losses"):
        problem.inner_loss(problem.init(meta, None), meta, (INPUTS, draw_labels(6)))


def test_losses_that_compare_examples_are_weighed():
    """A contrastive loss of example i reads all rows."""

    def contrastive(z, y, reduction="mean"):
        logits = (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, y, reduction=reduction)

    torch.manual_seed(0)
    model = nn.Linear(5, 2, dtype=torch.float64)
    partner = torch.tensor([1, 0, 3, 2])
    expected = (WEIGHTS * contrastive(model(INPUTS), partner, "none")).mean()
    torch.testing.assert_close(make_inner_loss(model, contrastive)(partner), expected)
