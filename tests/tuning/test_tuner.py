"""The tuner against loops by hand, closed forms, and itself after a restart."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from oracles import quadratic, relative_error
from weighted_logistic import META, POINT, PROBLEM

from metaimplicit import (
    CG,
    BilevelProblem,
    FromMeta,
    GradientDescent,
    Implicit,
    Positive,
    Tuner,
    hypergradient,
)
from metaimplicit.inner import Newton, Ridge, make_inner
from metaimplicit.methods import FirstOrder, Method, known_options, make_method
from metaimplicit.tuning import Box

ORACLE = quadratic([[1.5, 2.0, 2.5, 3.0, 3.5]])
H, B, T = (x[0] for x in ORACLE.data)
DATA = (H, B, T)
SGD = partial(torch.optim.SGD, lr=0.06)


STIFF = quadratic([[3.0, 3.5, 4.0, 4.5, 5.0]])  # a few outer steps suffice


def optimum(h, b, t):
    """φ where φ + BᵀH⁻¹(H⁻¹Bφ − t) = 0."""
    m = torch.linalg.solve(h, b)
    return torch.linalg.solve(torch.eye(3, dtype=torch.float64) + m.T @ m, m.T @ t)


def make_tuner(method="cg", steps=4, optimizer=SGD, **options):
    """A tuner of the quadratic problem."""
    inner = GradientDescent(steps=steps, lr=0.4)
    meta = ORACLE.meta
    options = {"inner": inner, "method": method, "optimizer": optimizer, **options}
    return Tuner(ORACLE.problem, meta, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps", "tolerance"),
    [
        ("cg", 11, 1e-5),
        ("amigo", 15, 1e-8),
        ("real-time", 15, 1e-8),
        ("f2sa", 13, 1e-4),
    ],
)
def test_four_inner_steps_between_outer_steps_suffice_to_reach_the_optimum(
    method, steps, tolerance
):
    options = known_options(method, penalty=1e5, scale=0.22)
    tuner = Tuner(
        STIFF.problem,
        STIFF.meta,
        inner=GradientDescent(steps=4, lr=0.25),
        method=make_method(method, **options),
        optimizer=partial(torch.optim.SGD, lr=0.75),
    )
    h, b, t = data = tuple(x[0] for x in STIFF.data)
    tuner.fit([data], [data], steps=steps)
    phi = optimum(h, b, t)
    assert relative_error(tuner.meta["phi"], phi) < tolerance
    assert relative_error(tuner.params["theta"], torch.linalg.solve(h, b @ phi)) < tolerance


def test_a_step_is_a_hypergradient_and_a_step_of_the_outer_optimiser():
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    tuner = make_tuner("unrolled", warm_start=False, optimizer=momentum)
    phi = ORACLE.meta["phi"]
    velocity = 0.0
    for _ in range(3):
        step = tuner.step(DATA, DATA)
        expected = hypergradient(
            ORACLE.problem,
            {"phi": phi},
            DATA,
            inner=tuner.inner,
            method="unrolled",
        )
        velocity = 0.9 * velocity + expected.grads["phi"]
        phi = phi - 0.1 * velocity
        assert torch.allclose(tuner.meta["phi"], phi, rtol=1e-14, atol=0)
        assert step.outer_loss == pytest.approx(expected.outer_loss.item(), rel=1e-14)
        assert step.norm == pytest.approx(expected.grads["phi"].norm().item(), rel=1e-14)


def test_each_inner_step_sees_its_own_batch_and_the_curvature_another():
    batches = []

    def inner_loss(params, meta, data):
        batches.append(data.item())
        return (params["w"] - meta["phi"] * data).square().sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(1)},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: (params["w"] * data).sum(),
    )
    inner = GradientDescent(steps=2, lr=0.1)
    tuner = Tuner(
        problem,
        {"phi": torch.ones(())},
        inner=inner,
        method="cg",
        optimizer=SGD,
    )
    train = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]
    step = tuner.step(train, torch.tensor(10.0))
    assert list(dict.fromkeys(batches)) == [1, 2, 3]
    assert step.outer_loss == pytest.approx(10 * tuner.params["w"].item())
    # A = 2, ∂²f/∂φ∂w = −2·3 on the batch of the curvature, v = 10.
    assert step.norm == pytest.approx(30)


@pytest.mark.slow
def test_real_time_with_one_outer_step_for_the_whole_run_is_forward_mode():
    inner = GradientDescent(
        steps=12,
        lr=FromMeta("eta"),
        momentum=FromMeta("mu"),
    )
    tuners = [
        Tuner(PROBLEM, META, inner=inner, method=method, optimizer=SGD)
        for method in ("real-time", "forward")
    ]
    for tuner in tuners:
        tuner.step(POINT, POINT)
    for name in META:
        assert torch.equal(tuners[0].meta[name], tuners[1].meta[name])


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_hypergradient_that_is_not_finite_is_never_applied(bad):
    tuner = make_tuner("unrolled")
    tuner.step(DATA, DATA)
    phi = tuner.meta["phi"].clone()
    theta = tuner.params["theta"].clone()
    message = r"outer step 1: got .*expected finite numbers; nothing was changed"
    with pytest.raises(FloatingPointError, match=message):
        tuner.step(DATA, (H, B, T * bad))
    tuner.on_nonfinite = "skip"
    assert not tuner.step(DATA, (H, B, T * bad)).applied
    assert torch.equal(tuner.meta["phi"], phi)
    assert torch.equal(tuner.params["theta"], theta)
    assert tuner.step(DATA, DATA).applied


def test_loaders_are_iterated_again_when_they_end():
    loader = torch.utils.data.DataLoader(torch.arange(3.0), batch_size=1)
    batches = []

    def outer_loss(params, meta, data):
        batches.append(data.item())
        return params["w"].sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(1)},
        inner_loss=lambda params, meta, data: (params["w"] - meta["phi"] * data).square().sum(),
        outer_loss=outer_loss,
    )
    inner = GradientDescent(steps=1)
    tuner = Tuner(
        problem,
        {"phi": torch.ones(())},
        inner=inner,
        method="cg",
        optimizer=SGD,
    )
    tuner.fit(loader, loader, steps=5)
    assert batches == [0, 1, 2, 0, 1]


def test_integer_entries_of_meta_are_constant():
    problem = BilevelProblem(
        init=ORACLE.problem.init,
        inner_loss=lambda params, meta, data: (
            ORACLE.problem.inner_loss(params, meta, data) * meta["twice"]
        ),
        outer_loss=ORACLE.problem.outer_loss,
    )
    meta = {**ORACLE.meta, "twice": torch.tensor(2)}
    tuner = Tuner(
        problem,
        meta,
        inner=GradientDescent(steps=2),
        optimizer=SGD,
    )
    tuner.step(DATA, DATA)
    assert tuner.meta["twice"] == 2
    assert not torch.equal(tuner.meta["phi"], ORACLE.meta["phi"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"domains": {"psi": Positive()}},
            r"domains: got \['psi'\], expected names in meta, \['phi'\]",
        ),
        (
            {"domains": {"phi": Box(9.0)}},
            r"meta\['phi'\]: hyperparameter: got -?[\d.]+, expected numbers from 9.0 to inf",
        ),
        ({"on_nonfinite": "ignore"}, "on_nonfinite: got 'ignore', expected 'raise' or 'skip'"),
        ({"optimizer": "adam"}, "optimizer: got str, expected a function of the coordinates"),
        ({"inner": "sgd"}, "inner: got 'sgd', expected one of gradient-descent"),
        ({"inner": Ridge()}, "inner: got Ridge, which takes one batch for all its steps"),
        ({"inner": Newton()}, "inner: got Newton, which takes one batch for all its steps"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: got LBFGS, which evaluates the outer loss"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_tuner(**options)


def test_a_number_in_the_place_of_a_tensor_is_refused():
    with pytest.raises(ValueError, match=r"meta\['phi'\]: got float, expected a tensor, such as"):
        Tuner(ORACLE.problem, {"phi": 0.1}, inner="gradient-descent")


def test_an_inner_loop_that_is_set_later_is_read_as_by_the_constructor():
    tuner = make_tuner()
    tuner.inner = "momentum"
    assert tuner.inner == make_inner("momentum")
    with pytest.raises(ValueError, match="inner: got Ridge, which takes one batch for all its"):
        tuner.inner = Ridge()


def test_bad_calls_are_refused():
    tuner = make_tuner()
    with pytest.raises(ValueError, match="params: there are none before the first step"):
        _ = tuner.params
    with pytest.raises(ValueError, match="train: got a list of 2 batches, expected 5"):
        tuner.step([DATA, DATA], DATA)
    with pytest.raises(ValueError, match="patience: got 3 without a metric"):
        tuner.fit([DATA], [DATA], steps=1, patience=3)
    with pytest.raises(ValueError, match="every: got 0, expected at least 1"):
        tuner.fit([DATA], [DATA], steps=1, every=0)
    with pytest.raises(ValueError, match="metric: got NoneType, expected one number"):
        make_tuner().fit([DATA], [DATA], steps=1, metric=lambda *_: None)
    with pytest.raises(ValueError, match="batches: got an iterable without any"):
        tuner.fit([], [DATA], steps=1)
    for batch in ({"x": DATA}, torch.ones(3), None):
        with pytest.raises(ValueError, match=r"train: got .*wrap one batch that serves all steps"):
            tuner.fit(batch, [DATA], steps=1)
        with pytest.raises(ValueError, match=r"validation: got .*wrap one batch that serves"):
            tuner.fit([DATA], batch, steps=1)
    other = Tuner(
        ORACLE.problem,
        {"psi": torch.ones(2)},
        inner=GradientDescent(),
    )
    with pytest.raises(ValueError, match=r"state: got hyperparameters .*phi.*expected .*psi"):
        other.load_state_dict(tuner.state_dict())
    message = r"implicit cannot give the gradient of meta\['eta'\].*use 'unrolled'"
    with pytest.raises(ValueError, match=message):
        Tuner(PROBLEM, META, inner=GradientDescent(lr=FromMeta("eta"))).step(POINT, POINT)


class Refilled:
    """A loader that fills the same tensor for every batch."""

    def __iter__(self):
        held = torch.empty_like(H)
        for scale in (1.0, 2.0, 3.0):
            yield (held.copy_(scale * H), B, T)


def test_a_loader_that_fills_the_same_tensors_again_is_refused():
    """A step holds its batches at once, and all would be the last one."""
    with pytest.raises(ValueError, match="writes into tensors which it has given already"):
        make_tuner(steps=2).fit(Refilled(), [DATA], steps=1)
    make_tuner(steps=2).fit([DATA], [DATA], steps=1)  # the same tensors, unchanged


@dataclass(frozen=True)
class OwnMethod(Method):
    """A first-order method that takes its inner loop twice."""

    flag = "own"
    rereads = "all"

    def adapt(self, problem, inner, meta):
        FirstOrder().adapt(problem, inner, meta)
        return FirstOrder().adapt(problem, inner, meta)


@pytest.mark.filterwarnings("ignore:CG ended:RuntimeWarning")  # its data change
@pytest.mark.parametrize(
    "method",
    ["sama", "f2sa", Implicit(CG(), products="finite-differences"), OwnMethod()],
    ids=["sama", "f2sa", "finite-differences", "own"],
)
def test_an_inner_loss_that_writes_into_a_batch_that_is_read_again_is_warned_of(method):
    def writing(params, meta, data):
        return ORACLE.problem.inner_loss(params, meta, (data[0].add_(0.1), *data[1:]))

    problem = BilevelProblem(ORACLE.problem.init, writing, ORACLE.problem.outer_loss)
    inner = GradientDescent(steps=2, lr=0.1)
    tuner = Tuner(problem, ORACLE.meta, inner=inner, method=method, optimizer=SGD)
    with pytest.warns(RuntimeWarning, match="train: a forward pass writes to a tensor"):
        tuner.step([tuple(x.clone() for x in DATA) for _ in range(3)], DATA)
