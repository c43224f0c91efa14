"""What a careful user may do that no plain test does: shared tensors, broken tasks, other data, other orders."""

from collections import UserDict
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import Matrix, randn, symmetric
from torch import nn

from metaimplicit import (
    SAMA,
    BilevelProblem,
    Composite,
    FirstOrder,
    Forward,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    Stream,
    TorchOptimizer,
    Truncated,
    Tuner,
    Unrolled,
    ValueFunction,
    argmin,
    check_hypergradient,
    hypergradient,
    tuning_problem,
)
from metaimplicit.methods import known_options, make_method
from metaimplicit.solvers import Neumann, Nystrom, Richardson, Status
from metaimplicit.solvers.neumann import power_iteration
from metaimplicit.tuning import HOAG, ExampleWeights, WeightDecay

DOUBLE = torch.float64
SHORT = GradientDescent(steps=3, lr=0.1)


def number(x):
    return torch.tensor(x, dtype=DOUBLE)


def scalar(inner, outer, start=lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)}):
    """A problem of one parameter w."""
    return BilevelProblem(start, lambda p, m, d: inner(p["w"], m), lambda p, m, d: outer(p["w"], m))


# parameters


@pytest.mark.parametrize("method", ["unrolled", "truncated"])
def test_one_tensor_by_two_names_is_two_parameters(method):
    def init(meta, data):
        w = meta["w"] + data["x"]
        return {"a": w, "b": w}

    problem = BilevelProblem(
        init,
        lambda p, m, d: (p["a"] - 1).square().sum() + 2 * (p["b"] - p["a"] * d["x"]).square().sum(),
        lambda p, m, d: (p["a"] * p["b"]).sum(),
    )
    data, meta = {"x": randn(4, 2, seed=1)}, {"w": randn(2, seed=2)}
    method = make_method(method, **known_options(method, solver_steps=3))
    run = partial(hypergradient, problem, meta, data, inner=SHORT, method=method, batched=True)
    vmapped, looped = run(), run(vectorize="loop")
    for name in ("a", "b"):
        torch.testing.assert_close(
            vmapped.params[name], looped.params[name], rtol=1e-12, atol=1e-13
        )
    torch.testing.assert_close(vmapped.grads["w"], looped.grads["w"], rtol=1e-12, atol=1e-13)
    assert not torch.equal(vmapped.params["a"], vmapped.params["b"])


@pytest.mark.parametrize("method", ["unrolled", "forward", "first-order"])
def test_what_comes_back_is_no_part_of_meta(method):
    """A parameter that the inner loss ignores stays at its start, which here is an entry of meta."""
    problem = BilevelProblem(
        lambda m, d: dict(m), lambda p, m, d: p["a"].sum(), lambda p, m, d: p["b"].sum()
    )
    meta = {"a": torch.ones(2), "b": torch.ones(2)}
    found = hypergradient(problem, meta, None, inner=SHORT, method=method)
    meta["b"].add_(5)
    assert found.params["b"].tolist() == [1.0, 1.0]
    assert found.end.single["b"].tolist() == [1.0, 1.0]


def test_a_parameter_may_take_part_in_some_steps_of_a_stream_alone():
    """It stays in the others, momentum and decay included, whichever step comes first."""

    def loss(p, m, d):
        return m["s"] * (p["a"] - 3).square() if d == 0 else m["s"] * (p["b"] - 2).square()

    zero = torch.zeros((), dtype=DOUBLE)
    problem = BilevelProblem(
        lambda m, d: {"a": zero, "b": zero}, loss, lambda p, m, d: p["a"] * p["b"]
    )
    inner = TorchOptimizer(torch.optim.SGD, steps=5, lr=0.1, momentum=0.9, weight_decay=0.1)
    for first in (0, 1):
        stream = Stream(lambda t, first=first: (t + first) % 2)
        found, expected = (
            hypergradient(problem, {"s": number(0.7)}, stream, inner=inner, method=method)
            for method in ("forward", "unrolled")
        )
        torch.testing.assert_close(found.grads["s"], expected.grads["s"], rtol=1e-12, atol=0)
        for name in ("a", "b"):
            torch.testing.assert_close(
                found.params[name], expected.params[name], rtol=1e-12, atol=0
            )
            assert found.params[name] != 0


# argmin


@pytest.mark.parametrize(
    "method", [SAMA(), Forward(), Implicit(), Unrolled()], ids=lambda m: m.flag
)
def test_entries_of_meta_may_depend_on_one_another(method):
    """θ* = a + b with b = 2a: 3; f = ½(w − a − b)², one step of gradient descent of length 1."""
    a = number(0.5).requires_grad_()
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"] - m["b"]).square(),
        lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)},
        {"a": a, "b": 2 * a},
        None,
        inner=GradientDescent(steps=1, lr=1.0),
        method=method,
    )
    assert params["w"].item() == 1.5
    params["w"].backward()
    assert a.grad.item() == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize("method", [SAMA(), Forward(), Implicit()], ids=lambda m: m.flag)
def test_a_tensor_past_meta_is_named(method):
    a = number(0.5).requires_grad_()
    c = 2 * a
    with pytest.raises(ValueError, match="requires grad and is captured by a loss"):
        argmin(
            lambda p, m, d: 0.5 * (p["w"] - m["a"] - c).square(),
            lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)},
            {"a": a},
            None,
            inner=SHORT,
            method=method,
        )


@pytest.mark.parametrize(
    "method", [SAMA(), Implicit(), Forward(), Unrolled()], ids=lambda m: m.flag
)
def test_meta_changed_in_place_before_the_backward_is_an_error(method):
    a = number(1.0).requires_grad_()
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"].square()).square(),
        lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)},
        {"a": a},
        None,
        inner=GradientDescent(steps=1, lr=1.0),
        method=method,
    )
    with torch.no_grad():
        a.add_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        params["w"].backward()


def test_entries_that_want_no_gradient_cost_no_tangents():
    """A start of 10,000 numbers is no hyperparameter: its tangents alone would be past the limit."""
    a, start = number(0.5).requires_grad_(), torch.zeros(10_000, dtype=DOUBLE)
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"]).square().sum(),
        lambda m, d: {"w": m["start"]},
        {"a": a, "start": start},
        None,
        inner=GradientDescent(steps=1, lr=1.0),
        method=Forward(memory=2**20),
    )
    params["w"].sum().backward()
    assert a.grad.item() == 10_000


def test_complex_numbers_are_refused():
    with pytest.raises(
        ValueError, match=r"meta\['a'\]: got torch.complex64, expected real numbers"
    ):
        argmin(
            lambda p, m, d: p["w"].square(),
            lambda m, d: {"w": torch.zeros(())},
            {"a": torch.ones((), dtype=torch.complex64, requires_grad=True)},
            None,
            inner=SHORT,
            method="cg",
        )


# what a method can give


def test_a_direct_gradient_does_not_hide_one_that_is_missing():
    """The start has no derivative under an implicit method, whatever the outer loss reads beside."""
    start = {"start": lambda m, d: {"w": m["a"]}}
    for outer in (lambda w, m: w, lambda w, m: w + 0.1 * m["a"].square()):
        problem = scalar(lambda w, m: (w - 1).square(), outer, **start)
        for method in ("cg", "sama", "f2sa", "t1-t2"):
            with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['a'\]"):
                hypergradient(problem, {"a": number(2.0)}, None, inner=SHORT, method=method)
        grads = hypergradient(
            problem, {"a": number(2.0)}, None, inner=SHORT, method="unrolled"
        ).grads
        assert grads["a"].item() == pytest.approx(
            0.8**3 + (0.4 if outer(0.0, {"a": number(1.0)}) else 0.0), rel=1e-12
        )


@pytest.mark.parametrize("method", ["cg", "sama", "f2sa", "unrolled", "forward", "t1-t2"])
def test_what_the_inner_loss_adds_without_the_parameters_moves_nothing(method):
    """f = (w − a)² + b²: b has no part in θ*, and its direct gradient is all, whether there is one or not."""
    for outer, expected in (
        (lambda w, m: w.square() + m["b"].square(), 4.0),
        (lambda w, m: w.square(), 0.0),
    ):
        problem = scalar(lambda w, m: (w - m["a"]).square() + m["b"].square(), outer)
        meta = {"a": number(1.0), "b": number(2.0)}
        found = hypergradient(
            problem, meta, None, inner=GradientDescent(steps=50, lr=0.3), method=method
        )
        assert found.grads["b"].item() == expected


@pytest.mark.parametrize("method", [Truncated(0), FirstOrder()], ids=lambda m: m.flag)
def test_no_step_tracked_is_first_order(method):
    """What both losses share keeps its direct gradient; what the inner one alone reads has none to give."""
    shared = scalar(
        lambda w, m: (w - m["c"]).square(),
        lambda w, m: (w - m["c"]).square(),
        lambda m, d: {"w": m["a"]},
    )
    meta = {"a": number(1.0), "c": number(3.0)}
    found = hypergradient(shared, meta, None, inner=GradientDescent(steps=1, lr=0.1), method=method)
    assert {name: g.item() for name, g in found.grads.items()} == pytest.approx(
        {"a": -3.2, "c": 3.2}
    )
    alone = scalar(
        lambda w, m: (w - m["c"]).square(), lambda w, m: w.square(), lambda m, d: {"w": m["a"]}
    )
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['c'\]"):
        hypergradient(alone, meta, None, inner=SHORT, method=method)


@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_a_step_size_of_what_does_not_move_has_a_gradient_of_zero(method):
    problem = BilevelProblem(
        lambda m, d: {"a": m["a"], "b": m["b"]},
        lambda p, m, d: p["a"].square(),
        lambda p, m, d: p["a"] + p["b"],
    )
    meta = {"a": number(1.0), "b": number(1.0), "lr.a": number(0.1), "lr.b": number(0.1)}
    found = hypergradient(
        problem, meta, None, inner=GradientDescent(steps=1, lr=FromMeta("lr")), method=method
    )
    assert {name: g.item() for name, g in found.grads.items()} == {
        "a": 0.8,
        "b": 1.0,
        "lr.a": -2.0,
        "lr.b": 0.0,
    }


def test_an_option_that_a_method_does_not_have_is_refused():
    with pytest.raises(
        ValueError,
        match=r"method 'cg': got option 'rank', .* have it: nystrom, nystrom-gaussian, nystrom-cg$",
    ):
        make_method("cg", rank=20)
    with pytest.raises(ValueError, match=r"method 'cg': got option 'colour', .* no method has it"):
        make_method("cg", colour=20)
    with pytest.raises(ValueError, match=r"Richardson scale: got 0\.0, expected a number > 0"):
        make_method("t1-t2", scale=0.0)


# broken tasks and numbers


def test_a_task_that_is_not_finite_is_not_solved():
    """Under a tolerance, too: a NaN is not below it."""
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)},
        lambda p, m, d: d["x"] * (p["w"] - m["a"]).square(),
        lambda p, m, d: p["w"],
    )
    data = {"x": torch.tensor([1.0, torch.nan], dtype=DOUBLE)}
    for method in ("forward", "unrolled"):
        found = hypergradient(
            problem,
            {"a": number(1.0)},
            data,
            inner=GradientDescent(steps=3, tol=1e-3),
            method=method,
            batched=True,
        )
        assert found.grads["a"].isnan()
        if method == "forward":
            assert found.report.inner_steps.tolist() == [3, 3]


@pytest.mark.parametrize("curvature", [1.0, 10.0])
def test_of_one_parameter_the_power_iteration_does_not_cancel(curvature):
    """A right-hand side of −1 against a start of +1."""
    A, b = (
        Matrix(torch.full((1, 1, 1), curvature, dtype=DOUBLE)),
        torch.tensor([[-6.0]], dtype=DOUBLE),
    )
    for solver in (Neumann(terms=5), Richardson(steps=5)):
        found = solver.solve(A, b)
        assert found.value.item() == pytest.approx(-6.0 / curvature, rel=1e-12)
        assert found.status.tolist() == [int(Status.CONVERGED)]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_power_iteration_stays_below_the_largest_eigenvalue(steps):
    """Whatever the length of the vector it goes on from; of cI it is c."""
    h = symmetric([[0.1, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 7.0]])
    for scale in (1e-3, 1.0, 30.0):
        v = scale * randn(2, 4, seed=1)
        found = power_iteration(Matrix(h), v, steps)[0].squeeze(1)
        assert (found <= torch.tensor([5.0, 7.0], dtype=DOUBLE) * (1 + 1e-12)).all()
        assert (found > 0.1).all()
        same, _ = power_iteration(Matrix(3 * torch.eye(4, dtype=DOUBLE).expand(2, 4, 4)), v, steps)
        torch.testing.assert_close(same, torch.full((2, 1), 3.0, dtype=DOUBLE), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "solver", [Richardson(), Richardson(steps=3), Nystrom(rank=3, rho=0.1, refresh=100)]
)
def test_a_solver_recovers_from_a_batch_of_nans(solver):
    good, b = Matrix(10 * torch.eye(3, dtype=DOUBLE).unsqueeze(0)), randn(1, 3, seed=1)
    bad = Matrix(torch.full((1, 3, 3), torch.nan, dtype=DOUBLE))
    torch.manual_seed(0)
    state = solver.solve(bad, b).state
    for _ in range(20):
        found = solver.solve(good, b, state=state)
        state = found.state
    torch.manual_seed(0)
    fresh = solver.solve(good, b, state=solver.solve(good, b).state)
    assert found.residual.item() <= fresh.residual.item() + 1e-12


# data


def test_tensors_that_would_not_be_told_apart_are_refused():
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)},
        lambda p, m, d: (p["w"] - m["a"] * d["x"].sum()).square(),
        lambda p, m, d: p["w"],
    )
    data = UserDict(x=randn(3, 2, seed=1))
    with pytest.raises(ValueError, match="data: got UserDict, which cannot be split by task"):
        hypergradient(
            problem,
            {"a": number(1.0)},
            (torch.ones(3), data),
            inner=SHORT,
            method="cg",
            batched=True,
        )


class Colour(Enum):
    RED = 1


def test_what_holds_no_tensors_may_lie_among_the_data():
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros((), dtype=DOUBLE)},
        lambda p, m, d: (p["w"] - m["a"] * d["x"].sum()).square(),
        lambda p, m, d: p["w"],
    )
    data = {
        "x": randn(3, 2, seed=1),
        "more": [Path("."), Colour.RED, slice(2), range(3), np.bool_(True), nn.Linear(1, 1)],
    }
    run = partial(
        hypergradient,
        problem,
        {"a": number(1.0)},
        inner=SHORT,
        method=Implicit(batch=None),
        batched=True,
    )
    assert run(data).grads["a"] == run({"x": data["x"]}).grads["a"]


def test_data_may_be_none_where_a_loss_holds_its_own():
    problem = scalar(
        lambda w, m: (w - 1).square() + m["a"].exp() * w.square(), lambda w, m: (w - 0.5).square()
    )
    for method in ("cg", "sama", "f2sa", "soba"):
        tuner = Tuner(
            problem, {"a": number(-1.0)}, inner=GradientDescent(steps=20, lr=0.1), method=method
        )
        assert tuner.step(None, None).norm > 0
    hoag = HOAG(problem, {"a": number(-1.0)}, None, None)
    for _ in range(12):
        hoag.step()
    assert hoag.meta["a"].item() == pytest.approx(0.0, abs=1e-3)  # w = 1/(1 + eᵃ) = ½


# forward mode


@pytest.mark.parametrize(
    "method", ["forward", "real-time", Implicit(products="forward-over-reverse")]
)
@pytest.mark.parametrize("batched", [False, True])
def test_forward_mode_takes_the_usual_loss(method, batched):
    """`torch.func.jvp` of the gradient of F.mse_loss fails where nothing is vmapped."""
    x, y = randn(5, 3, seed=1), randn(5, seed=2)
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros(3, dtype=DOUBLE)},
        Composite(
            outputs=lambda p, m, d: d["x"] @ p["w"],
            loss=lambda z, d: F.mse_loss(z, d["y"]),
            penalty=Proximal(FromMeta("decay"), center="zero"),
        ),
        lambda p, m, d: F.mse_loss(d["x"] @ p["w"], d["y"] + 1),
    )
    data = {"x": x.unsqueeze(0), "y": y.unsqueeze(0)} if batched else {"x": x, "y": y}
    run = partial(
        hypergradient, problem, {"decay": number(0.3)}, data, batched=batched, vectorize="loop",
        inner=GradientDescent(steps=300, lr=0.2),
    )  # fmt: skip
    assert run(method=method).grads["decay"].item() == pytest.approx(
        run(method="unrolled").grads["decay"].item(), rel=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_forward_mode_in_the_precision_of_each(dtype):
    """Scalar decays, whose products torch makes double on the way; parameters in single beside meta in double."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    problem, meta, domains = tuning_problem(model, F.cross_entropy, [WeightDecay()])
    meta = {name: m.to(dtype) for name, m in meta.items()}
    batch = {"inputs": torch.randn(6, 3), "targets": torch.randint(4, (6,))}
    tuner = Tuner(problem, meta, domains=domains, inner=SHORT, method="forward")
    assert tuner.step(batch, batch).applied
    assert all(m.dtype == dtype for m in tuner.meta.values())


@pytest.mark.parametrize("method", ["forward", "unrolled", "cg"])
def test_a_gradient_has_the_type_of_its_entry(method):
    """Of single parameters and a double hyperparameter."""
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros(2)},
        lambda p, m, d: (p["w"] - m["a"].float()).square().sum(),
        lambda p, m, d: p["w"].sum(),
    )
    found = hypergradient(
        problem, {"a": number(1.0)}, None, inner=GradientDescent(steps=60, lr=0.2), method=method
    )
    assert found.grads["a"].dtype == DOUBLE
    assert found.grads["a"].item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(("method", "other"), [("real-time", "f2sa"), ("f2sa", "real-time")])
def test_the_end_of_another_method_is_named(method, other):
    problem = scalar(lambda w, m: (w - m["a"]).square(), lambda w, m: w.square())
    ask = partial(hypergradient, problem, {"a": number(1.0)}, None, inner=SHORT)
    end = ask(method=method).end
    with pytest.raises(ValueError, match=r"start: got the end of '.*', expected that of"):
        ask(method=other, start=end)


# the rest


def test_all_iterates_cannot_be_checked_by_the_last():
    problem = scalar(lambda w, m: (w - m["a"]).square(), lambda w, m: w.sum())
    with pytest.raises(ValueError, match=r"method: got Unrolled\(iterates=True\)"):
        check_hypergradient(
            problem, {"a": number(1.0)}, None, inner=SHORT, method=Unrolled(iterates=True)
        )


def test_patience_goes_back_to_the_best_of_all_calls():
    problem = scalar(lambda w, m: (w - m["a"]).square(), lambda w, m: -w)
    tuner = Tuner(problem, {"a": number(0.0)}, inner=GradientDescent(steps=20, lr=0.3), method="cg")
    measured = []

    def metric(params, meta):
        measured.append((abs(meta["a"].item() - 0.03), meta["a"].item()))
        return measured[-1][0]

    tuner.fit(lambda i: None, lambda i: None, steps=6, metric=metric)
    tuner.fit(lambda i: None, lambda i: None, steps=60, metric=metric, patience=2)
    assert tuner.meta["a"].item() == min(measured)[1]
    assert len(measured) < 60


def test_a_negative_index_is_no_example():
    weights = ExampleWeights(3)
    meta = weights.meta({"w": torch.zeros(1)})
    with pytest.raises(IndexError):
        weights.weights(meta, torch.zeros(2), {"index": torch.tensor([0, -1])})


def test_outputs_of_several_tensors_and_a_center_without_an_entry_are_named():
    several = BilevelProblem(
        lambda m, d: {"w": torch.zeros(2)},
        Composite(
            outputs=lambda p, m, d: (p["w"], m["a"]), loss=lambda z, d: (z[0] - z[1]).square().sum()
        ),
        lambda p, m, d: p["w"].sum(),
    )
    with pytest.raises(ValueError, match="outputs: got tuple, expected one tensor"):
        hypergradient(several, {"a": torch.ones(2)}, None, inner=SHORT, method="cg")
    with pytest.raises(
        ValueError, match="Proximal center: meta has no entry 'w', expected one for each parameter"
    ):
        Proximal(1.0)({"w": torch.zeros(2)}, {"a": torch.ones(2)})


def test_the_start_of_the_value_function_may_be_its_own():
    problem = scalar(lambda w, m: (w - m["a"]).square(), lambda w, m: (w - 1).square())
    ask = partial(
        hypergradient, problem, {"a": number(2.0)}, None, inner=GradientDescent(steps=300, lr=0.1)
    )
    first = ask(method=ValueFunction(100.0))
    second = ask(method=ValueFunction(100.0), start=first.end)
    assert second.grads["a"].item() == pytest.approx(first.grads["a"].item(), rel=1e-9)
