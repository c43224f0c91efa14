"""Operations that torch differentiates once are refused by name, with what can be done instead."""

import pytest
import torch
from mended.models import Function, bag, episodes_for, linear, meta_of
from reported.helpers import INNER, refuses
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaimplicit import (
    CG,
    BilevelProblem,
    FirstOrder,
    Implicit,
    MetaLearner,
    Tuner,
    Unrolled,
    check_hypergradient,
    hypergradient,
)
from metaimplicit.optim import GaussNewton, Newton
from metaimplicit.unsupported import UnsupportedOperationError

ONCE = "first-order.*finite-differences"
REVERSE = "unrolled.*double-backward"
LOOP = "vectorize='loop'"


class UsersMargin(nn.Module):
    """A loss of the user's that calls a margin loss."""

    def forward(self, outputs, targets):
        return 2 * F.multi_margin_loss(outputs.tanh(), targets, p=2)


class Fused(nn.Module):
    """Attention that insists on a fused kernel."""

    def forward(self, x):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            x = x.reshape(1, 1, -1, 6)
            return F.scaled_dot_product_attention(x, x, x).reshape(-1, 6)


def ctc(outputs, labels):
    logits = outputs.log_softmax(-1).unsqueeze(1)
    lengths = torch.tensor([len(outputs)]), torch.tensor([2])
    return F.ctc_loss(logits, labels[None, 1:3], *lengths)


def multilabel_margin(outputs, labels):
    return F.multilabel_margin_loss(outputs, F.pad(labels[:, None], (0, 4), value=-1))


# (model, loss, what the message names, what it offers), of operations with one derivative.
WITHOUT_SECOND_DERIVATIVE = {
    "multi_margin_loss": (linear, F.multi_margin_loss, "multi_margin_loss", ONCE),
    "MultiMarginLoss": (linear, nn.MultiMarginLoss(p=2), "multi_margin_loss", ONCE),
    "user's margin": (linear, UsersMargin(), "multi_margin_loss", ONCE),
    "multilabel_margin_loss": (linear, multilabel_margin, "multilabel_margin_loss", ONCE),
    "ctc_loss": (linear, ctc, "ctc_loss", ONCE),
    "hardsigmoid": (lambda: linear(nn.Hardsigmoid()), F.cross_entropy, "hardsigmoid", ONCE),
    "user's hardsigmoid": (
        lambda: linear(Function(F.hardsigmoid)),
        F.cross_entropy,
        "hardsigmoid",
        ONCE,
    ),
    "fused attention": (
        lambda: linear(Fused()),
        F.cross_entropy,
        "scaled_dot_product_flash_attention",
        "SDPBackend.MATH.*" + ONCE,
    ),
    "bag": (bag, F.cross_entropy, "embedding_bag", "nn.Embedding.*" + ONCE),
    "bag of sums": (lambda: bag(mode="sum"), F.cross_entropy, "embedding_bag", ONCE),
    "bag of maxima": (lambda: bag(mode="max"), F.cross_entropy, "embedding_bag", ONCE),
}
DOUBLE = pytest.mark.parametrize("name", WITHOUT_SECOND_DERIVATIVE)


def data_of(model):
    episodes = episodes_for(model)
    return episodes.support, episodes.query


def problem_of(model, loss):
    def losses(params, pair):
        return loss(torch.func.functional_call(model, params, (pair[0],)), pair[1])

    return BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=lambda params, meta, data: (
            losses(params, data[0]) + sum((p - meta[n]).square().sum() for n, p in params.items())
        ),
        outer_loss=lambda params, meta, data: losses(params, data[1]),
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("name", "vectorize", "method"),
    [
        *((name, "loop", "unrolled") for name in WITHOUT_SECOND_DERIVATIVE),
        *((name, "vmap", "cg") for name in WITHOUT_SECOND_DERIVATIVE),
        *(("bag", "auto", method) for method in ("unrolled", "cg")),
    ],
)
def test_a_second_derivative_that_is_missing_is_refused_by_name(name, method, vectorize):
    make, loss, operation, remedy = WITHOUT_SECOND_DERIVATIVE[name]
    model = make()
    chosen = Unrolled() if method == "unrolled" else Implicit(CG(), curvature="hessian")
    options = {"inner": INNER, "method": chosen, "proximal": 1.0, "vectorize": vectorize}
    with refuses(operation, remedy) as refusal:
        MetaLearner(model, loss, **options).backward(episodes_for(model))
    assert isinstance(refusal.value, UnsupportedOperationError)
    assert "is not implemented" in str(refusal.value.__cause__)


def finite_difference_of(model, loss, name):
    """Whether the remedies give a finite gradient, to tell a remedy from a hope."""
    gradients = []
    for method in (FirstOrder(), Implicit(CG(), products="finite-differences")):
        model.zero_grad()
        options = {"inner": INNER, "method": method, "proximal": 1.0, "vectorize": "loop"}
        MetaLearner(model, loss, **options).backward(episodes_for(model))
        gradients += [p.grad for p in model.parameters()]
    return gradients


@pytest.mark.filterwarnings("ignore:CG ended with NEGATIVE_CURVATURE:RuntimeWarning")
@DOUBLE
def test_what_the_message_offers_does_work(name):
    make, loss, *_ = WITHOUT_SECOND_DERIVATIVE[name]
    for gradient in finite_difference_of(make(), loss, name):
        assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", ["user's margin", "hardsigmoid", "fused attention", "bag"])
def test_the_other_doors_refuse_by_name_as_well(name):
    make, loss, operation, remedy = WITHOUT_SECOND_DERIVATIVE[name]
    model = make()
    problem, meta = problem_of(model, loss), meta_of(model)
    support, query = data_of(model)
    task = (tuple(x[0] for x in support), tuple(x[0] for x in query))
    with refuses(operation, remedy):
        hypergradient(problem, meta, (support, query), inner=INNER, method="cg", batched=True)
    with refuses(operation, remedy):
        check_hypergradient(problem, meta, task, inner=INNER, method="unrolled")
    with refuses(operation, remedy):
        Tuner(problem, meta, inner=INNER, method="cg").step(task, task)
    with refuses(operation, "an optimiser of torch.optim"):
        Newton(model).step(lambda: loss(model(task[0][0]), task[0][1]))
    with refuses(operation, "an optimiser of torch.optim"):
        GaussNewton(model, loss).step(lambda: (model(task[0][0]), task[0][1]))
