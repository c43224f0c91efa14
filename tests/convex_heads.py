"""A convex head on learnt features, and what its inner problem is in plain torch."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from oracles import randn

from metaimplicit import BilevelProblem, FromMeta, hypergradient
from metaimplicit.inner import LinearHead, Logistic, SmoothHinge, SoftmaxCrossEntropy, SquaredError

TASKS = 2
CLASSES = 3
PIXELS = 4
META = {
    "body": None,  # [PIXELS, p]
    "log_strength": torch.tensor(-0.3, dtype=torch.float64),
    "log_temperature": torch.tensor(0.2, dtype=torch.float64),
    "scale": torch.tensor(1.5, dtype=torch.float64),
}


def one_hot(labels):
    return F.one_hot(labels, CLASSES).double()


def smooth_hinge(z, y):
    """Rennie & Srebro (2005), by cases."""
    u = (2 * y - 1) * z
    return torch.where(u <= 0, 0.5 - u, torch.where(u < 1, 0.5 * (1 - u) ** 2, 0.0)).sum()


# Each loss with what it is in plain torch, as a sum over the examples of one task.
LOSSES = {
    "squares": (SquaredError(), lambda z, y: 0.5 * F.mse_loss(z, one_hot(y), reduction="sum")),
    "logistic": (
        Logistic(),
        lambda z, y: F.binary_cross_entropy_with_logits(z, one_hot(y), reduction="sum"),
    ),
    "softmax": (SoftmaxCrossEntropy(), lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    "hinge": (SmoothHinge(), lambda z, y: smooth_hinge(z, one_hot(y))),
}


def body(meta, images):
    """The features that the head sees."""
    return meta["scale"] * (images @ meta["body"]).tanh()


def make(loss="softmax", *, p=8, m=5, bias=True, dtype=torch.float64):
    """A problem with its φ and data, and its inner loss in plain torch, of one task.

    p features and m examples: with m ≤ p, the dual matrix is the smaller one.
    """
    convex_loss, plain_loss = LOSSES[loss]
    head = LinearHead(
        features=lambda meta, data: body(meta, data[0]),
        targets=lambda meta, data: data[1],
        loss=convex_loss,
        strength=FromMeta("log_strength", torch.exp),
        temperature=FromMeta("log_temperature", torch.exp),
        bias="bias" if bias else None,
    )

    def init(meta, data):
        params = {"weight": torch.zeros(CLASSES, p, dtype=dtype)}
        return params | ({"bias": torch.zeros(CLASSES, dtype=dtype)} if bias else {})

    def outer_loss(params, meta, data):
        return F.cross_entropy(head.predict(params, meta, body(meta, data[2])), data[3])

    def plain(params, meta, data):
        z = body(meta, data[0]) @ params["weight"].T
        z = (z + params["bias"] if bias else z) / meta["log_temperature"].exp()
        squares = sum(q.square().sum() for q in params.values())
        return plain_loss(z, data[1]) + 0.5 * meta["log_strength"].exp() * squares

    meta = META | {"body": 0.5 * randn(PIXELS, p, seed=1)}
    labels = torch.arange(m).expand(TASKS, m) % CLASSES
    queries = torch.arange(7).expand(TASKS, 7) % CLASSES
    data = (randn(TASKS, m, PIXELS, seed=2), labels, randn(TASKS, 7, PIXELS, seed=3), queries)
    return SimpleNamespace(
        problem=BilevelProblem(init, head, outer_loss),
        head=head,
        meta={name: value.to(dtype) for name, value in meta.items()},
        data=tuple(x.to(dtype) if x.is_floating_point() else x for x in data),
        plain=plain,
    )


def solve(case, inner, method="auto", **options):
    """The hypergradient of a case. `meta` or `data` among the options take the place of its own."""
    meta = options.pop("meta", case.meta)
    data = options.pop("data", case.data)
    return hypergradient(
        case.problem, meta, data, inner=inner, method=method, batched=True, **options
    )
