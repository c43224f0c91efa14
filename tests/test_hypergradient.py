"""Every method against closed forms, finite differences, the others, and a plain per-task loop of `higher`."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, quadratic, randn, relative_error, ridge
from torch import nn

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    Dense,
    FirstOrder,
    FromMeta,
    GradientDescent,
    Implicit,
    Neumann,
    Nystrom,
    Proximal,
    Reptile,
    Status,
    Stream,
    TorchOptimizer,
    Truncated,
    Unrolled,
    hypergradient,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)
    import higher

SPECTRA = [[0.5, 1.0, 2.0, 4.0], [1.0, 1.5, 3.0, 3.5]]
ORACLES = {"quadratic": (quadratic(SPECTRA), 0.25), "ridge": (ridge(), 0.3)}
CONVERGED = {
    "unrolled": Unrolled(),
    "dense": Implicit(Dense()),
    "cg": Implicit(CG(max_steps=50, tol=1e-13)),
    "neumann": Implicit(Neumann(terms=400, scale=0.2)),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("method", CONVERGED)
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_methods_agree_with_the_closed_form(name, method, vectorize):
    oracle, lr = ORACLES[name]
    result = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=GradientDescent(steps=400, lr=lr),
        method=CONVERGED[method],
        batched=True,
        vectorize=vectorize,
    )
    for key, exact in oracle.exact.items():
        assert relative_error(result.grads[key], exact) < 1e-8


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("method", ["dense", "cg", "neumann"])
def test_curvatures_agree_where_the_model_is_linear(method, curvature):
    oracle, lr = ORACLES["ridge"]
    solver = CONVERGED[method].solver
    result = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=GradientDescent(steps=400, lr=lr),
        method=Implicit(solver, curvature=curvature),
        batched=True,
    )
    assert relative_error(result.grads["log_decay"], oracle.exact["log_decay"]) < 1e-8
    assert result.report.sigma == pytest.approx(torch.tensor(-1.0).exp().item(), rel=1e-6)
    assert result.report.curvature == curvature


@pytest.mark.parametrize(("name", "n"), [("quadratic", 4), ("ridge", 6)])
def test_nystrom_of_full_rank_is_the_closed_form_of_the_shifted_system(name, n):
    oracle, lr = ORACLES[name]
    result = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=GradientDescent(steps=400, lr=lr),
        method=Implicit(Nystrom(rank=n, rho=0.05)),
        batched=True,
    )
    for key, exact in oracle.shifted(0.05).items():
        assert relative_error(result.grads[key], exact) < 1e-8
    assert result.report.rho == 0.05


def test_damping_is_added_to_the_curvature():
    oracle, lr = ORACLES["quadratic"]
    result = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=GradientDescent(steps=400, lr=lr),
        method=Implicit(Dense(), damping=0.7),
        batched=True,
    )
    assert relative_error(result.grads["phi"], oracle.shifted(0.7)["phi"]) < 1e-9


def test_one_problem_is_a_batch_of_one():
    oracle, lr = ORACLES["ridge"]
    call = partial(hypergradient, oracle.problem, oracle.meta, inner=GradientDescent(steps=50, lr=lr), method="cg")
    one, batch = call(tuple(x[1] for x in oracle.data)), call(tuple(x[1:2] for x in oracle.data), batched=True)
    assert one.params["w"].shape == (6,)
    assert batch.params["w"].shape == (1, 6)
    assert relative_error(one.params["w"], batch.params["w"][0]) < 1e-13
    assert relative_error(one.grads["log_decay"], batch.grads["log_decay"]) < 1e-13
    # the mean over tasks
    parts = [call(tuple(x[i] for x in oracle.data)).grads["log_decay"] for i in range(3)]
    assert relative_error(call(oracle.data, batched=True).grads["log_decay"], torch.stack(parts).mean()) < 1e-12


# a small tanh network that adapts from a learnt initialisation, with learnt numbers of the inner loop

TASKS, POINTS = 3, 6
X, Y = randn(TASKS, POINTS, 2, seed=10), randn(TASKS, POINTS, 1, seed=11)
XQ, YQ = randn(TASKS, POINTS, 2, seed=12), randn(TASKS, POINTS, 1, seed=13)
INITIAL = {
    "0.weight": randn(4, 2, seed=14),
    "0.bias": randn(4, seed=15),
    "2.weight": randn(1, 4, seed=16),
    "2.bias": randn(1, seed=17),
}


def forward(params, x):
    return F.linear(torch.tanh(F.linear(x, params["0.weight"], params["0.bias"])), params["2.weight"], params["2.bias"])


def outer(params, meta, data):
    return F.mse_loss(forward(params, data[2]), data[3])


def network(penalty=None):
    return BilevelProblem(
        init=lambda meta, data: {name: meta[name] for name in INITIAL},
        inner_loss=Composite(
            outputs=lambda params, meta, data: forward(params, data[0]),
            loss=lambda z, data: F.mse_loss(z, data[1]),
            penalty=penalty,
        ),
        outer_loss=outer,
    )


DATA = (X, Y, XQ, YQ)
NUMBERS = {
    "gradient-descent": (GradientDescent(steps=4, lr=FromMeta("lr"), momentum=FromMeta("mu")), {"lr": 0.1, "mu": 0.5}),
    "momentum-from-zero": (GradientDescent(steps=4, lr=0.1, momentum=FromMeta("mu")), {"mu": 0.0}),
    "transformed": (GradientDescent(steps=4, lr=FromMeta("log_lr", torch.exp)), {"log_lr": -2.0}),
    "sgd": (
        TorchOptimizer(
            torch.optim.SGD,
            steps=4,
            lr=FromMeta("lr"),
            momentum=FromMeta("mu"),
            weight_decay=FromMeta("wd"),
            nesterov=True,
        ),
        {"lr": 0.1, "mu": 0.5, "wd": 0.01},
    ),
    "adam": (
        TorchOptimizer(
            torch.optim.Adam,
            steps=4,
            lr=FromMeta("lr"),
            betas=(FromMeta("b1"), FromMeta("b2")),
            weight_decay=FromMeta("wd"),
            eps=FromMeta("eps"),
        ),
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "wd": 0.1, "eps": 0.01},
    ),
    "amsgrad": (
        TorchOptimizer(torch.optim.Adam, steps=4, lr=FromMeta("lr"), betas=(0.8, FromMeta("b2")), amsgrad=True),
        {"lr": 0.05, "b2": 0.95},
    ),
    "adamw": (
        TorchOptimizer(
            torch.optim.AdamW, steps=4, lr=FromMeta("lr"), betas=(0.8, FromMeta("b2")), weight_decay=FromMeta("wd")
        ),
        {"lr": 0.05, "b2": 0.95, "wd": 0.1},
    ),
    "adagrad": (
        TorchOptimizer(torch.optim.Adagrad, steps=4, lr=FromMeta("lr"), eps=FromMeta("eps")),
        {"lr": 0.1, "eps": 0.1},
    ),
    "rmsprop": (
        TorchOptimizer(torch.optim.RMSprop, steps=4, lr=FromMeta("lr"), alpha=FromMeta("a"), momentum=FromMeta("mu")),
        {"lr": 0.02, "a": 0.9, "mu": 0.5},
    ),
    "adadelta": (
        TorchOptimizer(torch.optim.Adadelta, steps=4, lr=FromMeta("lr"), rho=FromMeta("rho")),
        {"lr": 1.0, "rho": 0.9},
    ),
    "adamax": (
        TorchOptimizer(torch.optim.Adamax, steps=4, lr=FromMeta("lr"), betas=(FromMeta("b1"), 0.99)),
        {"lr": 0.05, "b1": 0.8},
    ),
    "asgd": (TorchOptimizer(torch.optim.ASGD, steps=4, lr=FromMeta("lr"), lambd=FromMeta("l")), {"lr": 0.1, "l": 0.01}),
    "rprop": (TorchOptimizer(torch.optim.Rprop, steps=4, lr=FromMeta("lr")), {"lr": 0.01}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_unrolled_equals_finite_differences_of_the_whole_procedure(name):
    inner, numbers = NUMBERS[name]
    penalty = Proximal(FromMeta("proximal"))
    meta = (
        INITIAL
        | {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        | {"proximal": torch.tensor(0.3, dtype=torch.float64)}
    )
    run = partial(hypergradient, network(penalty), data=DATA, inner=inner, method="unrolled", batched=True)
    grads = run(meta).grads
    for key, value in meta.items():
        direction = torch.ones_like(value) if value.dim() == 0 else randn(*value.shape, seed=20)
        step = 2e-5 if key in numbers else 1e-3
        expected = finite_difference(lambda v, key=key: run(meta | {key: v}).outer_loss, value, direction, step)
        assert float((grads[key] * direction).sum()) == pytest.approx(float(expected), rel=1e-6, abs=1e-9), key


def test_step_sizes_per_tensor_and_per_element():
    inner = GradientDescent(steps=3, lr=FromMeta("lr"))
    tensors = {f"lr.{name}": torch.tensor(0.1 + 0.01 * i).double() for i, name in enumerate(INITIAL)}
    elements = {key: value.expand(INITIAL[key[3:]].shape) for key, value in tensors.items()}
    run = partial(hypergradient, network(), data=DATA, inner=inner, method="unrolled", batched=True)
    one, each = run(INITIAL | tensors), run(INITIAL | elements)
    assert relative_error(one.outer_loss, each.outer_loss) < 1e-14
    for key in tensors:
        assert each.grads[key].shape == INITIAL[key[3:]].shape
        assert relative_error(one.grads[key], each.grads[key].sum()) < 1e-12


def test_truncated_spans_first_order_to_unrolled():
    inner = GradientDescent(steps=5, lr=0.1, momentum=0.4)
    run = partial(hypergradient, network(Proximal(0.3)), INITIAL, DATA, inner=inner, batched=True)
    for a, b in ((Truncated(5), Unrolled()), (Truncated(0), FirstOrder())):
        for name in INITIAL:
            assert relative_error(run(method=a).grads[name], run(method=b).grads[name]) < 1e-12
    between = [run(method=Truncated(k)).grads["0.weight"] for k in (0, 2, 5)]
    assert relative_error(between[0], between[1]) > 1e-3 < relative_error(between[1], between[2])


def test_truncated_is_the_unrolled_gradient_of_the_last_steps():
    """K = 2 of 5: the derivative of two steps taken at θ₃ as if it were the initialisation, momentum carried over."""
    inner = GradientDescent(steps=5, lr=FromMeta("lr"))
    meta = INITIAL | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    run = partial(hypergradient, network(), data=DATA, batched=True)
    truncated = run(meta, inner=inner, method=Truncated(2))
    third = run(INITIAL, inner=GradientDescent(steps=3, lr=0.1), method="first-order")
    # start the last two steps at θ₃ of each task, which is data now, displaced by φ
    problem = BilevelProblem(
        init=lambda meta, data: {name: data[4][name] + meta[name] for name in INITIAL},
        inner_loss=network().inner_loss,
        outer_loss=outer,
    )
    zero = {name: torch.zeros_like(p) for name, p in INITIAL.items()} | {"lr": meta["lr"]}
    expected = hypergradient(
        problem, zero, (*DATA, third.params), inner=inner.updated(steps=2), method="unrolled", batched=True
    )
    for name in meta:
        assert relative_error(truncated.grads[name], expected.grads[name]) < 1e-12


def test_multi_step_losses_see_every_iterate():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def over_iterates(params, meta, data):
        losses = torch.stack([outer({n: p[t] for n, p in params.items()}, meta, data) for t in range(4)])
        return weights @ losses

    problem = BilevelProblem(network().init, network().inner_loss, over_iterates)
    inner = GradientDescent(steps=3, lr=0.1)
    got = hypergradient(problem, INITIAL, DATA, inner=inner, method=Unrolled(iterates=True), batched=True)
    expected = sum(
        weights[t]
        * hypergradient(
            network(), INITIAL, DATA, inner=GradientDescent(steps=t, lr=0.1), method="unrolled", batched=True
        ).grads["0.weight"]
        for t in (1, 2, 3)
    )
    at_start = torch.func.grad(
        lambda w: torch.stack([outer(INITIAL | {"0.weight": w}, {}, [d[i] for d in DATA]) for i in range(3)]).mean()
    )
    assert relative_error(got.grads["0.weight"], expected + weights[0] * at_start(INITIAL["0.weight"])) < 1e-12
    assert got.params["0.weight"].shape == (TASKS, 4, 4, 2)


# `higher` adds Adam's ε before the bias correction, torch (and we) after it: they are one function at ε = 0
HIGHER = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), GradientDescent(steps=4, lr=0.1)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), GradientDescent(steps=4, lr=0.1, momentum=0.9)),
    "adam": (
        lambda p: torch.optim.Adam(p, lr=0.05, eps=0.0),
        TorchOptimizer(torch.optim.Adam, steps=4, lr=0.05, eps=0.0),
    ),
}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("name", HIGHER)
def test_batched_equals_a_plain_loop_of_higher(name, vectorize):
    optimizer, inner = HIGHER[name]
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model.load_state_dict(INITIAL)
    for task in range(TASKS):
        with higher.innerloop_ctx(model, optimizer(model.parameters()), copy_initial_weights=False) as (
            fmodel,
            diffopt,
        ):
            for _ in range(4):
                diffopt.step(F.mse_loss(fmodel(X[task]), Y[task]))
            (F.mse_loss(fmodel(XQ[task]), YQ[task]) / TASKS).backward()
    result = hypergradient(network(), INITIAL, DATA, inner=inner, method="unrolled", batched=True, vectorize=vectorize)
    for key, p in model.named_parameters():
        assert relative_error(result.grads[key], p.grad) < 1e-10


def test_implicit_agrees_with_unrolled_where_the_inner_problem_is_solved():
    problem = network(Proximal(1.0))
    run = partial(hypergradient, problem, INITIAL, DATA, inner=GradientDescent(steps=600, lr=0.2), batched=True)
    exact = run(method="unrolled").grads
    implicit = run(method=Implicit(CG(max_steps=60, tol=1e-12)))
    for name in INITIAL:
        assert relative_error(implicit.grads[name], exact[name]) < 1e-7
    assert implicit.report.inner_gradient_norm.max() < 1e-9


def test_gauss_newton_differs_from_the_hessian_and_bounds_its_error():
    problem = network(Proximal(0.5))
    run = partial(hypergradient, problem, INITIAL, DATA, inner=GradientDescent(steps=300, lr=0.2), batched=True)
    exact = run(method=Implicit(Dense(), curvature="gauss-newton"))
    rough = run(method=Implicit(CG(max_steps=2), curvature="gauss-newton"))
    hessian = run(method=Implicit(Dense()))
    assert relative_error(exact.grads["0.weight"], hessian.grads["0.weight"]) > 1e-3
    assert hessian.report.error_bound is None
    # with the proximal term the mixed derivative is −λI: u shows through the gradient, task by task, up to λ
    difference = torch.cat([(exact.grads[n] - rough.grads[n]).flatten() for n in INITIAL]).norm() / 0.5
    assert 0 < float(difference) <= float(rough.report.error_bound.sum())
    assert rough.report.products == 2
    assert rough.report.share(Status.MAX_STEPS) == 1.0


def test_an_arbitrary_penalty_has_its_exact_hessian():
    def quartic(params, meta):
        return 0.5 * sum((p - meta[name]).square().sum() + 0.1 * p.pow(4).sum() for name, p in params.items())

    run = partial(
        hypergradient, network(quartic), INITIAL, DATA, inner=GradientDescent(steps=600, lr=0.1), batched=True
    )
    exact = run(method="unrolled").grads
    for name in INITIAL:
        assert relative_error(run(method=Implicit(Dense())).grads[name], exact[name]) < 1e-7
    linear = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            lambda p, m, d: d[0] @ p["w"],
            lambda z, d: F.mse_loss(z, d[1][:, 0]),
            lambda p, m: quartic({"w": p["w"]}, m),
        ),
        outer_loss=lambda p, m, d: F.mse_loss(d[2] @ p["w"], d[3][:, 0]),
    )
    run = partial(
        hypergradient, linear, {"w": randn(2, seed=3)}, DATA, inner=GradientDescent(steps=600, lr=0.1), batched=True
    )
    gauss_newton = run(method=Implicit(Dense(), curvature="gauss-newton"))
    assert relative_error(gauss_newton.grads["w"], run(method="unrolled").grads["w"]) < 1e-8
    assert gauss_newton.report.error_bound is None


def test_reptile_moves_towards_the_adapted_parameters():
    result = hypergradient(
        network(), INITIAL, DATA, inner=GradientDescent(steps=3, lr=0.1), method=Reptile(), batched=True
    )
    for name, p in INITIAL.items():
        assert relative_error(result.grads[name], (p - result.params[name]).mean(0)) < 1e-13


def test_streams_show_each_step_its_own_data():
    stream = Stream(lambda t: (X[:, t % 3 : t % 3 + 3], Y[:, t % 3 : t % 3 + 3], XQ, YQ))
    inner = GradientDescent(steps=3, lr=0.1)
    run = partial(hypergradient, network(Proximal(0.5)), inner=inner, batched=True)
    grads = run(INITIAL, stream, method="unrolled").grads["0.weight"]
    direction = randn(4, 2, seed=30)
    expected = finite_difference(
        lambda w: run(INITIAL | {"0.weight": w}, stream, method="unrolled").outer_loss, INITIAL["0.weight"], direction
    )
    assert float((grads * direction).sum()) == pytest.approx(float(expected), rel=1e-7)
    with pytest.raises(ValueError, match="Implicit batch: got None with a Stream"):
        run(INITIAL, stream, method="cg")
    fixed = run(INITIAL, stream, method=Implicit(Dense(), batch=DATA))
    assert fixed.grads["0.weight"].isfinite().all()


def test_auxiliary_outputs_come_back_detached():
    problem = BilevelProblem(
        network().init, network().inner_loss, lambda p, m, d: (outer(p, m, d), {"outputs": forward(p, d[2])})
    )
    result = hypergradient(
        problem, INITIAL, DATA, inner=GradientDescent(steps=2, lr=0.1), method="first-order", batched=True
    )
    assert result.aux["outputs"].shape == (TASKS, POINTS, 1)
    assert not result.aux["outputs"].requires_grad
    assert relative_error((result.aux["outputs"] - YQ).square().mean(), result.outer_loss) < 1e-14


# what cannot be asked

ASK = partial(hypergradient, data=DATA, inner=GradientDescent(steps=3, lr=0.1), batched=True)


GAUSS_NEWTON = Implicit(CG(), curvature="gauss-newton")


@pytest.mark.parametrize("method", [GAUSS_NEWTON, "first-order", "reptile", Truncated(0)], ids=str)
def test_a_step_size_is_refused_where_it_has_no_gradient(method):
    meta = INITIAL | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"cannot give the gradient of meta\['lr'\].*(unrolled|implicit)"):
        ASK(network(Proximal(0.1)), meta, inner=GradientDescent(steps=3, lr=FromMeta("lr")), method=method)


def test_a_regulariser_is_refused_by_first_order():
    meta = INITIAL | {"proximal": torch.tensor(0.1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"first-order cannot give the gradient of meta\['proximal'\]"):
        ASK(network(Proximal(FromMeta("proximal"))), meta, method="first-order")


def test_an_initialisation_the_inner_loss_does_not_read_is_refused_by_implicit():
    with pytest.raises(ValueError, match=r"implicit cannot give the gradient of meta\['0.weight'\].*proximal term"):
        ASK(network(), INITIAL, method=GAUSS_NEWTON)


def test_what_nothing_reads_has_gradient_zero():
    meta = INITIAL | {"unused": torch.ones(3).double(), "steps": torch.tensor(3)}
    result = ASK(network(Proximal(0.1)), meta, method=GAUSS_NEWTON)
    assert torch.equal(result.grads["unused"], torch.zeros(3).double())
    assert result.grads["steps"] == 0


def test_captured_tensors_are_named():
    secret = torch.ones(1).double().requires_grad_()
    module = nn.Linear(2, 1).double()

    def inner_loss(params, meta, data):
        return F.mse_loss(forward(params, data[0]) * secret, data[1])

    def through_a_module(params, meta, data):
        return F.mse_loss(forward(params, data[0]) + module(data[0]), data[1])

    for function, name in ((inner_loss, "tensor 'secret'"), (through_a_module, r"parameter 'module\.(weight|bias)'")):
        with pytest.raises(ValueError, match=rf"{name} requires grad and is captured"):
            ASK(BilevelProblem(network().init, function, outer), INITIAL, method="unrolled")
        with pytest.raises(ValueError, match="requires grad and is captured by a loss"):
            ASK(BilevelProblem(network().init, network().inner_loss, function), INITIAL, method="first-order")


def test_losses_must_be_scalars():
    with pytest.raises(ValueError, match=r"inner_loss: got shape \(6, 1\) per task, expected a scalar"):
        ASK(BilevelProblem(network().init, lambda p, m, d: forward(p, d[0]), outer), INITIAL, method="unrolled")
    with pytest.raises(ValueError, match=r"outer_loss: got float per task"):
        ASK(
            BilevelProblem(network().init, network().inner_loss, lambda p, m, d: 1.0),
            INITIAL,
            method="unrolled",
            batched=False,
        )


def test_bad_arguments_are_refused():
    ok = network(Proximal(0.1))
    cases = [
        ({"method": "sgd"}, "method: got 'sgd', expected one of unrolled, truncated, first-order"),
        ({"method": Truncated(4)}, "Truncated steps: got 4, expected at most the inner loop's 3"),
        (
            {"method": Truncated(1), "inner": GradientDescent(steps=3, tol=0.1)},
            "Truncated: got an inner loop with tol=0.1",
        ),
        ({"vectorize": "auto"}, "vectorize: got 'auto'"),
        ({"data": (X, Y[:2], XQ, YQ)}, "expected every tensor to carry one task axis"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            ASK(ok, INITIAL, **({"method": "unrolled"} | change))
    with pytest.raises(ValueError, match="meta: got dict"):
        ASK(ok, {}, method="cg")
    with pytest.raises(ValueError, match="expected a non-empty dict of floating-point tensors"):
        ASK(BilevelProblem(lambda m, d: {}, ok.inner_loss, outer), INITIAL, method="cg")
    with pytest.raises(ValueError, match="FromMeta\\('nowhere'\\): meta has no such entry"):
        ASK(ok, INITIAL, method="unrolled", inner=GradientDescent(lr=FromMeta("nowhere")))
    plain = BilevelProblem(ok.init, lambda p, m, d: ok.inner_loss(p, m, d), outer)
    with pytest.raises(ValueError, match="expected a Composite"):
        ASK(plain, INITIAL, method=Implicit(curvature="gauss-newton"))
    for make in (
        lambda: Truncated(-1),
        lambda: Implicit(curvature="fisher"),
        lambda: Implicit(damping=-1.0),
        lambda: Proximal(-1.0),
        lambda: Proximal(1.0, center="mean"),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_negative_curvature_is_told_and_strict_raises():
    oracle = quadratic([[-1.0, 1.0, 2.0, 3.0]])
    ask = partial(
        hypergradient, oracle.problem, oracle.meta, oracle.data, inner=GradientDescent(steps=2, lr=0.1), batched=True
    )
    with pytest.warns(RuntimeWarning, match="CG ended with NEGATIVE_CURVATURE.*gauss-newton"):
        result = ask(method="cg")
    assert result.report.status.tolist() == [Status.NEGATIVE_CURVATURE]
    assert result.report.rayleigh.item() <= 0
    with pytest.raises(FloatingPointError, match="NEGATIVE_CURVATURE"):
        ask(method=Implicit(CG(), strict=True))


def test_the_error_bound_is_the_residual_norm_over_sigma_for_each_task():
    run = partial(
        hypergradient,
        network(Proximal(0.4)),
        INITIAL,
        inner=GradientDescent(steps=3, lr=0.1),
        method=GAUSS_NEWTON,
        batched=True,
    )
    scaled = (X, Y, XQ, YQ * torch.tensor([1.0, 30.0, 1.0], dtype=torch.float64)[:, None, None])
    result = run(scaled)
    v = torch.func.vmap(torch.func.grad(lambda p, d: outer(p, {}, d)))(result.params, scaled)
    norms = torch.cat([g.flatten(1) for g in v.values()], dim=1).norm(dim=1) / TASKS
    assert relative_error(result.report.error_bound, result.report.residual * norms / 0.4) < 1e-12


def test_no_bound_is_claimed_where_the_penalty_may_bend_down():
    def concave(params, meta):
        return sum(-0.01 * (p - meta[n]).square().sum() for n, p in params.items())

    method = Implicit(CG(), curvature="gauss-newton", damping=0.5)
    result = hypergradient(
        network(concave), INITIAL, DATA, inner=GradientDescent(steps=3, lr=0.1), method=method, batched=True
    )
    assert result.report.error_bound is None
    assert result.report.sigma == 0.5


def test_the_inner_gradient_norm_is_that_of_the_last_iterate():
    result = hypergradient(
        network(Proximal(0.4)), INITIAL, DATA, inner=GradientDescent(steps=2, lr=0.1), method=GAUSS_NEWTON, batched=True
    )
    gradient = torch.func.vmap(torch.func.grad(lambda p, d: network(Proximal(0.4)).inner_loss(p, INITIAL, d)))(
        result.params, DATA
    )
    norms = torch.cat([g.flatten(1) for g in gradient.values()], dim=1).norm(dim=1)
    assert relative_error(result.report.inner_gradient_norm, norms) < 1e-12


def test_streams_and_batches_go_where_they_are_said_to():
    inner = GradientDescent(steps=2, lr=0.1)
    parts = [(randn(3, 6, 2, seed=40 + t), randn(3, 6, 1, seed=50 + t), XQ + t, YQ) for t in range(3)]
    seen = []

    def fn(t):
        seen.append(t)
        return parts[t]

    problem = BilevelProblem(
        lambda meta, data: {n: meta[n] + 0.1 * data[0].mean() for n in INITIAL},
        network(Proximal(0.5)).inner_loss,
        outer,
    )
    stream = hypergradient(problem, INITIAL, Stream(fn), inner=inner, method="unrolled", batched=True)
    assert set(seen) == {0, 1, 2}
    start = {n: p + 0.1 * parts[0][0].mean((1, 2)).reshape(-1, *[1] * p.dim()) for n, p in INITIAL.items()}
    params = {n: p.requires_grad_() for n, p in start.items()}
    for t in range(2):
        losses = torch.vmap(problem.inner_loss, in_dims=(0, None, 0))(params, INITIAL, parts[t])
        grads = torch.autograd.grad(losses.sum(), list(params.values()))
        params = {n: (p - 0.1 * g).detach().requires_grad_() for (n, p), g in zip(params.items(), grads, strict=True)}
    expected = torch.vmap(outer, in_dims=(0, None, 0))(params, {}, parts[2]).mean()
    assert relative_error(stream.outer_loss, expected.detach()) < 1e-12

    # the curvature sees the batch it is told, at the parameters that the stream led to
    fixed = parts[1]
    problem = network(Proximal(0.5))
    got = hypergradient(
        problem, INITIAL, Stream(lambda t: parts[t]), inner=inner, method=Implicit(Dense(), batch=fixed), batched=True
    )
    frozen = BilevelProblem(
        lambda meta, data: {n: data[4][n] + 0 * meta[n] for n in INITIAL},
        problem.inner_loss,
        lambda p, m, d: outer(p, m, (d[0], d[1], d[5], d[6])),
    )
    expected = hypergradient(
        frozen,
        INITIAL,
        (*fixed, got.params, parts[2][2], parts[2][3]),
        inner=GradientDescent(steps=1, lr=1e-300),
        method="dense",
        batched=True,
    )
    for name in INITIAL:
        assert relative_error(got.grads[name], expected.grads[name]) < 1e-12


@pytest.mark.parametrize("method", ["first-order", Truncated(1), Truncated(3)], ids=str)
def test_shortcuts_change_the_derivative_and_not_the_iterate(method):
    run = partial(
        hypergradient, network(), INITIAL, DATA, inner=GradientDescent(steps=3, lr=0.1, momentum=0.5), batched=True
    )
    cut, whole = run(method=method), run(method="unrolled")
    for name in INITIAL:
        assert relative_error(cut.params[name], whole.params[name]) < 1e-14


def test_a_captured_start_or_number_is_named_too():
    secret = torch.ones(1, dtype=torch.float64, requires_grad=True)
    shifted = BilevelProblem(lambda m, d: {n: m[n] + secret for n in INITIAL}, network().inner_loss, outer)
    for method in ("unrolled", "first-order"):
        with pytest.raises(ValueError, match="tensor 'secret' requires grad and is captured"):
            ASK(shifted, INITIAL, method=method)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"lr: got a tensor that requires grad, expected FromMeta\('lr'\)"):
        ASK(network(), INITIAL, inner=GradientDescent(lr=lr), method="unrolled")
    late = Stream(lambda t: DATA if t == 0 else (X * secret, Y, XQ, YQ))
    with pytest.raises(ValueError, match="requires grad and is captured"):
        ASK(network(), INITIAL, data=late, method="unrolled")


def test_more_that_is_refused():
    with pytest.raises(ValueError, match="data: got a numpy array"):
        ASK(network(), INITIAL, data=(X, Y.numpy(), XQ, YQ), method="unrolled")
    with pytest.raises(ValueError, match="Implicit batch: got one with data that is not a Stream"):
        ASK(network(Proximal(0.1)), INITIAL, method=Implicit(Dense(), batch=DATA))
    negative = INITIAL | {"proximal": torch.tensor(-0.5, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"proximal strength: got -0.5 from meta"):
        ASK(network(Proximal(FromMeta("proximal"))), negative, method=GAUSS_NEWTON)
    with pytest.raises(ValueError, match="Unrolled iterates: got an inner loop with tol"):
        ASK(network(), INITIAL, inner=GradientDescent(tol=0.1), method=Unrolled(iterates=True))
    both = BilevelProblem(network().init, network().inner_loss, lambda p, m, d: outer(p, m, d) + 1e-3 * m["lr"])
    meta = INITIAL | {"lr": torch.tensor(0.1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"first-order cannot give the gradient of meta\['lr'\]"):
        ASK(both, meta, inner=GradientDescent(steps=2, lr=FromMeta("lr")), method="first-order")
