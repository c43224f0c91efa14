"""The tuner against loops by hand, closed forms, and itself after a restart; domains; what is refused."""

import io
import math
from functools import partial

import pytest
import torch
from oracles import quadratic, relative_error
from weighted_logistic import META, POINT, PROBLEM

from metaimplicit import (
    BilevelProblem,
    Box,
    Domain,
    FromMeta,
    GradientDescent,
    Interval,
    Positive,
    Simplex,
    TorchOptimizer,
    Tuner,
    hypergradient,
)
from metaimplicit.methods import METHODS, known_options, make_method
from metaimplicit.tuning import Real
from metaimplicit.tuning.free_meta import FreeMeta

ORACLE = quadratic([[0.5, 1.0, 1.5, 2.0, 3.0]])
H, B, T = (x[0] for x in ORACLE.data)
DATA = (H, B, T)
SGD = partial(torch.optim.SGD, lr=0.06)


def optimum():
    """φ where φ + BᵀH⁻¹(H⁻¹Bφ − t) = 0."""
    m = torch.linalg.solve(H, B)
    return torch.linalg.solve(torch.eye(3, dtype=torch.float64) + m.T @ m, m.T @ T)


def tuner(method="cg", steps=4, optimizer=SGD, **options):
    inner = options.pop("inner", GradientDescent(steps=steps, lr=0.4))
    return Tuner(
        ORACLE.problem, ORACLE.meta, inner=inner, method=method, optimizer=optimizer, **options
    )


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        ("cg", 1e-5),
        ("dense", 1e-8),
        ("soba", 1e-8),
        ("amigo", 1e-8),
        ("real-time", 1e-8),
        ("f2sa", 1e-4),
    ],
)
def test_the_single_loop_finds_the_optimum(method, tolerance):
    found = tuner(make_method(method, **known_options(method, penalty=1e5, scale=0.3)))
    found.fit([DATA], [DATA], steps=400)
    assert relative_error(found.meta["phi"], optimum()) < tolerance
    assert relative_error(found.params["theta"], torch.linalg.solve(H, B @ optimum())) < tolerance


def test_a_step_is_a_hypergradient_and_a_step():
    found = tuner(
        "unrolled", warm_start=False, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    )
    phi, velocity = ORACLE.meta["phi"], 0.0
    for _ in range(3):
        step = found.step(DATA, DATA)
        expected = hypergradient(
            ORACLE.problem, {"phi": phi}, DATA, inner=found.inner, method="unrolled"
        )
        velocity = 0.9 * velocity + expected.grads["phi"]
        phi = phi - 0.1 * velocity
        assert torch.allclose(found.meta["phi"], phi, rtol=1e-14, atol=0)
        assert step.outer_loss == pytest.approx(expected.outer_loss.item(), rel=1e-14)
        assert step.norm == pytest.approx(expected.grads["phi"].norm().item(), rel=1e-14)


def test_each_inner_step_has_its_batch_and_the_curvature_its_own():
    seen = []

    def inner_loss(params, meta, data):
        seen.append(data.item())
        return (params["w"] - meta["phi"] * data).square().sum()

    problem = BilevelProblem(
        lambda meta, data: {"w": torch.zeros(1)},
        inner_loss,
        lambda params, meta, data: (params["w"] * data).sum(),
    )
    found = Tuner(
        problem,
        {"phi": torch.ones(())},
        inner=GradientDescent(steps=2, lr=0.1),
        method="cg",
        optimizer=SGD,
    )
    step = found.step([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)], torch.tensor(10.0))
    assert list(dict.fromkeys(seen)) == [1, 2, 3]
    assert step.outer_loss == pytest.approx(10 * found.params["w"].item())
    # A = 2, ∂²f/∂φ∂w = −2·3 on the batch of the curvature, v = 10
    assert step.norm == pytest.approx(30)


def test_real_time_with_a_period_of_the_whole_run_is_forward():
    inner = GradientDescent(steps=12, lr=FromMeta("eta"), momentum=FromMeta("mu"))
    ends = [
        Tuner(PROBLEM, META, inner=inner, method=method, optimizer=SGD)
        for method in ("real-time", "forward")
    ]
    for each in ends:
        each.step(POINT, POINT)
    for name in META:
        assert torch.equal(ends[0].meta[name], ends[1].meta[name])


@pytest.mark.parametrize(
    "method", ["unrolled", "real-time", "cg", "nystrom-cg", "auto", "soba", "sama", "f2sa"]
)
def test_a_killed_run_goes_on_to_the_same_bits(method):
    def batch(i):
        rows = torch.arange(6) + i % 7
        return POINT[0][rows], POINT[1][rows], *POINT[2:]

    free = getattr(METHODS[method], "curvature", "") is None
    hessian = "hessian" if free else None

    def tuned():
        return Tuner(
            PROBLEM,
            {"decay": META["decay"], "weights": META["weights"][:6]},
            inner=TorchOptimizer(torch.optim.Adam, steps=2, lr=0.05),
            method=make_method(method, **known_options(method, rank=3, curvature=hessian)),
            domains={"decay": Positive(), "weights": Box(0.0)},
        )

    torch.manual_seed(0)
    whole = tuned()
    whole.fit(batch, lambda i: POINT, steps=3)
    rng, file = torch.get_rng_state(), io.BytesIO()
    torch.save(whole.state_dict(), file)
    whole.fit(batch, lambda i: POINT, steps=6)
    torch.set_rng_state(rng)
    again = tuned()
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert again.steps == 3
    again.fit(batch, lambda i: POINT, steps=6)
    for name in again.meta:
        assert torch.equal(again.meta[name], whole.meta[name])
    assert torch.equal(again.params["w"], whole.params["w"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_hypergradient_that_is_not_finite_is_never_applied(bad):
    found = tuner("unrolled")
    found.step(DATA, DATA)
    before, params = found.meta["phi"].clone(), found.params["theta"].clone()
    with pytest.raises(
        FloatingPointError,
        match=r"outer step 1: got .*expected finite numbers; nothing was changed",
    ):
        found.step(DATA, (H, B, T * bad))
    found.on_nonfinite = "skip"
    assert not found.step(DATA, (H, B, T * bad)).applied
    assert torch.equal(found.meta["phi"], before)
    assert torch.equal(found.params["theta"], params)
    assert found.step(DATA, DATA).applied


def test_early_stopping_goes_back_to_the_best():
    found = tuner("cg", steps=50)
    values = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    seen = []

    def metric(params, meta):
        seen.append((params["theta"], meta["phi"]))
        return next(values)

    assert found.fit([DATA], [DATA], steps=100, metric=metric, patience=2) == 1.0
    assert len(seen) == 4
    assert found.steps == 4
    assert torch.equal(found.params["theta"], seen[1][0])
    assert torch.equal(found.meta["phi"], seen[1][1])


def test_loaders_begin_again():
    loader = torch.utils.data.DataLoader(torch.arange(3.0), batch_size=1)
    seen = []
    problem = BilevelProblem(
        lambda meta, data: {"w": torch.zeros(1)},
        lambda params, meta, data: (params["w"] - meta["phi"] * data).square().sum(),
        lambda params, meta, data: (seen.append(data.item()), params["w"].sum())[1],
    )
    found = Tuner(
        problem, {"phi": torch.ones(())}, inner=GradientDescent(steps=1), method="cg", optimizer=SGD
    )
    found.fit(loader, loader, steps=5)
    assert seen == [0, 1, 2, 0, 1]


DOMAINS = [
    (Positive(), [0.5, 2.0], [-1.0, 1.0], "got -1, expected numbers > 0"),
    (Interval(-1, 3), [0.5, 2.0], [3.0], "got 3, expected numbers between -1 and 3"),
    (Box(0.0, 1.0), [0.0, 0.5], [1.5], "got 1.5, expected numbers from 0.0 to 1.0"),
    (Simplex(), [0.3, 0.7], [0.5, 0.6], "got 0.5, expected numbers > 0 that sum to 1"),
]


@pytest.mark.parametrize(
    ("domain", "inside", "outside", "message"), DOMAINS, ids=lambda x: type(x).__name__
)
def test_domains(domain, inside, outside, message):
    value = torch.tensor(inside, dtype=torch.float64)
    free = domain.free(value)
    assert relative_error(domain.value(free), value) < 1e-14
    far = domain.project(free + torch.tensor([40.0, -40.0], dtype=torch.float64))
    assert domain.value(far).isfinite().all()
    if not isinstance(domain, Simplex):  # there float rounds to the bound itself
        domain.free(domain.value(far))
    gradient = torch.tensor([2.0, -3.0], dtype=torch.float64)
    by_autograd = Domain.pull_back_gradient(domain, free, value, gradient)
    assert (
        relative_error(domain.pull_back_gradient(free, domain.value(free), gradient), by_autograd)
        < 1e-14
    )
    with pytest.raises(ValueError, match=message):
        domain.free(torch.tensor(outside))


def test_domains_hold_while_tuning():
    meta = {
        "eta": META["eta"],
        "mu": META["mu"],
        "decay": META["decay"],
        "weights": META["weights"],
    }
    domains = {
        "eta": Positive(),
        "mu": Interval(0, 1),
        "decay": Box(0.25, 0.5),
        "weights": Box(0.9, 1.1),
    }
    inner = GradientDescent(steps=5, lr=FromMeta("eta"), momentum=FromMeta("mu"))
    meta["weights"] = torch.ones_like(META["weights"])
    found = Tuner(PROBLEM, meta, inner=inner, method="unrolled", optimizer=partial(torch.optim.SGD, lr=100.0),
                  domains=domains)  # fmt: skip
    found.step(POINT, POINT)
    assert found.meta["eta"] > 0
    assert 0 <= found.meta["mu"] <= 1
    assert found.meta["decay"] == 0.5
    assert set(found.meta["weights"].tolist()) == {0.9, 1.1}
    grads = hypergradient(PROBLEM, meta, POINT, inner=inner, method="unrolled").grads
    expected = (
        META["eta"].log() - 100 * META["eta"] * grads["eta"]
    ).exp()  # the chain rule through exp
    assert relative_error(found.meta["eta"], expected) < 1e-12


def test_integer_entries_of_meta_stay():
    problem = BilevelProblem(
        ORACLE.problem.init,
        lambda params, meta, data: ORACLE.problem.inner_loss(params, meta, data) * meta["twice"],
        ORACLE.problem.outer_loss,
    )
    found = Tuner(
        problem,
        {**ORACLE.meta, "twice": torch.tensor(2)},
        inner=GradientDescent(steps=2),
        optimizer=SGD,
    )
    found.step(DATA, DATA)
    assert found.meta["twice"] == 2
    assert not torch.equal(found.meta["phi"], ORACLE.meta["phi"])


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
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tuner(**options)


def test_bad_calls_are_refused():
    found = tuner()
    with pytest.raises(ValueError, match="params: there are none before the first step"):
        _ = found.params
    with pytest.raises(ValueError, match="train: got a list of 2 batches, expected 5"):
        found.step([DATA, DATA], DATA)
    with pytest.raises(ValueError, match="patience: got 3 without a metric"):
        found.fit([DATA], [DATA], steps=1, patience=3)
    with pytest.raises(ValueError, match="batches: got an iterable without any"):
        found.fit([], [DATA], steps=1)
    with pytest.raises(ValueError, match=r"state: got hyperparameters .*phi.*expected .*psi"):
        Tuner(ORACLE.problem, {"psi": torch.ones(2)}, inner=GradientDescent()).load_state_dict(
            found.state_dict()
        )
    with pytest.raises(
        ValueError, match=r"implicit cannot give the gradient of meta\['eta'\].*use 'unrolled'"
    ):
        Tuner(PROBLEM, META, inner=GradientDescent(lr=FromMeta("eta"))).step(POINT, POINT)
    with pytest.raises(ValueError, match="Interval: got low 1 and high 0"):
        Interval(1, 0)
    with pytest.raises(ValueError, match="expected finite bounds; use Positive or Box"):
        Interval(0, math.inf)


class Capped(Real):
    """A domain of a user's own, which hands another tensor back."""

    def project(self, free):
        return free.clamp(max=0.5)


def test_values_are_copies():
    """Of what moves as it is, and of what never moves."""
    start = {"a": torch.tensor(0.2), "b": torch.tensor(3), "c": torch.tensor(0.5)}
    free = FreeMeta(start, {"c": Interval(0, 1)})
    for x in free.values().values():
        x.zero_()
    assert {name: x.item() for name, x in free.values().items()} == pytest.approx(
        {"a": 0.2, "b": 3, "c": 0.5}
    )


def test_a_domain_may_project_by_a_tensor_of_its_own():
    free = FreeMeta({"a": torch.tensor(0.2)}, {"a": Capped()})
    with torch.no_grad():
        free.tensors["a"].add_(3)
    free.project()
    assert free.values()["a"] == 0.5
