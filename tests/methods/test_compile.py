"""`compile=`: compiled functions against eager ones in float64, and what keeps them from that."""

import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learnt_numbers import LEARNT_LOOPS
from oracles import largest_error, randn
from tanh_network import DATA, GAUSS_NEWTON, INITIAL, XQ, YQ, X, Y, forward, new_network, outer
from torch import nn

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    FirstOrder,
    FromMeta,
    GradientDescent,
    Implicit,
    MetaLearner,
    NewtonCG,
    Nystrom,
    Proximal,
    Stream,
    TorchOptimizer,
    Truncated,
    Unrolled,
    compilation,
    hypergradient,
)
from metaimplicit.inner import L1Norm, ProximalGradient
from metaimplicit.methods.compiled_steps import settings_of
from metaimplicit.operators import GGN
from metaimplicit.tuning import WeightDecay, tuning_problem

THREE_STEPS = GradientDescent(steps=3, lr=FromMeta("lr"))
LR = {"lr": torch.tensor(0.1, dtype=torch.float64)}


@pytest.fixture
def uncompiled(monkeypatch):
    """The functions that would be compiled, run as they are."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")


@pytest.fixture
def counters(monkeypatch, request):
    """Torch's counters, from zero, for tests that build code."""
    if not request.config.getoption("inductor"):
        pytest.skip("builds code, which takes two minutes: --inductor")
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    counters.clear()
    return counters


def differentiate(problem, meta, data=DATA, vectorize="vmap", **options):
    torch.manual_seed(0)
    options = {"batched": True, "vectorize": vectorize, **options}
    return hypergradient(problem, meta, data, **options)


def assert_equal(problem, meta, data=DATA, *, within=1e-12, **options):
    """Compiled, it is the same, and no warning is given."""
    eager = differentiate(problem, meta, data, **options)
    result = differentiate(problem, meta, data, compile=True, **options)
    assert largest_error(result.grads, eager.grads) < within
    assert largest_error(result.params, eager.params) < 1e-13
    assert torch.equal(result.report.inner_steps, eager.report.inner_steps)
    assert result.end.state.keys() == eager.end.state.keys()
    return result, eager


# Each form of the optimiser's state: none, buffers, averages, and numbers of several kinds. The
# steps of RAdam differ by their number.
FORMS_OF_STATE = ["transformed", "sgd", "adam", "asgd", "nadam", "radam", "clipped"]


@pytest.mark.parametrize("name", FORMS_OF_STATE)
def test_the_functions_of_every_form_of_state(name, uncompiled):
    loop = LEARNT_LOOPS[name]
    meta = INITIAL | loop.meta | {"proximal": torch.tensor(0.3).double()}
    inner = loop.inner
    result, eager = assert_equal(
        new_network(Proximal(FromMeta("proximal"))), meta, inner=inner, method="unrolled"
    )
    for parameter, slots in eager.end.state.items():
        for key, x in slots.items():
            assert float(torch.as_tensor(x - result.end.state[parameter][key]).abs().max()) < 1e-12


def test_the_state_before_the_differentiated_steps_is_a_constant(uncompiled):
    inner = TorchOptimizer(torch.optim.SGD, steps=4, lr=0.1, momentum=0.9)
    assert_equal(new_network(), INITIAL, inner=inner, method=Truncated(2))


@pytest.mark.parametrize("method", ["unrolled", GAUSS_NEWTON], ids=["unrolled", "gauss-newton"])
def test_a_batch_of_one_task_in_a_loop(method, uncompiled):
    one = tuple(x[:1] for x in DATA)
    meta = INITIAL | {"proximal": torch.tensor(4.0).double()}
    problem = new_network(Proximal(FromMeta("proximal")))
    inner = GradientDescent(steps=3, lr=0.1)
    assert_equal(problem, meta, one, vectorize="loop", inner=inner, method=method)


@pytest.mark.parametrize(
    "method",
    [
        Truncated(2),
        Implicit(CG(max_steps=3), curvature="hessian"),
        GAUSS_NEWTON,
        Implicit(Nystrom(rank=3), curvature="gauss-newton", check_curvature=True),
    ],
    ids=["truncated", "cg", "gauss-newton", "nystrom"],
)
def test_the_functions_of_every_method(method, uncompiled):
    meta = INITIAL | {"proximal": torch.tensor(4.0).double()}
    problem = new_network(Proximal(FromMeta("proximal")))
    inner = GradientDescent(steps=4, lr=0.1)
    result, eager = assert_equal(problem, meta, inner=inner, method=method)
    if isinstance(method, Implicit):
        for name in ("residual", "inner_gradient_norm", "leftover", "error_bound"):
            expected = getattr(eager.report, name)
            assert expected is None or torch.allclose(getattr(result.report, name), expected)


def test_first_order_needs_the_initialisation_alone(uncompiled):
    inner = GradientDescent(steps=4, lr=0.1, momentum=0.5)
    assert_equal(new_network(), INITIAL, inner=inner, method=FirstOrder())


def test_a_tolerance_a_stream_and_a_start(uncompiled):
    stops = GradientDescent(steps=30, lr=0.1, tol=0.2)
    result, _ = assert_equal(new_network(), INITIAL, inner=stops, method="unrolled")
    assert len(set(result.report.inner_steps.tolist())) == 3
    stream = Stream(lambda t: (X[:, t % 3 : t % 3 + 3], Y[:, t % 3 : t % 3 + 3], XQ, YQ))
    assert_equal(new_network(), INITIAL | LR, stream, inner=THREE_STEPS, method="unrolled")
    adam = TorchOptimizer(torch.optim.Adam, steps=2, lr=FromMeta("lr"))
    start = differentiate(new_network(), INITIAL | LR, inner=adam, method="unrolled").end
    continued = partial(
        differentiate, new_network(), INITIAL | LR, inner=adam, method="unrolled", start=start
    )
    expected = continued().grads["lr"]
    assert abs(continued(compile=True).grads["lr"] / expected - 1) < 1e-12


def test_tensors_of_the_data_and_features_have_their_gradient(uncompiled):
    problem = BilevelProblem(
        init=new_network().init,
        inner_loss=lambda params, meta, c: F.mse_loss(forward(params, c[0]), c[1]),
        outer_loss=outer,
        features=lambda meta, data: (torch.tanh(data[0] @ meta["body"]), *data[1:]),
    )
    meta = INITIAL | LR | {"body": randn(2, 2, seed=3)}
    for seed in (0, 1):  # what is compiled at the first batch serves the second
        data = (randn(*X.shape, seed=seed).requires_grad_(), *DATA[1:])
        result, eager = assert_equal(problem, meta, data, inner=THREE_STEPS, method="unrolled")
        gradients = result.data_grads[0], eager.data_grads[0]
        assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-12


def test_a_second_batch_of_another_size(uncompiled):
    problem = new_network()
    assert_equal(problem, INITIAL | LR, DATA, inner=THREE_STEPS, method="unrolled")
    smaller = tuple(x[:2] for x in DATA)
    options = {"inner": THREE_STEPS, "method": "unrolled"}
    with pytest.warns(RuntimeWarning, match="was compiled again, because its tensors have other"):
        differentiate(problem, INITIAL | LR, smaller, compile=True, **options)
    assert_equal(problem, INITIAL | LR, smaller, **options)  # The warning is given once.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "forward"}, "the method 'forward' has no compiled functions"),
        ({"method": Unrolled(iterates=True, weights=[0, 0, 0, 1])}, "outer loss of all iterates"),
        ({"vectorize": "loop"}, "the tasks run in a loop"),
        ({"inner": GradientDescent(steps=3, lr=[0.1, 0.2, 0.3])}, "numbers differ from step to"),
        (
            {"inner": ProximalGradient(L1Norm(0.1), steps=3, accelerated=True)},
            "whose steps are accelerated",
        ),
        (
            {"method": Implicit(CG(), curvature="diagonal"), "inner": NewtonCG(steps=3)},
            "the curvature 'diagonal' has no compiled products",
        ),
    ],
)
def test_what_is_not_compiled_says_why_once_and_runs_eager(changes, reason, uncompiled):
    problem = new_network(Proximal(0.5))
    options = {"inner": GradientDescent(steps=3), "method": "unrolled"} | changes
    expected = differentiate(problem, INITIAL, **options)
    with pytest.warns(RuntimeWarning, match=f"compile: .*{reason}.*; it runs eager"):
        result = differentiate(problem, INITIAL, compile=True, **options)
    assert largest_error(result.grads, expected.grads) == 0
    differentiate(problem, INITIAL, compile=True, **options)  # warnings are errors here


def test_a_loss_that_draws_random_numbers_runs_eager(uncompiled):
    problem = BilevelProblem(
        init=new_network().init,
        inner_loss=lambda params, meta, data: F.dropout(forward(params, data[0])).square().mean(),
        outer_loss=outer,
    )
    run = partial(
        differentiate, problem, INITIAL, inner=GradientDescent(steps=3), method="unrolled"
    )
    with pytest.warns(RuntimeWarning, match="the inner loss draws random numbers"):
        result = run(compile=True)
    assert largest_error(result.grads, run().grads) == 0


def test_without_a_c_compiler(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def find_none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_none)
    run = partial(differentiate, new_network(), INITIAL | LR, inner=THREE_STEPS, method="unrolled")
    with pytest.raises(ValueError, match=r"compile: got True, but torch .* there is none; install"):
        run(compile=True)
    with pytest.warns(RuntimeWarning, match=r"compile: torch .* there is none.*; it runs eager"):
        result = run(compile="auto")
    assert largest_error(result.grads, run().grads) == 0


@pytest.mark.parametrize("value", ["yes", 0, 1, np.bool_(False)])
def test_an_unknown_value(value):
    with pytest.raises(ValueError, match=r"got .*, expected True, False or 'auto'"):
        differentiate(new_network(), INITIAL, inner=THREE_STEPS, method="unrolled", compile=value)


@pytest.mark.parametrize(
    ("method", "changed"),
    [("unrolled", (1, 0)), ("cg", (0, 1))],
    ids=["inner loss", "outer loss"],
)
def test_losses_that_change_what_they_read_are_looked_at_again(method, changed, counters):
    switch = SimpleNamespace(inner=False, outer=False)

    def inner_loss(params, meta, data):
        loss = (params["w"] - meta["centre"]).square().sum()
        return loss + meta["decay"] * params["w"].square().sum() if switch.inner else loss

    def outer_loss(params, meta, data):
        loss = (params["w"] - 1).square().sum()
        return loss + 3 * meta["decay"] if switch.outer else loss

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3).double()},
        inner_loss=inner_loss,
        outer_loss=outer_loss,
    )
    meta = {"centre": torch.ones(3).double() / 2, "decay": torch.tensor(0.4).double()}
    inner = GradientDescent(steps=3, lr=0.1)

    def grads(compile):
        result = hypergradient(problem, meta, None, inner=inner, method=method, compile=compile)
        return result.grads

    warnings.filterwarnings("ignore", message="compile: .* was compiled again")
    for switch.inner, switch.outer in [(0, 0), changed]:
        torch.testing.assert_close(grads(True), grads(False), rtol=1e-14, atol=1e-15)


def test_the_problem_of_a_model_and_its_batches_is_compiled(counters):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Tanh()).double()
    tuning = tuning_problem(model, F.mse_loss, [WeightDecay(start=0.1)])
    inner = GradientDescent(steps=3, lr=0.1)
    run = partial(hypergradient, tuning.problem, tuning.meta, inner=inner, method="unrolled")
    with torch.inference_mode():
        of_inference = (X[0] + 0, Y[0] + 0)
    for batch in [(X[0], Y[0]), of_inference]:
        result = run(batch, compile=True)  # a warning, as of what runs eager, would be an error
        assert largest_error(result.grads, run(batch).grads) < 1e-12


@pytest.mark.slow
def test_the_functions_of_the_first_two_steps_serve_any_number_of_steps(counters):
    """Beside the outer loss, these are a step and a pull without a momentum, and with one."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    episodes = ((X[..., :1], Y), (XQ[..., :1], YQ))
    gradients = {}
    for compile in (False, True):
        inner = GradientDescent(lr=0.1, momentum=0.5)
        learner = MetaLearner(model, F.mse_loss, inner=inner, learn=["lr"], compile=compile)
        for steps in (1, 4):
            learner.inner = learner.inner.with_steps(steps)
            learner.zero_grad()
            learner.backward(episodes)
            gradients[compile, steps] = {n: m.grad.clone() for n, m in learner.meta.items()}
    for steps in (1, 4):
        assert largest_error(gradients[True, steps], gradients[False, steps]) < 1e-12
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


@pytest.mark.slow
def test_the_compiled_products_of_gauss_newton(counters):
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            outputs=lambda params, meta, data: torch.tanh(data[0] @ params["w"]),
            loss=lambda z, data: F.mse_loss(z, data[1]),
            penalty=Proximal(FromMeta("proximal")),
        ),
        outer_loss=lambda params, meta, data: F.mse_loss(data[2] @ params["w"], data[3]),
    )
    meta = {"w": randn(2, 1, seed=1), "proximal": torch.tensor(0.5).double()}
    inner = GradientDescent(steps=6, lr=0.1)
    as_a_class = replace(GAUSS_NEWTON, curvature=GGN)
    assert_equal(problem, meta, inner=inner, method=as_a_class)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def test_functions_that_hold_or_see_other_values_are_told_apart():
    written_again = [lambda t: 0.1 * t for _ in range(2)]
    assert settings_of(written_again[0]) == settings_of(written_again[1])
    defaults = [lambda t, *, rate=rate: rate * t for rate in (0.1, 0.2)]
    assert settings_of(defaults[0]) != settings_of(defaults[1])
    modules = [{"RATE": rate} for rate in (0.1, 0.2)]
    seeing = [eval("lambda t: RATE * t", module) for module in modules]
    assert settings_of(seeing[0]) != settings_of(seeing[1])
