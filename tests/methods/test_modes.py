"""Every door within `inference_mode` and `no_grad`, and with tensors that were made there."""

import pytest
import torch
from oracles import randn

from metaimplicit import (
    BilevelProblem,
    GradientDescent,
    argmin,
    check_hypergradient,
    hypergradient,
)

TASKS = 3
MODES = [torch.no_grad, torch.inference_mode]
INNER = GradientDescent(steps=3, lr=0.1)


def inner_loss(params, meta, data):
    return (params["w"] * data["x"] - data["y"]).square().mean() + (params["w"] - meta["w"]).pow(4)


PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": meta["w"]},
    inner_loss=inner_loss,
    outer_loss=lambda params, meta, data: (params["w"] - data["x"]).square().mean(),
)


def make_inputs():
    data = {"x": randn(TASKS, 5, seed=0), "y": randn(TASKS, 5, seed=1)}
    return {"w": torch.tensor(0.3, dtype=torch.float64)}, data


def gradient(meta, data):
    result = hypergradient(PROBLEM, meta, data, inner=INNER, method="unrolled", batched=True)
    return result.grads["w"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_hypergradient_is_the_same_in_any_mode(mode, made):
    expected = gradient(*make_inputs())
    outside = make_inputs()
    with mode():
        inputs = make_inputs() if made == "inside" else outside
        assert torch.equal(gradient(*inputs), expected)
    assert torch.equal(gradient(*inputs), expected)


@pytest.mark.parametrize("mode", MODES)
def test_argmin_and_its_check_are_the_same_in_any_mode(mode):
    def run():
        meta, data = make_inputs()
        options = {"inner": INNER, "method": "unrolled", "batched": True}
        check = check_hypergradient(PROBLEM, meta, data, **options)
        params = argmin(inner_loss, PROBLEM.init, meta, data, **options)
        return params["w"], check.slopes

    expected = run()
    with mode():
        got = run()
        assert not got[0].requires_grad
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_an_aux_that_is_no_tensor_is_named_and_none_is_no_aux(vectorize):
    meta, data = make_inputs()

    def run(aux):
        problem = BilevelProblem(
            PROBLEM.init, inner_loss, lambda *args: (PROBLEM.outer_loss(*args), aux)
        )
        options = {"inner": INNER, "method": "unrolled", "batched": True}
        return hypergradient(problem, meta, data, **options, vectorize=vectorize)

    result = run(None)
    assert result.aux is None
    torch.testing.assert_close(result.grads["w"], gradient(meta, data), rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="aux: got str, expected a pytree of tensors and numbers"):
        run({"note": "text"})
