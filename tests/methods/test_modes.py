"""Every door within `inference_mode`, `no_grad` and a default device, and tensors made there."""

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import numpy as np
import pytest
import torch
from oracles import randn
from solver_cases import FACTORED_METHODS

from metaimplicit import (
    CG,
    METHODS,
    BilevelProblem,
    GradientDescent,
    Implicit,
    argmin,
    check_hypergradient,
    hypergradient,
)
from metaimplicit.diagnostics import compare

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
        check = check_hypergradient(PROBLEM, meta, data, directions=1, **options)
        params = argmin(inner_loss, PROBLEM.init, meta, data, **options)
        return params["w"], check.slopes

    expected = run()
    with mode():
        got = run()
        assert not got[0].requires_grad
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:OneStep ended")
@pytest.mark.parametrize("method", sorted(METHODS.keys() - FACTORED_METHODS))
def test_another_default_device_than_that_of_the_tensors_changes_nothing(method):
    def run():
        torch.manual_seed(0)
        result = hypergradient(
            PROBLEM, meta, data, inner=INNER, method=method, batched=True, vectorize="vmap"
        )
        return result.grads["w"]

    meta, data = make_inputs()
    expected = run()
    with torch.device("meta"):
        assert torch.equal(run(), expected)


def test_compare_takes_tensors_of_inference_mode():
    options = {"inner": INNER, "batched": True, "products": [1], "seeds": 1, "methods": ["cg"]}
    expected = compare(PROBLEM, *make_inputs(), **options).error("cg", 1)
    with torch.inference_mode():
        assert compare(PROBLEM, *make_inputs(), **options).error("cg", 1) == expected


def test_checks_and_known_solutions_do_not_follow_the_default_device():
    def run():
        options = {"inner": INNER, "batched": True}
        check = check_hypergradient(PROBLEM, meta, data, method="unrolled", directions=1, **options)
        rows = compare(PROBLEM, meta, data, products=[1], seeds=1, methods=["cg"], **options).rows
        known = argmin(
            inner_loss,
            PROBLEM.init,
            meta,
            data,
            solution={"w": np.full(TASKS, 0.2)},
            method="dense",
            batched=True,
        )
        return check.slopes, torch.as_tensor(rows[0].error, device="cpu"), known["w"]

    meta, data = make_inputs()
    expected = run()
    with torch.device("meta"):
        got = run()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "method",
    [
        "forward",
        "cg",
        Implicit(CG(max_steps=5), products="forward-over-reverse"),
        "sama",
    ],
    ids=["forward", "cg", "forward-over-reverse", "sama"],
)
def test_threads_do_not_disturb_one_another(method):
    """The levels of forward mode are those of the process."""

    def run(w):
        result = hypergradient(
            PROBLEM,
            meta | {"w": w},
            data,
            inner=INNER,
            method=method,
            batched=True,
            vectorize="vmap",
        )
        return result.grads["w"]

    meta, data = make_inputs()
    points = [torch.tensor(0.1 * i, dtype=torch.float64) for i in range(3)]
    expected = [run(w) for w in points]
    with ThreadPoolExecutor(len(points)) as pool:
        got = list(pool.map(run, points * 2))
    for mine, theirs in zip(got, expected * 2, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", ["cg", "fixed-point"])
def test_random_numbers_of_another_thread_are_not_those_of_the_loss(method):
    def loss_beside_a_thread(params, meta, data):
        thread = Thread(target=torch.rand, args=(1,))
        thread.start()
        thread.join()
        return inner_loss(params, meta, data)

    meta, data = make_inputs()
    results = [
        hypergradient(
            BilevelProblem(PROBLEM.init, loss, PROBLEM.outer_loss),
            meta,
            data,
            inner=INNER,
            method=method,
            batched=True,
            vectorize="vmap",
        )
        for loss in (inner_loss, loss_beside_a_thread)
    ]
    assert torch.equal(results[0].grads["w"], results[1].grads["w"])


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
