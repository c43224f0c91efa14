"""What `ProximalGradient` takes and refuses, and its operators on single numbers."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from metaimplicit import (
    BilevelProblem,
    FromMeta,
    ProximalGradient,
    Stream,
    Truncated,
    hypergradient,
)
from metaimplicit.inner import BoxConstraint, GroupLasso, L1Norm, SimplexConstraint
from metaimplicit.inner.regularizers import Regularizer
from metaimplicit.solvers import Status

TARGET = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)


def zero(dtype=torch.float64):
    return torch.zeros((), dtype=dtype)


def two_layers(params, meta, data):
    """½ ‖w − t‖² for two weights, so that every prox is applied to t itself at the end."""
    weights = ("body.weight", "head.weight")
    return sum(0.5 * (params[name] - meta["t"]).square().sum() for name in weights)


PROBLEM = BilevelProblem(
    init=lambda meta, data: {
        name: torch.zeros(3, dtype=torch.float64) for name in ("body.weight", "head.weight")
    },
    inner_loss=two_layers,
    outer_loss=lambda params, meta, data: sum(p.square().sum() for p in params.values()),
)


def run(inner, method="unrolled", **numbers):
    numbers = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
    return hypergradient(PROBLEM, {"t": TARGET, **numbers}, None, inner=inner, method=method)


SHRUNK = torch.tensor([0.5, 1.5, -2.5], dtype=torch.float64)
one_step = partial(ProximalGradient, steps=1, lr=1.0)


@pytest.mark.parametrize("key", ["head.weight", "head", "head.*", "*"])
def test_a_key_is_a_name_a_module_or_a_pattern(key):
    params = run(one_step({key: L1Norm(0.5)})).params
    body = SHRUNK if key == "*" else TARGET
    torch.testing.assert_close(params["head.weight"], SHRUNK)
    torch.testing.assert_close(params["body.weight"], body)


def test_the_name_of_a_parameter_counts_before_patterns():
    params = run(one_step({"*": L1Norm(0.0), "head.weight": L1Norm(0.5)})).params
    torch.testing.assert_close(params["head.weight"], SHRUNK)
    torch.testing.assert_close(params["body.weight"], TARGET)


@pytest.mark.parametrize("method", ["unrolled", "forward", "fixed-point"])
@pytest.mark.parametrize("key", ["head.wieght", "tail.*", ""])
def test_a_key_that_fits_nothing_is_refused(method, key):
    with pytest.raises(ValueError, match=r"regularizer: got the keys .*, which fit no parameter"):
        run(one_step({key: L1Norm(0.5), "body": L1Norm(0.5)}), method)


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_step_sizes_by_parameter_and_by_step(method):
    """w₂ = (1 − (1 − η₁)(1 − η₂)) t, shrunk by η₁λ(1 − η₂) + η₂λ."""
    inner = ProximalGradient(L1Norm(0.1), steps=2, lr={"head": [0.5, FromMeta("last")], "*": 0.5})
    result = run(inner, method, last=0.25)
    expected = TARGET * 0.625 - 0.1 * (0.5 * 0.75 + 0.25) * TARGET.sign()
    torch.testing.assert_close(result.params["head.weight"], expected)
    # ∂w₂/∂η₂ = (t − w₁) − λ sign t with w₁ = (t − λ sign t)/2
    slope = (TARGET - 0.1 * TARGET.sign()) / 2
    torch.testing.assert_close(result.grads["last"], 2 * expected @ slope)


NOT_ONE = "expected a `Regularizer`"
NO_STEP = "expected a step size > 0"
BAD = {
    "function": (lambda: ProximalGradient(torch.abs), NOT_ONE),
    "list": (lambda: ProximalGradient([L1Norm(0.1)]), NOT_ONE),
    "text": (lambda: ProximalGradient("l1"), NOT_ONE),
    "dict of functions": (lambda: ProximalGradient({"w": torch.abs}), NOT_ONE),
    "step size": (lambda: ProximalGradient(L1Norm(), lr={"w": 0.0}), NO_STEP),
    "step sizes": (lambda: ProximalGradient(L1Norm(), steps=2, lr=[0.1, -0.1]), NO_STEP),
    "few": (lambda: ProximalGradient(L1Norm(), steps=3, lr=[0.1]), "one for each step"),
    "L1Norm": (lambda: L1Norm(-0.5), "L1Norm strength: got -0.5, expected a number ≥ 0"),
    "NaN": (lambda: L1Norm(float("nan")), "L1Norm strength: got nan"),
    "tensor": (lambda: L1Norm(torch.tensor([1.0, -1.0])), "L1Norm strength"),
    "GroupLasso": (lambda: GroupLasso(-1.0), "GroupLasso strength: got -1.0"),
    "box": (lambda: BoxConstraint(2.0, 1.0), "expected lower ≤ upper"),
    "simplex": (lambda: SimplexConstraint(0.0), "SimplexConstraint total: got 0.0"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_where_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LEARNT = {
    "L1Norm": (L1Norm(FromMeta("x")), "L1Norm strength"),
    "GroupLasso": (GroupLasso(FromMeta("x")), "GroupLasso strength"),
    "box": (BoxConstraint(0.0, FromMeta("x")), "expected lower ≤ upper"),
    "simplex": ({"head": SimplexConstraint(FromMeta("x"))}, "SimplexConstraint total"),
}


@pytest.mark.parametrize("method", ["unrolled", "forward"])
@pytest.mark.parametrize(("regularizer", "message"), LEARNT.values(), ids=LEARNT)
def test_learnt_numbers_out_of_range_are_refused(regularizer, message, method):
    with pytest.raises(ValueError, match=message):
        run(one_step(regularizer), method, x=-1.0)


@dataclass(frozen=True)
class Norm(Regularizer):
    """λ ‖z‖ of all numbers of a task, by a user."""

    strength: float

    def prox(self, x, step, numbers):
        flat = x.reshape(len(x), -1)
        size = flat.norm(dim=1, keepdim=True)
        return (flat * (1 - step * self.strength / size).clamp(min=0)).reshape(x.shape)


@dataclass(frozen=True)
class Unrelated:
    """The same without the base class."""

    strength: float

    def numbers(self):
        return {}

    prox = Norm.prox


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize(
    "regularizer",
    [GroupLasso(0.5), L1Norm(0.5), Norm(0.5), Unrelated(0.5)],
    ids=lambda r: type(r).__name__,
)
def test_a_single_number_of_each_task_is_shrunk_by_itself(regularizer, vectorize):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": zero()},
        inner_loss=lambda params, meta, data: 0.5 * (params["w"] - meta["s"] * data).square(),
        outer_loss=lambda params, meta, data: params["w"],
    )
    result = hypergradient(
        problem,
        {"s": torch.tensor(1.0, dtype=torch.float64)},
        TARGET,
        inner=one_step(regularizer),
        method="unrolled",
        batched=True,
        vectorize=vectorize,
    )
    torch.testing.assert_close(result.params["w"], SHRUNK)
    torch.testing.assert_close(result.grads["s"], TARGET.mean())


def test_the_simplex_of_a_single_number_is_its_total():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": zero()},
        inner_loss=lambda params, meta, data: 0.5 * (params["w"] - meta["s"] * data).square(),
        outer_loss=lambda params, meta, data: params["w"],
    )
    meta = {"s": torch.tensor(1.0, dtype=torch.float64)}
    inner = one_step(SimplexConstraint(2.0))
    result = hypergradient(problem, meta, TARGET, inner=inner, method="unrolled", batched=True)
    assert result.params["w"].tolist() == [2.0, 2.0, 2.0]


# Operators that take a row as a whole.

ROWS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.2], [-3.0, 4.0, 1.0]], dtype=torch.float64)
BY_ROW = torch.tensor([[0.1], [1.0], [3.0]], dtype=torch.float64)
BY_ELEMENT = torch.tensor([0.9, 0.3, 0.1], dtype=torch.float64)


def run_rows(regularizer, lr=1.0, rows=ROWS, method="unrolled", **meta):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros_like(rows)},
        inner_loss=lambda params, meta, data: 0.5 * meta["s"] * (params["w"] - rows).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].square().sum(),
    )
    meta = {"s": torch.tensor(1.0, dtype=torch.float64), **meta}
    inner = ProximalGradient(regularizer, steps=1, lr=lr)
    return hypergradient(problem, meta, None, inner=inner, method=method)


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_each_group_may_have_its_strength_and_step_size(method):
    lr = torch.tensor([[0.5], [1.0], [0.25]], dtype=torch.float64)
    regularizer = GroupLasso(FromMeta("strength"))
    numbers = {"strength": BY_ROW, "size": lr}
    w = run_rows(regularizer, FromMeta("size"), method=method, **numbers).params["w"]
    for row, strength, size, target in zip(w, BY_ROW, lr, ROWS, strict=True):
        norm = (size * target).norm()
        shrinkage = max(1 - float(size * strength / norm), 0.0)
        torch.testing.assert_close(row, shrinkage * size * target)


def test_each_row_may_have_its_total():
    w = run_rows(SimplexConstraint(BY_ROW)).params["w"]
    torch.testing.assert_close(w.sum(1, keepdim=True), BY_ROW)
    assert w.min() >= 0


BY_ELEMENTS = {
    "step size": (SimplexConstraint(), BY_ELEMENT, ROWS, "lr"),
    "learnt step size": (GroupLasso(0.5), FromMeta("x"), ROWS, "lr"),
    "strength": (GroupLasso(BY_ELEMENT), 0.5, ROWS, "strength"),
    "learnt strength": (GroupLasso(FromMeta("x")), 0.5, ROWS, "strength"),
    "strength of narrow rows": (GroupLasso(BY_ELEMENT), 0.5, ROWS[:, :1], "strength"),
    "total": (SimplexConstraint(BY_ELEMENT), 0.5, ROWS, "total"),
}


@pytest.mark.parametrize("method", ["unrolled", "forward"])
@pytest.mark.parametrize(
    ("regularizer", "lr", "rows", "name"), BY_ELEMENTS.values(), ids=BY_ELEMENTS
)
def test_numbers_that_differ_within_a_row_are_refused(regularizer, lr, rows, name, method):
    with pytest.raises(ValueError, match=rf"{name}: got a tensor \(3,\) for the parameter 'w'"):
        run_rows(regularizer, lr, rows, method, x=BY_ELEMENT)


def test_numbers_that_broaden_a_parameter_are_refused():
    with pytest.raises(
        ValueError, match=r"from .* to .*, axis of the tasks first, expected the sa"
    ):
        run_rows(L1Norm(BY_ELEMENT), rows=ROWS[:, :1])


@pytest.mark.parametrize("size", [3e8, 1e20])
def test_the_simplex_of_large_numbers_keeps_its_total(size):
    """The projection of x + c is that of x."""
    x = torch.tensor([[size, 1.0, 2.0], [size, size, 0.0], [-size, -size, -size]])
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(SimplexConstraint().prox(x, 0.1, {"total": 1.0}), expected)


def test_the_simplex_of_a_diverged_row_is_nan():
    x = torch.tensor([[float("nan"), 0.0, 1.0], [0.0, 2.0, 0.0]])
    end = SimplexConstraint().prox(x, 0.1, {"total": 1.0})
    assert end[0].isnan().all()
    assert end[1].tolist() == [0.0, 1.0, 0.0]


# Accelerated steps, against FISTA by hand.

FISTA_X = torch.linspace(-1, 2, 24, dtype=torch.float64).sin().mul(5).cos().reshape(8, 3)
FISTA_Y = FISTA_X @ torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
FISTA = BilevelProblem(
    init=lambda meta, data: {"w": meta["start"]},
    inner_loss=lambda params, meta, data: (
        meta["s"] * (FISTA_X @ params["w"] - FISTA_Y).square().mean() / 2
    ),
    outer_loss=lambda params, meta, data: (params["w"] - 1).square().sum(),
)
FISTA_META = {
    "start": torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64),
    "s": torch.tensor(1.0, dtype=torch.float64),
}


def fista(steps, identity_until=0):
    """The end, and the derivatives of the outer loss, of accelerated projected gradients.

    The first `identity_until` steps pass on the derivative in the start, and nothing else.
    """
    meta = {name: m.clone().requires_grad_() for name, m in FISTA_META.items()}
    x = y = meta["start"]
    k = 1.0
    for t in range(steps):
        if t == identity_until and t > 0:
            moved = meta["start"] - meta["start"].detach()
            x, y = x.detach() + moved, y.detach() + moved
        gradient = meta["s"] * FISTA_X.T @ (FISTA_X @ y - FISTA_Y) / len(FISTA_X)
        new = (y - 0.3 * gradient).clamp(-1, 1)
        k_next = (1 + (1 + 4 * k * k) ** 0.5) / 2
        y = new + (k - 1) / k_next * (new - x)
        x, k = new, k_next
    if identity_until == steps:
        x = x.detach() + meta["start"] - meta["start"].detach()
    (x - 1).square().sum().backward()
    return x.detach(), {name: m.grad for name, m in meta.items()}


def accelerated(steps):
    return ProximalGradient(BoxConstraint(-1.0, 1.0), steps=steps, lr=0.3, accelerated=True)


IDENTITY_UNTIL = {
    "unrolled": ("unrolled", 0),
    "forward": ("forward", 0),
    "real-time": ("real-time", 0),
    "truncated": (Truncated(steps=2), 4),
}


@pytest.mark.parametrize(("method", "until"), IDENTITY_UNTIL.values(), ids=IDENTITY_UNTIL)
def test_every_method_differentiates_the_iterates_of_an_accelerated_loop(method, until):
    result = hypergradient(FISTA, FISTA_META, None, inner=accelerated(6), method=method)
    w, grads = fista(6, until)
    torch.testing.assert_close(result.params["w"], w)
    for name, expected in grads.items():
        torch.testing.assert_close(result.grads[name], expected, rtol=1e-10, atol=1e-12)


def test_first_order_passes_the_start_of_an_accelerated_loop_as_the_identity():
    problem = replace(
        FISTA, inner_loss=lambda params, _, data: FISTA.inner_loss(params, {"s": 1.0}, data)
    )
    meta = {"start": FISTA_META["start"]}
    result = hypergradient(problem, meta, None, inner=accelerated(6), method="first-order")
    w, grads = fista(6, identity_until=6)
    torch.testing.assert_close(result.params["w"], w)
    torch.testing.assert_close(result.grads["start"], grads["start"])


@pytest.mark.parametrize("method", ["unrolled", "forward", "real-time"])
def test_two_halves_of_an_accelerated_loop_end_where_the_whole_loop_ends(method):
    problem = replace(FISTA, init=lambda meta, data: {"w": FISTA_META["start"]})
    meta = {"s": FISTA_META["s"]}
    run_half = partial(hypergradient, problem, meta, None, inner=accelerated(3), method=method)
    second = run_half(start=run_half().end)
    w, grads = fista(6)
    torch.testing.assert_close(second.params["w"], w)
    if method == "real-time":
        torch.testing.assert_close(second.grads["s"], grads["s"])


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_an_accelerated_parameter_that_a_step_does_not_read_waits_there(method):
    """Steps that do not read w leave its iterates, and its momentum, as they are."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["start"], "v": meta["start"]},
        inner_loss=lambda params, meta, name: (
            meta["s"] * (FISTA_X @ params[name] - FISTA_Y).square().mean() / 2
        ),
        outer_loss=lambda params, meta, data: (params["w"] - 1).square().sum(),
    )
    names = ["w", "w", "v", "w", "v", ""]
    result = hypergradient(
        problem, FISTA_META, Stream(names.__getitem__), inner=accelerated(5), method=method
    )
    w, grads = fista(3)
    torch.testing.assert_close(result.params["w"], w)
    torch.testing.assert_close(result.grads["s"], grads["s"])


@pytest.mark.parametrize("regularizer", [L1Norm(0.1), GroupLasso(0.1)], ids=["l1", "group"])
def test_nan_is_not_shrunk_to_zero(regularizer):
    """Zero would look like a sparse solution."""
    x = torch.tensor([[torch.nan, 3.0], [0.05, 0.05]])
    z = regularizer.prox(x, 1.0, {"strength": 0.1})
    assert z[0, 0].isnan()
    assert z[1].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:GMRES ended with NON_FINITE:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
def test_a_task_with_nan_has_no_solution():
    targets = torch.stack([TARGET, torch.full_like(TARGET, torch.nan)])
    problem = replace(
        PROBLEM, inner_loss=lambda params, meta, data: two_layers(params, {"t": data}, None)
    )
    result = hypergradient(
        problem,
        {"strength": torch.tensor(0.5, dtype=torch.float64)},
        targets,
        inner=one_step(L1Norm(FromMeta("strength"))),
        method="fixed-point",
        batched=True,
    )
    assert result.report.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
    assert result.losses.isnan().tolist() == [False, True]
