"""Forward mode and real-time tuning against reverse mode, finite differences and the implicit function theorem."""

import pytest
import torch
import torch.nn.functional as F
from learnt_numbers import NUMBERS
from oracles import finite_difference, randn, relative_error
from tanh_network import DATA, INITIAL, network
from weighted_logistic import LOOP, META, POINT, PROBLEM, XV, YV, X, Y

from metaimplicit import (
    BilevelProblem,
    Dense,
    Forward,
    FromMeta,
    GradientDescent,
    Implicit,
    Stream,
    TorchOptimizer,
    Unrolled,
    hypergradient,
)
from metaimplicit.diagnostics.memory import LiveBytes


def gradients(method, inner=LOOP, meta=META, data=POINT, **options):
    return hypergradient(PROBLEM, meta, data, inner=inner, method=method, **options)


@pytest.mark.parametrize(
    "method", [Forward(), Forward(chunk=5), Unrolled()], ids=["forward", "chunked", "unrolled"]
)
@pytest.mark.parametrize("name", META)
def test_momentum_sgd_against_finite_differences(method, name):
    direction = torch.ones_like(META[name]) + 0.5 * torch.arange(META[name].numel()).reshape(
        META[name].shape
    )
    got = (gradients(method).grads[name] * direction).sum()
    expected = finite_difference(
        lambda m: gradients(method, meta={**META, name: m}).outer_loss,
        META[name],
        direction,
        step=1e-3,
    )
    assert float((got - expected).abs()) < 1e-7 * float(expected.abs())


def test_momentum_sgd_forward_is_reverse():
    forward, reverse = gradients(Forward()), gradients(Unrolled())
    for name in META:
        assert relative_error(forward.grads[name], reverse.grads[name]) < 1e-10
    assert relative_error(forward.params["w"], reverse.params["w"]) < 1e-14
    assert (
        relative_error(forward.report.inner_gradient_norm, reverse.report.inner_gradient_norm)
        < 1e-10
    )


def test_momentum_sgd_at_convergence_is_implicit():
    long = LOOP.updated(steps=400)
    constants = GradientDescent(steps=400, lr=0.4, momentum=0.6)
    implicit = gradients(
        Implicit(Dense()), inner=constants, meta={n: META[n] for n in ("decay", "weights")}
    )
    found = gradients(Forward(), inner=long)
    for name in ("decay", "weights"):
        assert relative_error(found.grads[name], implicit.grads[name]) < 1e-6
    for name in ("eta", "mu"):  # the argmin does not know how it was reached
        assert float(found.grads[name].abs()) < 1e-12


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("case", NUMBERS)
def test_every_optimiser_forward_is_reverse(case, chunk):
    inner, numbers = NUMBERS[case]
    meta = {**INITIAL, **{n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}}
    forward, reverse = (
        hypergradient(network(), meta, DATA, inner=inner, method=m, batched=True).grads
        for m in (Forward(chunk), Unrolled())
    )
    for name in meta:
        assert relative_error(forward[name], reverse[name]) < 1e-12


def test_a_tolerance_stops_both_alike():
    inner = LOOP.updated(steps=60, tol=1e-2)
    forward, reverse = gradients(Forward(), inner=inner), gradients(Unrolled(), inner=inner)
    assert forward.report.inner_steps.tolist() == reverse.report.inner_steps.tolist()
    assert forward.report.inner_steps.item() < 60
    for name in META:
        assert relative_error(forward.grads[name], reverse.grads[name]) < 1e-10


def test_minibatches_are_replayed():
    stream = Stream(lambda t: (X[t % 3 :: 3], Y[t % 3 :: 3], XV, YV))
    problem = BilevelProblem(
        PROBLEM.init,
        lambda params, meta, data: (
            F.binary_cross_entropy_with_logits(data[0] @ params["w"], data[1])
            + 0.5 * meta["decay"] * params["w"].square().sum()
        ),
        PROBLEM.outer_loss,
    )
    meta = {name: META[name] for name in ("eta", "mu", "decay")}
    forward, reverse = (
        hypergradient(problem, meta, stream, inner=LOOP, method=m).grads
        for m in (Forward(), Unrolled())
    )
    for name in meta:
        assert relative_error(forward[name], reverse[name]) < 1e-10


def test_a_parameter_without_a_gradient_stays():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.ones(2, dtype=torch.float64), "idle": meta["idle"]},
        inner_loss=lambda params, meta, data: (params["w"] * meta["slope"]).square().sum(),
        outer_loss=lambda params, meta, data: (params["w"].sum() * params["idle"]).sum(),
    )
    meta = {"idle": randn(3, seed=8), "slope": randn(2, seed=9)}
    inner = TorchOptimizer(torch.optim.SGD, steps=3, lr=0.1, weight_decay=0.5)
    forward, reverse = (
        hypergradient(problem, meta, None, inner=inner, method=m) for m in (Forward(), Unrolled())
    )
    assert torch.equal(forward.params["idle"], meta["idle"])
    for name in meta:
        assert relative_error(forward.grads[name], reverse.grads[name]) < 1e-12


def test_real_time_goes_on_with_its_derivative():
    whole = gradients(Forward(), inner=LOOP.updated(steps=10))
    alone = gradients(Forward(carry=True), inner=LOOP.updated(steps=10))
    half = LOOP.updated(steps=5)
    first = gradients(Forward(carry=True), inner=half)
    second = gradients(Forward(carry=True), inner=half, start=first.end)
    forgetful = gradients(Forward(), inner=half, start=first.end)
    assert relative_error(second.params["w"], whole.params["w"]) < 1e-14
    for name in META:
        assert torch.equal(alone.grads[name], whole.grads[name])
        assert relative_error(second.grads[name], whole.grads[name]) < 1e-13
        assert relative_error(forgetful.grads[name], whole.grads[name]) > 0.01


def test_a_start_goes_on_as_one_run_for_every_optimiser():
    for inner, numbers in NUMBERS.values():
        meta = {**INITIAL, **{n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()}}
        whole = hypergradient(network(), meta, DATA, inner=inner, method="unrolled", batched=True)
        half, end = inner.updated(steps=2), None
        for method in ("unrolled", "forward"):
            part = hypergradient(
                network(), meta, DATA, inner=half, method=method, batched=True, start=end
            )
            end = part.end
        for name, p in whole.params.items():
            assert relative_error(part.params[name], p) < 1e-13


def test_memory_is_flat_in_the_steps():
    peaks = {}
    for steps in (10, 100):
        for method in (Forward(), Unrolled()):
            with LiveBytes() as live:
                gradients(method, inner=LOOP.updated(steps=steps))
            peaks[method.flag, steps] = live.peak
    assert peaks["forward", 100] == peaks["forward", 10]
    assert peaks["unrolled", 100] > 3 * peaks["unrolled", 10]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="chunk: got 0, expected at least 1"):
        Forward(chunk=0)
    with pytest.raises(
        ValueError, match=r"forward: got 15 hyperparameters for 4 parameters.*expected at most 0"
    ):
        gradients(Forward(memory=1000))
    end = gradients(Forward(carry=True)).end
    with pytest.raises(ValueError, match=r"start: got the derivative of .*'mu'.*expected that of"):
        gradients(Forward(carry=True), inner=GradientDescent(lr=FromMeta("eta")), start=end)
    with pytest.raises(ValueError, match=r"start: got leading sizes \[1\], expected 3"):
        hypergradient(
            network(), INITIAL, DATA, inner=LOOP, method="forward", batched=True, start=end
        )
