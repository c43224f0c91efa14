"""Features that are evaluated once, against the plain way: the same function within the losses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, largest_error, randn, relative_error
from torch import nn

from metaimplicit import (
    BilevelProblem,
    Composite,
    GradientDescent,
    NewtonCG,
    Proximal,
    Stream,
    check_hypergradient,
    hypergradient,
)
from metaimplicit.diagnostics import compare

TASKS = 3
SUPPORT = (randn(TASKS, 6, 3, seed=1), torch.arange(6 * TASKS).reshape(TASKS, 6) % 3)
QUERY = (randn(TASKS, 5, 3, seed=2), torch.arange(5 * TASKS).reshape(TASKS, 5) % 3)
DATA = {"support": SUPPORT, "query": QUERY}
HEAD = nn.Linear(3, 3).double()
META = {
    "body": randn(3, 3, seed=3),
    "weight": randn(3, 3, seed=4),
    "bias": randn(3, seed=5),
}
FIVE_STEPS = GradientDescent(steps=5, lr=0.3)
DIFFERENCES = {"sama", "f2sa"}  # whose round-off is amplified


def body(meta, data):
    """The images of all tasks in one call. The labels pass through."""
    return {name: (torch.tanh(x @ meta["body"]), y) for name, (x, y) in data.items()}


def init(meta, c):
    """A head that starts near the mean feature, so that θ₀ depends on the body, too."""
    features, _ = c["support"]
    return {"weight": meta["weight"] + 0.1 * features.mean(0), "bias": meta["bias"]}


def outputs(params, meta, c):
    return torch.func.functional_call(HEAD, params, (c["support"][0],))


def outer_loss(params, meta, c):
    """Its direct derivatives in φ and in c are not zero."""
    features, labels = c["query"]
    scores = torch.func.functional_call(HEAD, params, (features,))
    return F.cross_entropy(scores, labels) + 0.1 * meta["body"].square().sum()


INNER_LOSS = Composite(
    outputs,
    loss=lambda z, c: F.cross_entropy(z, c["support"][1]),
    penalty=Proximal(0.5),
    module=HEAD,
)
ONCE = BilevelProblem(init, INNER_LOSS, outer_loss, features=body)
# The same functions of one task, without features.
PLAIN = BilevelProblem(
    init=lambda meta, d: init(meta, body(meta, d)),
    inner_loss=Composite(
        lambda p, m, d: outputs(p, m, body(m, d)),
        loss=lambda z, d: F.cross_entropy(z, d["support"][1]),
        penalty=Proximal(0.5),
        module=HEAD,
    ),
    outer_loss=lambda p, m, d: outer_loss(p, m, body(m, d)),
)


class CountedBody:
    def __init__(self):
        self.calls = 0

    def __call__(self, meta, data):
        self.calls += 1
        return body(meta, data)


def run(problem, method, data=DATA, *, inner=FIVE_STEPS, batched=True, **options):
    torch.manual_seed(0)  # for solvers that draw random numbers
    return hypergradient(
        problem, META, data, inner=inner, method=method, batched=batched, **options
    )


# A method of each way to pull back to φ, and of solvers that draw random numbers or need a module.
PULLBACKS = [
    *("unrolled", "truncated", "first-order", "forward", "real-time", "cg", "nystrom-gaussian"),
    *("kfac", "fixed-point", "sama", "f2sa"),
]


@pytest.mark.parametrize("method", PULLBACKS)
def test_every_method_gives_the_gradient_of_the_plain_way(method):
    counted = CountedBody()
    once = run(replace(ONCE, features=counted), method)
    assert counted.calls == 1
    plain = run(PLAIN, method)
    tolerance = 1e-7 if method in DIFFERENCES else 1e-12
    assert relative_error(once.outer_loss, plain.outer_loss) < 1e-14
    assert largest_error(once.grads, plain.grads) < tolerance


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_tasks_in_a_loop_share_the_features(vectorize):
    counted = CountedBody()
    once = run(replace(ONCE, features=counted), "dense", vectorize=vectorize)
    assert counted.calls == 1
    assert largest_error(once.grads, run(PLAIN, "dense").grads) < 1e-12


def test_features_of_one_problem_have_no_task_axis():
    data = {name: (x[0], y[0]) for name, (x, y) in DATA.items()}
    once = run(ONCE, "unrolled", data, batched=False)
    plain = run(PLAIN, "unrolled", data, batched=False)
    assert largest_error(once.grads, plain.grads) < 1e-12


def normalised(meta, data):
    """Statistics of the whole batch, which no function of one task can compute."""
    raw = body(meta, data)
    everything = torch.cat([x.flatten(0, 1) for x, _ in raw.values()])
    return {name: ((x - everything.mean(0)) / everything.std(0), y) for name, (x, y) in raw.items()}


@pytest.mark.parametrize(
    ("method", "inner", "entry"),
    [
        ("unrolled", FIVE_STEPS, "body"),
        ("unrolled", FIVE_STEPS, "support"),
        ("dense", NewtonCG(steps=20, tol=1e-12), "support"),
        ("dense", NewtonCG(steps=20, tol=1e-12), "query"),
    ],
    ids=["unrolled-body", "unrolled-support", "dense-support", "dense-query"],
)
def test_features_that_mix_the_tasks_agree_with_finite_differences(method, inner, entry):
    """In φ, and in the data that the features see."""
    problem = replace(ONCE, features=normalised)
    tensors = {"body": META["body"], "support": SUPPORT[0], "query": QUERY[0]}

    def at(value, requires_grad=False):
        values = tensors | {entry: value.detach().requires_grad_(requires_grad)}
        data = {name: (values[name], DATA[name][1]) for name in DATA}
        options = {"inner": inner, "method": method, "batched": True}
        return hypergradient(problem, META | {"body": values["body"]}, data, **options)

    direction = randn(*tensors[entry].shape, seed=6)
    expected = finite_difference(
        lambda value: at(value).outer_loss, tensors[entry], direction, step=1e-3
    )
    result = at(tensors[entry], requires_grad=True)
    gradient = result.grads["body"] if entry == "body" else result.data_grads[entry][0]
    slope = (gradient * direction).sum()
    assert float(slope) == pytest.approx(float(expected), rel=1e-7)


def test_diagnostics_evaluate_the_features():
    options = {"inner": NewtonCG(steps=20, tol=1e-12), "batched": True}
    check = check_hypergradient(ONCE, META, DATA, method="dense", directions=1, **options)
    assert check.error < 1e-7
    comparison = compare(ONCE, META, DATA, methods=["cg"], products=[9], seeds=1, **options)
    assert comparison.error("cg", 9) < 1e-5


# Refusals.


def test_a_gradient_that_the_method_leaves_out_is_refused_by_the_name_of_the_entry():
    """The features of the support set alone: first-order methods do not reach them."""
    problem = BilevelProblem(
        init=lambda meta, c: {"w": torch.zeros(3, dtype=torch.float64)},
        inner_loss=lambda p, m, c: (c["support"][0] @ p["w"]).square().mean(),
        outer_loss=lambda p, m, c: p["w"].sum(),
        features=body,
    )
    message = r"first-order cannot give the gradient of meta\['body'\]"
    with pytest.raises(ValueError, match=message):
        run(problem, "first-order")


def test_a_tensor_that_features_capture_is_refused():
    captured = randn(3, 3, seed=3).requires_grad_()

    def features(meta, data):
        return body({"body": captured}, data)

    with pytest.raises(ValueError, match="tensor 'captured' requires grad and is captured"):
        run(replace(ONCE, features=features), "unrolled")


def test_features_of_a_stream_are_refused():
    with pytest.raises(ValueError, match="features: got a Stream, expected data"):
        run(ONCE, "unrolled", Stream(lambda t: DATA))


def test_features_without_the_task_axis_are_refused():
    problem = replace(ONCE, features=lambda meta, data: meta["body"].sum())
    with pytest.raises(ValueError, match="expected every tensor to carry one task axis"):
        run(problem, "unrolled")
