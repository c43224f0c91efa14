"""Parameters that share a tensor or a type with others, and calls that continue each other."""

from functools import partial

import pytest
import torch
from oracles import randn
from small_problems import number, scalar_problem

from metaimplicit import BilevelProblem, GradientDescent, Truncated, hypergradient
from metaimplicit.methods import ValueFunction

THREE_STEPS = GradientDescent(steps=3, lr=0.1)


@pytest.mark.parametrize("method", ["unrolled", Truncated(3)], ids=["unrolled", "truncated"])
def test_one_tensor_under_two_names_is_two_parameters(method):
    def init(meta, data):
        w = meta["w"] + data["x"]
        return {"a": w, "b": w}

    def inner_loss(params, meta, data):
        mismatch = params["b"] - params["a"] * data["x"]
        return (params["a"] - 1).square().sum() + 2 * mismatch.square().sum()

    run = partial(
        hypergradient,
        BilevelProblem(init, inner_loss, lambda p, m, d: (p["a"] * p["b"]).sum()),
        {"w": randn(2, seed=2)},
        {"x": randn(4, 2, seed=1)},
        inner=THREE_STEPS,
        method=method,
        batched=True,
    )
    vmapped = run()
    looped = run(vectorize="loop")
    torch.testing.assert_close(vmapped.params, looped.params, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(vmapped.grads, looped.grads, rtol=1e-12, atol=1e-13)
    assert not torch.equal(vmapped.params["a"], vmapped.params["b"])


@pytest.mark.parametrize("method", ["unrolled", "forward", "first-order"])
def test_the_returned_parameters_share_no_memory_with_meta(method):
    """A parameter that the inner loss ignores keeps its start, which is an entry of meta here."""
    problem = BilevelProblem(
        lambda m, d: dict(m), lambda p, m, d: p["a"].sum(), lambda p, m, d: p["b"].sum()
    )
    meta = {"a": torch.ones(2), "b": torch.ones(2)}
    result = hypergradient(problem, meta, None, inner=THREE_STEPS, method=method)
    meta["b"].add_(5)
    assert result.params["b"].tolist() == [1.0, 1.0]
    assert result.end.single["b"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", ["forward", "unrolled", "cg"])
def test_a_gradient_has_the_type_of_its_entry(method):
    """The parameters are in single precision, and the meta-parameter is in double precision."""
    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros(2)},
        lambda p, m, d: (p["w"] - m["a"].float()).square().sum(),
        lambda p, m, d: p["w"].sum(),
    )
    inner = GradientDescent(steps=60, lr=0.2)
    result = hypergradient(problem, {"a": number(1.0)}, None, inner=inner, method=method)
    assert result.grads["a"].dtype == torch.float64
    assert result.grads["a"].item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(("method", "other"), [("real-time", "f2sa"), ("f2sa", "real-time")])
def test_the_end_of_another_method_is_refused_as_a_start(method, other):
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: w.square())
    run = partial(hypergradient, problem, {"a": number(1.0)}, None, inner=THREE_STEPS)
    end = run(method=method).end
    with pytest.raises(ValueError, match=r"start: got the end of '.*', expected that of"):
        run(method=other, start=end)


def test_the_value_function_continues_from_its_own_end():
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: (w - 1).square())
    run = partial(
        hypergradient,
        problem,
        {"a": number(2.0)},
        None,
        inner=GradientDescent(steps=300, lr=0.1),
        method=ValueFunction(100.0),
    )
    first = run()
    second = run(start=first.end)
    assert second.grads["a"].item() == pytest.approx(first.grads["a"].item(), rel=1e-9)


@pytest.mark.parametrize("method", ["unrolled", "forward", "cg", "f2sa"])
def test_gradients_may_be_changed_in_place(method):
    """Autograd gives one tensor for both terms of a sum, and an expanded one for a sum of all."""

    def outer_loss(params, meta, data):
        return params["w"].pow(3).sum() + (meta["c"] + meta["d"] + data).sum()

    problem = BilevelProblem(
        lambda m, d: {"w": torch.zeros(2)},
        lambda p, m, d: (p["w"] - m["a"] - m["b"]).square().sum(),
        outer_loss,
    )
    meta = {name: torch.ones(2) for name in "abcd"}
    data = torch.ones(2, requires_grad=True)
    result = hypergradient(problem, meta, data, inner=THREE_STEPS, method=method)
    gradients = {**result.grads, "data": result.data_grads}
    before = {name: g.clone() for name, g in gradients.items()}
    for g in gradients.values():
        g.mul_(2)
    for name, g in gradients.items():
        assert torch.equal(g, 2 * before[name])


@pytest.mark.parametrize("names", ["ab", "ba"])
@pytest.mark.parametrize("method", ["cg", "dense", "auto", "fixed-point", "forward"])
def test_parameters_of_two_types_have_the_gradient_of_unrolling(method, names):
    """f has the Hessian (2, 1; 1, 2) in a and b, so that a* = b* = 2t/3."""
    zeros = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}

    def inner_loss(params, meta, data):
        squares = sum((p - meta["t"]).square().sum() for p in params.values())
        return squares + (params["a"] * params["b"]).sum()

    problem = BilevelProblem(
        init=lambda meta, data: {name: zeros[name] for name in names},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: params["a"].sum() + params["b"].sum(),
    )
    inner = GradientDescent(steps=100, lr=0.2)
    result = hypergradient(problem, {"t": torch.tensor(1.0)}, None, inner=inner, method=method)
    assert result.grads["t"].item() == pytest.approx(8 / 3, rel=1e-6)
