"""`Unrolled(memory="replay")` against the graph of all steps, and how much of it is kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from learnt_numbers import LEARNT_LOOPS
from oracles import finite_difference, largest_error, randn
from tanh_network import DATA, INITIAL, TASKS, XQ, YQ, X, Y, forward, network, outer

from metaimplicit import (
    BilevelProblem,
    FromMeta,
    GradientDescent,
    Proximal,
    Stream,
    TorchOptimizer,
    Unrolled,
    argmin,
    hypergradient,
)
from metaimplicit.diagnostics import LiveBytes
from metaimplicit.inner import L1Norm, ProximalGradient, Ridge

REPLAY = Unrolled(memory="replay")
THREE_STEPS = GradientDescent(steps=3, lr=0.1, momentum=0.5)


LOOPS = (
    "sgd",
    "adam",
    "adagrad",
    "rmsprop, centred",
    "asgd",
    "nadam",
    "radam",
    "by step",
    "by parameter",
    "clipped adam",
)


def grads(method, problem, meta, data, vectorize="vmap", **options):
    options |= {"vectorize": vectorize, "batched": True}
    result = hypergradient(problem, meta, data, method=method, **options)
    return result.grads | {"outer loss": result.outer_loss}


def assert_equal(problem, meta, data, *, replay=REPLAY, graph=None, **options):
    expected = grads(graph or Unrolled(), problem, meta, data, **options)
    assert largest_error(grads(replay, problem, meta, data, **options), expected) < 1e-12


@pytest.mark.parametrize("name", LOOPS)
def test_replay_is_the_gradient_of_the_graph(name):
    loop = LEARNT_LOOPS[name]
    meta = INITIAL | loop.meta | {"proximal": torch.tensor(0.3).double()}
    assert_equal(network(Proximal(FromMeta("proximal"))), meta, DATA, inner=loop.inner)


def test_a_step_size_for_each_number():
    sizes = {f"lr.{name}": 0.1 * randn(*p.shape, seed=1).exp() for name, p in INITIAL.items()}
    inner = GradientDescent(steps=3, lr=FromMeta("lr"))
    assert_equal(network(), INITIAL | sizes, DATA, inner=inner)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_data_that_change_and_are_kept_in_part(vectorize):
    stream = Stream(lambda t: (X[:, t % 3 : t % 3 + 3], Y[:, t % 3 : t % 3 + 3], XQ, YQ))
    assert_equal(network(), INITIAL, stream, inner=THREE_STEPS, vectorize=vectorize)


def test_tasks_that_stop_at_different_steps():
    inner = GradientDescent(steps=30, lr=0.1, tol=0.2)
    run = hypergradient(network(), INITIAL, DATA, inner=inner, method=REPLAY, batched=True)
    assert len(set(run.report.inner_steps.tolist())) == TASKS
    assert_equal(network(), INITIAL, DATA, inner=inner)


def test_the_outer_loss_of_all_iterates():
    weighted = {"iterates": True, "weights": [0.1, 0.2, 0.3, 0.4]}
    replay = Unrolled(memory="replay", **weighted)
    assert_equal(
        network(), INITIAL, DATA, inner=THREE_STEPS, replay=replay, graph=Unrolled(**weighted)
    )


def test_a_loop_that_continues():
    run = partial(hypergradient, network(), INITIAL, DATA, inner=THREE_STEPS, batched=True)
    for end in (run(method="unrolled").end, run(method=REPLAY).end):
        meta = INITIAL | {"lr": torch.tensor(0.1).double()}
        inner = THREE_STEPS.updated(lr=FromMeta("lr"))
        continued = partial(grads, problem=network(), meta=meta, data=DATA, inner=inner, start=end)
        expected = continued(Unrolled())["lr"]
        assert abs(continued(REPLAY)["lr"] / expected - 1) < 1e-12


def test_the_features_of_the_data_and_the_data_have_their_gradient():
    x = X.clone().requires_grad_()
    problem = BilevelProblem(
        init=lambda meta, c: {name: meta[name] for name in INITIAL},
        inner_loss=lambda params, meta, c: F.mse_loss(forward(params, c[0]), c[1]),
        outer_loss=outer,
        features=lambda meta, data: (torch.tanh(data[0] @ meta["body"]), *data[1:]),
    )
    meta = INITIAL | {"body": randn(2, 2, seed=3)}
    run = partial(hypergradient, problem, meta, (x, Y, XQ, YQ), inner=THREE_STEPS, batched=True)
    replay, graph = run(method=REPLAY), run(method="unrolled")
    assert largest_error(replay.grads, graph.grads) < 1e-12
    assert largest_error({"x": replay.data_grads[0]}, {"x": graph.data_grads[0]}) < 1e-12


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_step_is_replayed_with_the_random_numbers_that_it_drew(vectorize):
    problem = BilevelProblem(
        init=network().init,
        inner_loss=lambda params, meta, data: F.mse_loss(
            F.dropout(forward(params, data[0]), 0.5), data[1]
        ),
        outer_loss=outer,
    )
    gradients = []
    after = []
    for method in (Unrolled(), REPLAY):
        torch.manual_seed(0)
        gradients.append(
            grads(method, problem, INITIAL, DATA, inner=THREE_STEPS, vectorize=vectorize)
        )
        after.append(torch.rand(1))
    assert largest_error(*reversed(gradients)) < 1e-12
    assert after[0] == after[1]


def test_a_step_that_is_another_when_it_is_taken_again_is_named():
    calls = 0

    def drifting_loss(params, meta, data):
        nonlocal calls
        calls += 1
        return (params["w"] - meta["w"] - calls).square() ** 2

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(())},
        inner_loss=drifting_loss,
        outer_loss=lambda params, meta, data: params["w"],
    )
    run = partial(hypergradient, problem, {"w": torch.tensor(3.0)}, None)
    with pytest.warns(RuntimeWarning, match="inner step 1 has another gradient"):
        run(inner=GradientDescent(steps=2, lr=0.01), method=REPLAY)


def test_buffers_that_do_not_change_the_loss_are_no_difference():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).double()
    start = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, meta, data):
        outputs = torch.func.functional_call(model, params, (data[0],))
        return meta["scale"] * F.mse_loss(outputs, data[1])

    problem = BilevelProblem(lambda meta, data: start, loss, loss)
    meta = {"scale": torch.tensor(2.0).double()}
    data = (X[0], Y[0].expand(-1, 3))
    run = partial(hypergradient, problem, meta, data, inner=THREE_STEPS)
    expected = run(method=Unrolled()).grads
    assert largest_error(run(method=REPLAY).grads, expected) < 1e-12


def test_argmin_is_differentiated_once():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def loss_at(lr):
        params = argmin(
            network().inner_loss,
            network().init,
            INITIAL | {"lr": lr},
            DATA,
            inner=GradientDescent(steps=3, lr=FromMeta("lr")),
            method=REPLAY,
            batched=True,
        )
        return sum(p.square().sum() for p in params.values())

    (slope,) = torch.autograd.grad(loss_at(lr), lr, create_graph=True)
    one = torch.ones((), dtype=torch.float64)
    expected = finite_difference(lambda v: loss_at(v).detach(), at=lr.detach(), direction=one)
    assert abs(slope / expected - 1) < 1e-8
    with pytest.raises(RuntimeError, match="differentiable once under unrolled"):
        slope.backward()


def test_a_parameter_that_the_loss_does_not_read_keeps_its_gradient():
    problem = BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=lambda params, meta, data: params["w"].square(),
        outer_loss=lambda params, meta, data: params["w"] * params["idle"],
    )
    meta = {"w": torch.tensor(2.0), "idle": torch.tensor(3.0)}
    inner = TorchOptimizer(torch.optim.SGD, steps=1, lr=0.25, weight_decay=1.0)
    result = hypergradient(problem, meta, None, inner=inner, method=REPLAY)
    # w ← w − ¼ (2w + w) = w/4, and the unread parameter does not decay.
    assert result.grads == {"w": torch.tensor(0.75), "idle": torch.tensor(0.5)}


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (Ridge(), "Ridge, whose steps are no function of its iterates"),
        (ProximalGradient(L1Norm(0.1), accelerated=True), "whose steps are accelerated"),
    ],
)
def test_loops_whose_steps_cannot_be_taken_again(inner, reason):
    with pytest.raises(ValueError, match=f"Unrolled memory: got 'replay' with .*{reason}"):
        hypergradient(network(), INITIAL, DATA, inner=inner, method=REPLAY, batched=True)


def test_an_unknown_memory():
    with pytest.raises(ValueError, match="got 'disk', expected 'graph' or 'replay'"):
        Unrolled(memory="disk")


def test_memory_beyond_the_iterates_is_flat_in_the_steps():
    """A network of few parameters on many points, as convolutions are on images."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, meta, data):
        return F.mse_loss(torch.func.functional_call(model, params, (data[0],)), data[1])

    problem = BilevelProblem(lambda meta, data: dict(meta), loss, loss)

    def peak(memory, steps):
        with LiveBytes() as live:
            inner = GradientDescent(steps=steps)
            grads(Unrolled(memory=memory), problem, params, torch.rand(2, 2, 500, 1), inner=inner)
        return live.peak

    of_iterate = 2 * 4 * sum(p.numel() for p in params.values())
    of_random_state = torch.get_rng_state().numel()
    few = peak("replay", 2)
    many = peak("replay", 12)
    assert many < 1.02 * few + 8 * (of_iterate + of_random_state)
    assert many < 0.3 * peak("graph", 12)
