"""With weights of 1, f is the loss itself, in its value and its slope, or the loss is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tuning_loop import INDEX, INNER, C, M, Y, draw

from metaimplicit import hypergradient, tuning_problem
from metaimplicit.tuning import ClassWeights, ExampleWeights, WeightDecay
from metaimplicit.tuning.loss_checks import find_difference

T = 5
WORDS = torch.randint(0, C, (M, T), generator=torch.Generator().manual_seed(2))
PADDED = torch.where(torch.arange(T) < torch.tensor([5, 3, 1, 2, 4, 5, 4, 2])[:, None], WORDS, -100)
REAL = torch.linspace(-1, 1, M, dtype=torch.float64)


class Words(nn.Linear):
    def forward(self, x):
        return super().forward(x).reshape(len(x), T, C)


def flat(z, y):
    return F.cross_entropy(z.reshape(-1, C), y.reshape(-1))


def shifted(z, y):
    return F.cross_entropy(z[:, :-1].reshape(-1, C), y[:, 1:].reshape(-1))


def with_entropy_of_the_mean(z, y):
    p = z.softmax(1).mean(0)
    return F.cross_entropy(z, y) + (p * p.log()).sum()


def ranking(z, y):
    return F.softplus(-(z - z.T) * (y[:, None] - y).sign()).mean()


def decorrelated(z, y):
    return F.cross_entropy(z, y) + torch.cov(z.T, correction=0).tril(-1).square().sum()


def mean_of_classes(z, y, reduction="mean"):
    _, inverse, sizes = y.unique(return_inverse=True, return_counts=True)
    losses = F.cross_entropy(z, y, reduction="none")
    return losses if reduction == "none" else (losses / sizes[inverse]).sum() / len(sizes)


def hardest_half(z, y, reduction="mean"):
    losses = F.cross_entropy(z, y, reduction="none")
    return losses if reduction == "none" else losses.topk(len(y) // 2).values.mean()


def clipped(z, y, reduction="mean"):
    """As a loss that differs far from zero alone, where the models are."""
    losses = (z[:, 0] - y).square()
    if reduction == "none":
        return losses
    return torch.where(z[:, 0].abs() > 3, 2 * losses, losses).mean()


BALANCED = torch.tensor([0, 0, 1, 1, 2, 2])
COUPLED = {
    "words that the loss flattens, padded": (Words(5, T * C), flat, [PADDED]),
    "words that the loss flattens, padded later": (Words(5, T * C), flat, [WORDS, PADDED]),
    "words that the loss shifts, padded": (Words(5, T * C), shifted, [PADDED]),
    "entropy of the mean prediction": (nn.Linear(5, C), with_entropy_of_the_mean, [Y]),
    "pairs": (nn.Linear(5, 1), ranking, [REAL]),
    "covariance": (nn.Linear(5, C), decorrelated, [Y]),
    "classes, balanced at first": (
        nn.Linear(5, C),
        lambda z, y: mean_of_classes(z, y),
        [BALANCED, torch.tensor([0, 0, 0, 0, 1, 2])],
    ),
    "classes, with a reduction": (
        nn.Linear(5, C),
        mean_of_classes,
        [BALANCED, torch.tensor([0, 0, 0, 0, 1, 2])],
    ),
    "the largest losses": (nn.Linear(5, C), hardest_half, [Y]),
    "far outputs": (nn.Linear(5, 1), clipped, [REAL]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_is_no_weighted_sum_over_examples_is_refused_by_name(name, dtype):
    model, loss, batches = COUPLED[name]
    model = model.to(dtype)
    problem, meta, _ = tuning_problem(model, loss, [ExampleWeights(20)])
    x = 10 * draw().x.to(dtype)
    *accepted, refused = [(x[: len(y)], _to(y, dtype), INDEX[: len(y)]) for y in batches]
    params = problem.init(meta, None)
    for batch in accepted:
        expected = loss(model(batch[0]), batch[1])
        torch.testing.assert_close(problem.inner_loss(params, meta, batch), expected)
    with pytest.raises(ValueError, match=r"loss: the value of .* they differ by .* %"):
        problem.inner_loss(params, meta, refused)


def _to(y, dtype):
    return y.to(dtype) if y.is_floating_point() else y


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_batch_of_tasks_is_checked_as_one_is(vectorize):
    problem, meta, _ = tuning_problem(draw().model, with_entropy_of_the_mean, [ClassWeights(C)])
    data = (draw().x.expand(2, -1, -1), Y.expand(2, -1))
    with pytest.raises(ValueError, match="with_entropy_of_the_mean is no mean"):
        hypergradient(
            problem, meta, data, inner=INNER, method="unrolled", batched=True, vectorize=vectorize
        )


def insensitive(margin):
    return lambda z, y: ((z[:, 0] - y).abs() - margin).clamp(min=0).mean()


def hinge(z, y):
    rival = z.masked_fill(F.one_hot(y, C).bool(), -torch.inf).amax(1)
    return (0.1 - z.gather(1, y[:, None])[:, 0] + rival).clamp(min=0).mean()


KINKED = {
    "hinge": (hinge, Y, C),
    "hinge at zero": (hinge, Y, C),
    "absolute error": (lambda z, y: (z[:, 0] - y).abs().mean(), REAL, 1),
    "insensitive": (insensitive(0.01), REAL, 1),
    "insensitive to most": (insensitive(0.5), REAL, 1),
    "insensitive to most, summed": (lambda z, y: len(z) * insensitive(0.5)(z, y), REAL, 1),
    "advantages that cancel": (lambda z, y: (z.log_softmax(1)[:, 0] * y).mean(), REAL, C),
}


@pytest.mark.parametrize("name", KINKED)
def test_kinks_and_terms_that_cancel_are_no_reason_to_refuse(name):
    """Σ wᵢ ℓᵢ / m, of single examples."""
    loss, y, outputs = KINKED[name]
    case = draw(outputs=outputs)
    if name == "hinge at zero":
        nn.init.zeros_(case.model.weight)
        nn.init.zeros_(case.model.bias)
    problem, meta, _ = tuning_problem(case.model, loss, [ExampleWeights(20)])
    meta = {"example_weights": torch.linspace(0.5, 2, 20, dtype=torch.float64)}
    got = problem.inner_loss(problem.init(meta, None), meta, (case.x, y, INDEX))
    z = case.model(case.x)
    terms = [meta["example_weights"][INDEX[i]] * loss(z[i, None], y[i, None]) for i in range(M)]
    torch.testing.assert_close(got, sum(terms) / (1 if "summed" in name else M))


def test_a_small_hinge_weighs_every_class_by_its_own_weight():
    """At outputs that depend on nothing, some examples have no loss by chance."""
    case = draw()
    problem, meta, _ = tuning_problem(case.model, hinge, [ClassWeights(C)])
    meta = {"class_weights": torch.tensor([0.5, 1.0, 3.0]).double()}
    got = problem.inner_loss(problem.init(meta, None), meta, (case.x, Y))
    z = case.model(case.x)
    terms = [meta["class_weights"][Y[i]] * hinge(z[i, None], Y[i, None]) for i in range(M)]
    torch.testing.assert_close(got, sum(terms) / M)


def test_a_single_class_has_the_loss_zero():
    case = draw(outputs=1)
    problem, meta, _ = tuning_problem(case.model, F.cross_entropy, [ClassWeights(1)])
    zeros = torch.zeros(M, dtype=torch.int64)
    assert problem.inner_loss(problem.init(meta, None), meta, (case.x, zeros)) == 0


def test_outputs_without_an_axis_of_examples_are_named():
    class WithPenalty(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return z, z.square().mean()

    def loss(outputs, y):
        return F.cross_entropy(outputs[0], y) + 0.1 * outputs[1]

    problem, meta, _ = tuning_problem(WithPenalty(5, C).double(), loss, [ClassWeights(C)])
    message = r"loss takes outputs of shapes \[\(8, 3\), \(\)\].*give it an argument `reduction`"
    with pytest.raises(ValueError, match=message):
        problem.inner_loss(problem.init(meta, None), meta, (draw().x, Y))


def contrast(outputs, y):
    """Tells each of M examples from the others."""
    return F.cross_entropy(outputs @ outputs.T, torch.arange(M))


def deviation(outputs, y):
    return (outputs - outputs.mean(0)).square().sum() / (len(outputs) - 1)


@pytest.mark.parametrize(
    ("loss", "variable", "message"),
    [
        (contrast, ClassWeights(C), "contrast cannot be evaluated at one example"),
        (deviation, ClassWeights(C), "deviation is not finite at any example alone"),
        (lambda z, y: (F.cross_entropy(z, y), {}), WeightDecay(), "returned tuple, expected one"),
        (lambda z, y: (F.cross_entropy(z, y), {}), ClassWeights(C), "returned tuple, expected one"),
    ],
    ids=["contrast", "deviation", "a tuple", "a tuple, weighed"],
)
def test_losses_without_a_value_of_their_own_at_each_example_are_named(loss, variable, message):
    case = draw()
    problem, meta, _ = tuning_problem(case.model, loss, [variable])
    with pytest.raises(ValueError, match=message):
        problem.inner_loss(problem.init(meta, None), meta, (case.x, Y))


def test_a_difference_of_slopes_alone_is_seen():
    """Z and z² have one value at 1, where their slopes are 1 and 2."""
    z = torch.full((3,), 1.0, dtype=torch.float64)
    difference = find_difference(lambda z: z.square().mean(), lambda z: z.mean(), z)
    assert difference.of_values < 1e-3
    assert difference.of_slopes == pytest.approx(1, abs=2e-3)
