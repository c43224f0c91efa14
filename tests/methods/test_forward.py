"""Forward mode against reverse mode, finite differences and the implicit function theorem."""

import random
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learnt_numbers import BY_STEP, LEARNT_LOOPS
from oracles import finite_difference, largest_error, randn, relative_error
from tanh_network import DATA, INITIAL, network
from weighted_logistic import META, POINT, PROBLEM, XV, YV, X, Y, validation_loss

from metaimplicit import (
    BilevelProblem,
    Composite,
    Dense,
    Forward,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    Stream,
    TorchOptimizer,
    Truncated,
    Unrolled,
    argmin,
    hypergradient,
)
from metaimplicit.diagnostics.memory import LiveBytes

LOOP = GradientDescent(steps=6, lr=FromMeta("eta"), momentum=FromMeta("mu"))


def run_logistic(method, inner=LOOP, meta=META, data=POINT, **options):
    return hypergradient(PROBLEM, meta, data, inner=inner, method=method, **options)


# Values.


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Forward(), id="forward"),
        pytest.param(Forward(chunk=5), id="chunked"),
    ],
)
def test_momentum_sgd_agrees_with_finite_differences(method):
    result = run_logistic(method)
    assert relative_error(result.outer_loss, run_logistic(Truncated(1)).outer_loss) < 1e-14
    for name in META:
        direction, expected = slope_by_differences(name)
        slope = (result.grads[name] * direction).sum()
        assert float((slope - expected).abs()) < 1e-7 * float(expected.abs()), name


@cache
def slope_by_differences(name):
    """A direction of this entry, and the derivative of the outer loss along it."""
    value = META[name]
    direction = 1 + 0.5 * torch.arange(value.numel()).reshape(value.shape).to(value)
    expected = finite_difference(
        lambda m: run_logistic(Truncated(1), meta=META | {name: m}).outer_loss,
        at=value,
        direction=direction,
    )
    return direction, expected


def test_momentum_sgd_agrees_with_reverse_mode():
    forward = run_logistic(Forward())
    reverse = run_logistic(Unrolled())
    assert largest_error(forward.grads, reverse.grads) < 1e-10
    assert relative_error(forward.params["w"], reverse.params["w"]) < 1e-14
    norms = [result.report.inner_gradient_norm for result in (forward, reverse)]
    assert relative_error(*norms) < 1e-10


# The rules whose states, numbers and branches differ. Their formulas are those of reverse mode.
RULES = [
    *("transformed", "sgd", "adam", "amsgrad", "adadelta", "asgd", "nadam", "radam", "rprop"),
    *("rmsprop, centred", "by step", "by parameter", "clipped"),
]


@pytest.mark.parametrize("name", RULES)
def test_an_optimiser_agrees_with_reverse_mode(name):
    loop = LEARNT_LOOPS[name]
    run = partial(
        hypergradient, network(), INITIAL | loop.meta, DATA, inner=loop.inner, batched=True
    )
    reverse = run(method=Unrolled())
    # A step does not know of the chunks, but each of them passes the numbers of a state on.
    for chunk in (None, 10) if name in ("adam", "by step") else (None,):
        assert largest_error(run(method=Forward(chunk)).grads, reverse.grads) < 1e-12, chunk


@pytest.mark.slow
def test_momentum_sgd_at_convergence_agrees_with_the_implicit_function_theorem():
    numbers = {"eta": 0.3, "mu": 0.05, "decay": 3.0}
    meta = META | {name: torch.tensor(x).double() for name, x in numbers.items()}
    forward = run_logistic(Forward(), inner=LOOP.updated(steps=22), meta=meta)
    implicit = run_logistic(
        Implicit(Dense()),
        inner=GradientDescent(steps=22, lr=0.3, momentum=0.05),
        meta={name: meta[name] for name in ("decay", "weights")},
    )
    assert largest_error(forward.grads, implicit.grads) < 1e-6
    # The argmin does not depend on the loop that found it.
    for name in ("eta", "mu"):
        assert float(forward.grads[name].abs()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["forward", Implicit(products="forward-over-reverse")],
    ids=["forward", "implicit"],
)
@pytest.mark.parametrize("batched", [False, True])
def test_mse_loss_has_a_forward_derivative_with_and_without_a_task_axis(method, batched):
    """Where nothing is vmapped, `torch.func.jvp` of the gradient of `F.mse_loss` fails at first."""
    data = {"x": randn(5, 3, seed=1), "y": randn(5, seed=2)}
    problem = BilevelProblem(
        init=lambda m, d: {"w": torch.zeros(3, dtype=torch.float64)},
        inner_loss=Composite(
            outputs=lambda p, m, d: d["x"] @ p["w"],
            loss=lambda z, d: F.mse_loss(z, d["y"]),
            penalty=Proximal(FromMeta("decay"), center="zero"),
        ),
        outer_loss=lambda p, m, d: F.mse_loss(d["x"] @ p["w"], d["y"] + 1),
    )
    run = partial(
        hypergradient,
        problem,
        {"decay": torch.tensor(4.0, dtype=torch.float64)},
        {name: x.unsqueeze(0) for name, x in data.items()} if batched else data,
        inner=GradientDescent(steps=16, lr=0.2),
        batched=batched,
        vectorize="loop",
    )
    expected = run(method="unrolled").grads["decay"].item()
    assert run(method=method).grads["decay"].item() == pytest.approx(expected, rel=1e-8)


# The inner loop.


def test_a_tolerance_stops_forward_and_reverse_mode_at_the_same_step():
    inner = LOOP.updated(steps=60, tol=1e-2)
    forward = run_logistic(Forward(), inner=inner)
    reverse = run_logistic(Unrolled(), inner=inner)
    assert forward.report.inner_steps.tolist() == reverse.report.inner_steps.tolist()
    assert forward.report.inner_steps.item() < 60
    assert largest_error(forward.grads, reverse.grads) < 1e-10


def test_a_stream_gives_every_step_its_own_minibatch():
    def unweighted_loss(params, meta, data):
        logits = data[0] @ params["w"]
        decay = 0.5 * meta["decay"] * params["w"].square().sum()
        return F.binary_cross_entropy_with_logits(logits, data[1]) + decay

    run = partial(
        hypergradient,
        BilevelProblem(PROBLEM.init, unweighted_loss, validation_loss),
        {name: META[name] for name in ("eta", "mu", "decay")},
        Stream(lambda t: (X[t % 3 :: 3], Y[t % 3 :: 3], XV, YV)),
        inner=LOOP,
    )
    assert largest_error(run(method=Forward()).grads, run(method=Unrolled()).grads) < 1e-10


def test_a_parameter_that_the_loss_does_not_read_keeps_its_value():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.ones(2, dtype=torch.float64), "idle": meta["idle"]},
        inner_loss=lambda params, meta, data: (params["w"] * meta["slope"]).square().sum(),
        outer_loss=lambda params, meta, data: (params["w"].sum() * params["idle"]).sum(),
    )
    meta = {"idle": randn(3, seed=8), "slope": randn(2, seed=9)}
    inner = TorchOptimizer(torch.optim.SGD, steps=3, lr=0.1, weight_decay=0.5)
    run = partial(hypergradient, problem, meta, None, inner=inner)
    forward = run(method=Forward())
    assert torch.equal(forward.params["idle"], meta["idle"])
    assert largest_error(forward.grads, run(method=Unrolled()).grads) < 1e-12


@pytest.mark.parametrize("first", [0, 1])
def test_a_parameter_may_be_read_at_some_steps_of_a_stream_only(first):
    """At the other steps it keeps its value, in spite of momentum and weight decay."""

    def alternating_loss(params, meta, step):
        squares = (params["a"] - 3).square(), (params["b"] - 2).square()
        return meta["s"] * squares[step]

    zero = torch.zeros((), dtype=torch.float64)
    run = partial(
        hypergradient,
        BilevelProblem(
            lambda m, d: {"a": zero, "b": zero}, alternating_loss, lambda p, m, d: p["a"] * p["b"]
        ),
        {"s": torch.tensor(0.7, dtype=torch.float64)},
        Stream(lambda t: (t + first) % 2),
        inner=TorchOptimizer(torch.optim.SGD, steps=5, lr=0.1, momentum=0.9, weight_decay=0.1),
    )
    forward = run(method="forward")
    reverse = run(method="unrolled")
    assert largest_error(forward.grads, reverse.grads) < 1e-12
    assert largest_error(forward.params, reverse.params) < 1e-12
    assert all(p != 0 for p in forward.params.values())


# Calls that continue each other.


def test_real_time_continues_with_its_derivative():
    half = LOOP.updated(steps=3)
    whole = run_logistic(Forward())
    first = run_logistic(Forward(carry=True), inner=half)
    second = run_logistic(Forward(carry=True), inner=half, start=first.end)
    assert relative_error(second.params["w"], whole.params["w"]) < 1e-14
    assert largest_error(second.grads, whole.grads) < 1e-13


def test_real_time_without_a_start_is_forward_mode():
    real_time = run_logistic(Forward(carry=True)).grads
    forward = run_logistic(Forward()).grads
    assert all(torch.equal(real_time[name], forward[name]) for name in META)


def test_forward_mode_takes_its_start_for_a_constant():
    half = LOOP.updated(steps=3)
    whole = run_logistic(Forward())
    first = run_logistic(Forward(carry=True), inner=half)
    second = run_logistic(Forward(), inner=half, start=first.end)
    for name in META:
        assert relative_error(second.grads[name], whole.grads[name]) > 0.01


@pytest.mark.parametrize("name", [name for name in RULES if name not in BY_STEP])
def test_two_halves_of_a_loop_end_where_the_whole_loop_ends(name):
    loop = LEARNT_LOOPS[name]
    run = partial(hypergradient, network(), INITIAL | loop.meta, DATA, batched=True)
    half = loop.inner.updated(steps=loop.inner.steps // 2)
    whole = loop.inner.updated(steps=2 * half.steps)
    first = run(inner=half, method="unrolled")
    second = run(inner=half, method="forward", start=first.end)
    assert largest_error(second.params, run(inner=whole, method="unrolled").params) < 1e-13


# Memory, and errors.


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    peaks = {}
    for method in (Forward(), Unrolled()):
        for steps in (2, 8):
            with LiveBytes() as memory:
                run_logistic(method, inner=LOOP.updated(steps=steps))
            peaks[method.flag, steps] = memory.peak
    assert peaks["forward", 8] == peaks["forward", 2]
    assert peaks["unrolled", 8] > 3 * peaks["unrolled", 2]


def test_an_entry_that_does_not_require_grad_takes_no_tangents():
    """The tangents of a start of 10,000 numbers alone would be above the limit."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - m["a"]).square().sum(),
        lambda m, d: {"w": m["start"]},
        {"a": a, "start": torch.zeros(10_000, dtype=torch.float64)},
        None,
        inner=GradientDescent(steps=1, lr=1.0),
        method=Forward(memory=2**20),
    )
    params["w"].sum().backward()
    assert a.grad.item() == 10_000


def test_entries_may_be_expanded_tensors():
    """One step of size ¼ on ½ Σ (w − a)² takes w from b to ¾ b + ¼ a."""
    a, b = (torch.tensor(x, dtype=torch.float64).expand(3) for x in (2.0, 4.0))
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["b"]},
        inner_loss=lambda params, meta, data: 0.5 * (params["w"] - meta["a"]).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    inner = GradientDescent(steps=1, lr=0.25)
    grads = hypergradient(problem, {"a": a, "b": b}, None, inner=inner, method="forward").grads
    assert grads["a"].tolist() == [0.25] * 3
    assert grads["b"].tolist() == [0.75] * 3


def test_entries_may_be_empty():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2)},
        inner_loss=lambda p, m, d: (p["w"] - m["t"]).square().sum() + m["none"].sum(),
        outer_loss=lambda p, m, d: p["w"].square().sum(),
    )
    meta = {"t": torch.tensor([1.0, 2.0]), "none": torch.zeros(0)}
    inner = GradientDescent(steps=60, lr=0.25)
    grads = hypergradient(problem, meta, None, inner=inner, method="forward").grads
    torch.testing.assert_close(grads, {"t": torch.tensor([2.0, 4.0]), "none": torch.zeros(0)})


@pytest.mark.parametrize("carry", [False, True])
def test_an_entry_that_the_outer_loss_alone_reads_needs_no_tangents(carry):
    method = Forward(carry=carry, memory=0)  # so that tangents would be refused
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: 0.5 * (params["w"] - 1).square().sum(),
        outer_loss=lambda params, meta, data: (params["w"] * meta["a"]).sum(),
    )
    meta = {"a": torch.tensor(2.0, dtype=torch.float64)}
    inner = GradientDescent(steps=2, lr=0.5)
    run = partial(hypergradient, problem, meta, None, inner=inner, method=method)
    first = run()
    assert first.grads["a"].item() == 3 * 0.75
    assert run(start=first.end).grads["a"].item() == 3 * (1 - 0.5**4)


def test_tangents_above_the_limit_of_memory_are_refused():
    message = r"forward: got 15 hyperparameters for 4 parameters.*expected at most 0"
    with pytest.raises(ValueError, match=message):
        run_logistic(Forward(memory=1000))


def test_chunks_of_tangents_are_those_of_one_draw_of_the_host():
    """Mixup, say, draws its weight by Python's or NumPy's generator."""

    def inner_loss(params, meta, data):
        share = random.random() * np.random.rand()
        return (params["w"] - share * meta["a"] - meta["b"]).square().sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2, dtype=torch.float64)},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: params["w"].square().sum(),
    )
    meta = {name: randn(2, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    results = []
    for chunk in (None, 1):
        random.seed(0)
        np.random.seed(0)
        inner = GradientDescent(steps=3, lr=0.2)
        results.append(hypergradient(problem, meta, None, inner=inner, method=Forward(chunk=chunk)))
    whole, chunked = results
    assert torch.equal(chunked.params["w"], whole.params["w"])
    assert largest_error(chunked.grads, whole.grads) < 1e-12


def test_a_chunk_of_no_tangents_is_refused():
    with pytest.raises(ValueError, match="chunk: got 0, expected at least 1"):
        Forward(chunk=0)


def test_a_start_with_the_derivative_in_other_hyperparameters_is_refused():
    end = run_logistic(Forward(carry=True)).end
    inner = GradientDescent(lr=FromMeta("eta"))
    meta = {name: m for name, m in META.items() if name != "mu"}
    with pytest.raises(ValueError, match=r"start: got the derivative of .*'mu'.*expected that of"):
        run_logistic(Forward(carry=True), inner=inner, meta=meta, start=end)


def test_a_start_that_is_no_iterate_is_refused():
    with pytest.raises(ValueError, match="start: got dict, expected an Iterate, the `end` of a re"):
        run_logistic(Forward(), start={"w": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"w": w[:, :1]}, r"got torch.float64 \[1\] for the parameter 'w', expected"),
        (
            lambda w: {"w": w.float()},
            "got torch.float32 .* for the parameter 'w', expected torch.f",
        ),
        (lambda w: {"v": w}, "got torch.float64 .* for the parameter 'v', expected nothing"),
    ],
    ids=["shape", "type", "name"],
)
@pytest.mark.parametrize("method", ["forward", "unrolled", "cg"])
def test_a_start_of_another_problem_is_refused(method, change, message):
    """A parameter of shape [1] would stand for all of them, in a problem of its own."""
    end = run_logistic("unrolled").end
    start = replace(end, params=change(end.params["w"]))
    with pytest.raises(ValueError, match=f"start: {message}"):
        run_logistic(method, inner=GradientDescent(), start=start)


def test_a_start_is_compared_again_where_the_data_have_another_shape():
    """`init` is one function, and what it returns depends on the data."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(data.shape)},
        inner_loss=lambda p, m, d: (p["w"] - m["a"] * d).square().sum(),
        outer_loss=lambda p, m, d: p["w"].square().sum(),
    )

    def run(data, start=None):
        options = {"inner": GradientDescent(steps=2), "method": "unrolled", "start": start}
        return hypergradient(problem, {"a": torch.ones(())}, data, **options)

    end = run(torch.ones(1)).end
    run(torch.ones(1), end)
    with pytest.raises(ValueError, match=r"start: got torch.float32 \[1\] for the parameter 'w'"):
        run(torch.ones(4), end)


def test_a_start_with_another_number_of_tasks_is_refused():
    end = run_logistic(Forward()).end
    with pytest.raises(ValueError, match=r"start: got leading sizes \[1\], expected 3"):
        hypergradient(
            network(), INITIAL, DATA, inner=LOOP, method="forward", batched=True, start=end
        )
