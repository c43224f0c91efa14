"""Losses of every form, weighed, against a plain loop that spells out f."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tuning_loop import (
    IGNORED,
    INDEX,
    VARIABLES,
    WEIGHTS,
    M,
    Masked,
    Y,
    assert_tunes,
    draw,
    log_softmax,
)

from metaimplicit import tuning_problem
from metaimplicit.tuning import ExampleWeights


class Focal(nn.Module):
    """A user's module whose reduction is an attribute."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, z, y):
        p = z.softmax(1)[torch.arange(len(z)), y]
        losses = -((1 - p) ** 2) * p.log()
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class Wrapped(nn.Module):
    """A user's module without any reduction of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=0.2)

    def forward(self, z, y):
        return self.inner(z, y)


class Delegating(nn.Module):
    """A user's module whose reduction is that of another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def reduction(self):
        return self.inner.reduction

    @reduction.setter
    def reduction(self, value):
        self.inner.reduction = value

    def forward(self, z, y):
        return self.inner(z, y)


def smoothed(z, y, smoothing):
    return (1 - smoothing) * log_softmax(z, y) + smoothing * (z.logsumexp(0) - z.mean())


def focal(z, y):
    p = z.softmax(0)[y]
    return -((1 - p) ** 2) * p.log()


def ones(y):
    return 1.0


def not_ignored(y):
    return float(y != -100)


# The loss, the labels, the loss of one example, its part of the divisor, and the divisor if the
# parts do not give it.
LOSSES = {
    "a module": (nn.CrossEntropyLoss(), Y, log_softmax, ones),
    "a module of none": (nn.CrossEntropyLoss(reduction="none"), Y, log_softmax, ones),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), Y, log_softmax, lambda y: 1 / M),
    "a partial sum": (partial(F.cross_entropy, reduction="sum"), Y, log_softmax, lambda y: 1 / M),
    "weights of classes": (
        nn.CrossEntropyLoss(WEIGHTS),
        Y,
        lambda z, y: WEIGHTS[y] * log_softmax(z, y),
        lambda y: WEIGHTS[y],
    ),
    "weights in a function": (
        lambda z, y, reduction: F.cross_entropy(z, y, WEIGHTS, reduction=reduction),
        Y,
        lambda z, y: WEIGHTS[y] * log_softmax(z, y),
        lambda y: WEIGHTS[y],
    ),
    "smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.3),
        Y,
        partial(smoothed, smoothing=0.3),
        ones,
    ),
    "ignored": (nn.CrossEntropyLoss(), IGNORED, log_softmax, not_ignored),
    "a class that is ignored": (
        nn.CrossEntropyLoss(ignore_index=1),
        Y,
        log_softmax,
        lambda y: float(y != 1),
    ),
    "ignored and weights": (
        nn.CrossEntropyLoss(WEIGHTS, ignore_index=255),
        torch.where(Y == 1, 255, Y),
        lambda z, y: WEIGHTS[y] * log_softmax(z, y),
        lambda y: 0.0 if y == 255 else WEIGHTS[y],
    ),
    "ignored in a sum": (
        nn.CrossEntropyLoss(reduction="sum"),
        IGNORED,
        log_softmax,
        lambda y: not_ignored(y) / (IGNORED != -100).sum(),
    ),
    "log-softmax": (lambda z, y: F.nll_loss(z.log_softmax(1), y), Y, log_softmax, ones),
    "a function without reduction, ignored": (
        lambda z, y: F.cross_entropy(z, y),
        IGNORED,
        log_softmax,
        not_ignored,
    ),
    "a mask in a function without reduction": (
        lambda z, y: Masked()(z, y),
        Y,
        log_softmax,
        lambda y: float(y != 1),
    ),
    "losses of the examples": (
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
        Y,
        log_softmax,
        ones,
    ),
    "a user's module": (Focal(), Y, focal, ones),
    "a user's sum": (Focal("sum"), Y, focal, lambda y: 1 / M),
    "a user's mask": (Masked(), Y, log_softmax, lambda y: float(y != 1)),
    "a user's wrapper": (Wrapped(), Y, partial(smoothed, smoothing=0.2), ones),
    "a function that vmap cannot take": (
        lambda z, y: F.cross_entropy(z, y) if z.sum().item() < 1e9 else z.sum(),
        Y,
        log_softmax,
        ones,
    ),
    "uint8 labels": (nn.CrossEntropyLoss(), Y.to(torch.uint8), log_softmax, ones),
    "int32 labels": (F.cross_entropy, Y.int(), log_softmax, ones),
    "a hinge": (
        lambda z, y: (1 - z.gather(1, y[:, None]) + z).clamp(min=0).sum(1).mean(),
        Y,
        lambda z, y: (1 - z[y] + z).clamp(min=0).sum(),
        ones,
    ),
}


# A network of classes sees what a plain one does, the losses, and the labels besides. Class weights
# see nothing but the labels. So it meets every loss, and the others meet one of each kind.
UNUSUAL_LABELS = [name for name, (_, y, *_) in LOSSES.items() if y is not Y]
CASES = [
    *product(LOSSES, ["network of classes"]),
    *product(["a module", "a hinge", *UNUSUAL_LABELS], ["classes"]),
    *product(["a user's mask", "ignored in a sum"], ["examples", "network"]),
]


@pytest.mark.parametrize(("name", "variable"), CASES)
def test_a_weighted_loss_counts_its_examples_as_the_loss_does(name, variable):
    """f = Σ wᵢ ℓᵢ / Σ dᵢ over the examples that count, where the loss is Σ ℓᵢ / Σ dᵢ."""
    loss, y, loss_of_one, divisor = LOSSES[name]
    weigher, weight_of_one = VARIABLES[variable]
    case = draw()
    y = y.clone()
    labels = y.long()

    def mean(z, weight):
        total, count = 0.0, 0.0
        for i in range(M):
            d = divisor(labels[i])
            if d > 0:
                loss_i = loss_of_one(z[i], labels[i])
                total = total + weight(i, labels[i], loss_i) * loss_i
                count = count + d
        return total / count

    def outputs(params, x):
        return x @ params["weight"].T + params["bias"]

    assert_tunes(
        case.model,
        loss,
        [weigher],
        (case.x, y, INDEX),
        (case.x_valid, y),
        inner_loss=lambda params, meta: mean(
            outputs(params, case.x), lambda i, y, loss: weight_of_one(meta, i, y, loss)
        ),
        outer_loss=lambda params: mean(outputs(params, case.x_valid), lambda i, y, loss: 1.0),
    )


WRAPPERS = {"compiled": partial(torch.compile, backend="eager"), "delegating": Delegating}
REDUCED = {
    "mean": (Y, lambda: nn.CrossEntropyLoss()),
    "sum": (Y, lambda: nn.CrossEntropyLoss(reduction="sum")),
    "none": (Y, lambda: nn.CrossEntropyLoss(reduction="none")),
    "mean of those that count": (IGNORED, lambda: nn.CrossEntropyLoss()),
    "a user's sum": (Y, lambda: Focal("sum")),
}


# To compile takes time, so that two of the reductions are compiled.
@pytest.mark.parametrize(
    ("name", "wrapper"),
    [*product(REDUCED, ["delegating"]), ("sum", "compiled"), ("a user's sum", "compiled")],
)
def test_a_wrapped_module_keeps_its_reduction(name, wrapper):
    y, make = REDUCED[name]
    plain = make()
    own = plain.reduction
    case = draw()
    problem, meta, _ = tuning_problem(case.model, WRAPPERS[wrapper](plain), [ExampleWeights(M)])
    assert plain.reduction == own

    weights = {"example_weights": torch.linspace(0.5, 2, M, dtype=torch.float64)}
    params = problem.init(meta, None)
    expected = make()(case.model(case.x), y).mean()
    weighted = 0.0
    for i in range(M):
        loss_of_one = make()
        loss_of_one.reduction = "sum"
        if y[i] >= 0:
            weighted = weighted + weights["example_weights"][i] * loss_of_one(
                case.model(case.x[i : i + 1]), y[i : i + 1]
            )
    divisor = 1 if own == "sum" else (y >= 0).sum()
    for _ in range(2):
        value = problem.inner_loss(params, weights, (case.x, y, torch.arange(M)))
        torch.testing.assert_close(value, weighted / divisor)
        torch.testing.assert_close(problem.outer_loss(params, meta, (case.x, y)), expected)
        assert plain.reduction == own
