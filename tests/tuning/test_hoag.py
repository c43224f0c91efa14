"""L-BFGS to a tolerance, and HOAG on ridge regression, whose hypergradient is known."""

import math

import pytest
import torch
from oracles import quadratic, relative_error, ridge

from metaimplicit import (
    HOAG,
    LBFGS,
    BilevelProblem,
    Box,
    Composite,
    FromMeta,
    Positive,
    Proximal,
    hypergradient,
)

X, Y, XV, YV = (x[0] for x in ridge(tasks=1, m=12, n=8, seed=3).data)
EYE = torch.eye(8, dtype=torch.float64)
PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": torch.zeros(8, dtype=torch.float64)},
    inner_loss=Composite(
        outputs=lambda params, meta, data: data[0] @ params["w"],
        loss=lambda z, data: 0.5 * (z - data[1]).square().mean(),
        penalty=Proximal(FromMeta("decay"), center="zero"),
    ),
    outer_loss=lambda params, meta, data: 0.5 * (data[0] @ params["w"] - data[1]).square().mean(),
)
START = {"decay": torch.tensor(0.01, dtype=torch.float64)}


def exact(decay):
    """(g, dg/d log λ) in closed form."""
    a = X.T @ X / 12 + decay * EYE
    w = torch.linalg.solve(a, X.T @ Y / 12)
    slope = XV.T @ (XV @ w - YV) / 12
    return 0.5 * (XV @ w - YV).square().mean(), -decay * w @ torch.linalg.solve(a, slope)


def hoag(steps, **options):
    made = HOAG(PROBLEM, START, (X, Y), (XV, YV), **{"domains": {"decay": Positive()}, **options})
    return made, [made.step() for _ in range(steps)]


@pytest.mark.parametrize(
    "schedule", ["quadratic", "cubic", lambda k: 0.5**k], ids=["quadratic", "cubic", "halving"]
)
def test_it_comes_to_the_optimum(schedule):
    found, steps = hoag(40, schedule=schedule, tolerance=0.01)
    grid = torch.logspace(-4, 2, 400).double()
    best = min(float(exact(decay)[0]) for decay in grid)
    assert float(exact(found.meta["decay"])[0]) < best * (1 + 1e-4)
    for k, s in enumerate(steps):
        assert s.tolerance == pytest.approx(max(0.01 * found.schedule(k + 1), 2**-24))
    assert all(float(s.report.inner_gradient_norm) <= s.tolerance for s in steps)


def test_summable_tolerances_converge_and_a_constant_one_stalls():
    slopes = {"halving": [], "constant": []}
    for name, schedule in {"halving": lambda k: 0.5**k, "constant": lambda k: 1.0}.items():
        found, _ = hoag(40, schedule=schedule, tolerance=0.02)
        for _ in range(20):
            found.step()
            slopes[name].append(abs(float(exact(found.meta["decay"])[1])))
    assert max(slopes["halving"]) < 1e-7
    assert sum(slopes["constant"]) / 20 > 1e-3


def test_steps_are_as_long_as_the_slopes_seen_allow():
    made, _ = hoag(0, schedule=lambda k: 0.5**k, tolerance=0.02)
    points, slopes, kept, rejected, kinds, before = [], [], 0, [], set(), math.nan
    for k in range(15):
        points.append(made.free.tensors["decay"].item())
        if len(rejected) == 2:  # solved again
            assert points[k] == points[kept]
        elif k:
            assert points[k] == pytest.approx(points[kept] - slopes[kept] / before, rel=1e-12)
        step = made.step()
        here = made._last if step.accepted else made._rejected[-1]
        slopes.append(here.slope["decay"].item())
        assert step.norm == abs(slopes[k])
        expected = step.norm
        if k:
            other = rejected[-1] if len(rejected) == 2 else kept
            distance = abs(points[k] - points[other])
            expected = max(abs(slopes[k] - slopes[other]), step.norm / 4) / distance
            expected = expected if step.accepted else min(max(expected, 2 * before), 8 * before)
        assert step.lipschitz == pytest.approx(expected, rel=1e-12)
        kinds.add((step.accepted, len(rejected)))
        before, kept, rejected = (
            step.lipschitz,
            *((k, []) if step.accepted else (kept, [*rejected, k])),
        )
    assert kinds == {(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)}


def test_it_stays_in_its_box():
    found, steps = hoag(5, domains={"decay": Box(0.0, 0.02)}, tolerance=1e-4)
    assert float(found.meta["decay"]) == 0.02  # where the slope points out of it
    assert all(s.accepted for s in steps)
    assert len({s.lipschitz for s in steps[1:]}) == 1  # nothing is seen of L while φ stays


def test_lbfgs_solves_every_task_to_the_tolerance():
    oracle = quadratic([[0.1, 1, 2, 3, 40], [1, 1, 2, 2, 8]])
    found = hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=LBFGS(tol=1e-7),
        method="dense",
        batched=True,
    )
    assert float(found.report.inner_gradient_norm.max()) <= 1e-7
    assert relative_error(found.grads["phi"], oracle.exact["phi"]) < 1e-6
    assert int(found.report.inner_steps[0]) < 60


def test_lbfgs_stops_at_its_cap_with_the_best_it_has_seen():
    oracle = quadratic([[0.1, 1, 2, 3, 40]])
    losses = []

    def watched(params, meta, data):
        losses.append(float(oracle.problem.inner_loss(params, meta, data).detach()))
        return oracle.problem.inner_loss(params, meta, data)

    problem = BilevelProblem(oracle.problem.init, watched, oracle.problem.outer_loss)
    data = tuple(x[0] for x in oracle.data)
    found = hypergradient(
        problem, oracle.meta, data, inner=LBFGS(steps=5, tol=1e-12), method="dense"
    )
    assert found.report.inner_steps.tolist() == [5]
    assert float(oracle.problem.inner_loss(found.params, oracle.meta, data)) == min(losses[:6])


def test_bad_input_is_refused():
    oracle = quadratic([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"inner: got LBFGS.*expected an implicit method"):
        hypergradient(
            oracle.problem, oracle.meta, oracle.data, inner=LBFGS(), method="unrolled", batched=True
        )
    with pytest.raises(ValueError, match=r"inner: got LBFGS, whose steps are not differentiable"):
        hypergradient(
            oracle.problem, oracle.meta, oracle.data, inner=LBFGS(), method="forward", batched=True
        )
    with pytest.raises(ValueError, match="LBFGS history: got 0, expected at least 1"):
        LBFGS(history=0)
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1 inner step"):
        LBFGS(steps=0)
    with pytest.raises(
        ValueError, match="schedule: got 'linear', expected one of exponential, quadratic, cubic"
    ):
        hoag(0, schedule="linear")
    with pytest.raises(ValueError, match="tolerance: got 0, expected a number > 0"):
        hoag(0, tolerance=0)
    with pytest.raises(ValueError, match="params: there are none before the first step"):
        _ = hoag(0)[0].params
    made, _ = hoag(1)
    before = made.meta["decay"].clone()
    made.validation = (XV, YV * math.nan)
    with (
        pytest.warns(RuntimeWarning, match="CG ended with NON_FINITE"),
        pytest.raises(FloatingPointError, match="step 1: got a hypergradient of norm nan"),
    ):
        made.step()
    assert torch.equal(made.meta["decay"], before)


@pytest.mark.parametrize(("seen", "grown"), [(0.1, 2.0), (5.0, 5.0), (100.0, 8.0)])
def test_a_rejection_raises_the_lipschitz_constant_twofold_to_eightfold(monkeypatch, seen, grown):
    made, _ = hoag(1)
    before = made.lipschitz
    monkeypatch.setattr(made, "_sufficient", lambda *_: False)
    monkeypatch.setattr(made, "_observed", lambda *_: seen * before)
    step = made.step()
    assert not step.accepted
    assert step.lipschitz == pytest.approx(grown * before)
