"""The oracles held against closed forms, and the verdicts against mathematics broken on purpose."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from fuzz import dense, oracles, verdicts
from fuzz.case import Case
from fuzz.dense import argmin, curvatures, formula, gauss_newton
from fuzz.kronecker import kronecker_matrices
from fuzz.models import default_dtype
from fuzz.problems import Plain
from fuzz.subject import Outcome, call
from fuzz.verdicts import FLAGGED, RIGHT, WRONG, judge

DENSE = {"method": "implicit", "solver": "dense", "proximal": 0.5}
RIDGE = Case(
    door="hypergradient",
    model="linear",
    outputs=1,
    loss="mse",
    meta="decay",
    tasks=1,
    batched=False,
    steps=120,
    **DENSE,
)


@pytest.fixture(autouse=True)
def _float64():
    with default_dtype(torch.float64):
        yield


def _ridge():
    """x with a column of ones, y, the query's, and the solution of (XᵀX 2/m + λI) w = Xᵀy 2/m."""
    plain = Plain(RIDGE)
    task = plain.tasks[0]
    x, xq = (
        torch.cat([part, torch.ones(len(part), 1)], dim=1)
        for part in (task.inputs, task.query_inputs)
    )
    a = 2 * x.T @ x / len(x) + 0.5 * torch.eye(4)
    w = torch.linalg.solve(a, 2 * x.T @ task.targets[:, 0] / len(x))
    return plain, a, w, xq, task.query_targets[:, 0]


def test_argmin_is_the_solution_of_ridge_regression():
    plain, _, w, _, _ = _ridge()
    end = argmin(plain, plain.meta, plain.tasks[0], plain.start(plain.meta))
    assert torch.allclose(torch.cat([p.flatten() for p in end.values()]), w, atol=1e-12)


def test_formula_and_differences_are_the_derivative_of_ridge_regression():
    plain, a, w, xq, yq = _ridge()
    v = 2 * xq.T @ (xq @ w - yq) / len(xq)
    expected = float(v @ -torch.linalg.solve(a, 0.5 * w))  # dw/d log λ = −A⁻¹ λ w

    end = argmin(plain, plain.meta, plain.tasks[0], plain.start(plain.meta))
    readings, _, _ = formula(plain, [end])
    assert float(readings[""]["log_decay"]) == pytest.approx(expected, rel=1e-12)
    slope = oracles.difference_slope(
        lambda phi: float(
            plain.outer(argmin(plain, phi, plain.tasks[0], end), phi, plain.tasks[0]).detach()
        ),
        plain.meta,
        {"log_decay": torch.ones(())},
        scale=abs(expected),
    )
    assert slope.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("inner", ["SGD", "Adam", "AdamW"])
def test_the_plain_loop_is_the_derivative_of_torch_optim(inner):
    options = (("weight_decay", 0.3),) + ((("momentum", 0.5),) if inner == "SGD" else ())
    plain = Plain(Case(inner=inner, options=options, lr=0.05, steps=4))
    grads, _ = oracles.unrolled_loop(plain)
    along = oracles.direction(plain, 3)
    slope = oracles.difference_slope(
        lambda phi: oracles.outer_of_loop(plain, phi), plain.meta, along, oracles.norm(grads)
    )
    assert oracles.dot(grads, along) == pytest.approx(slope.value, rel=1e-7)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse", "bce"])
@pytest.mark.parametrize("corrected", [False, True])
def test_kronecker_factors_of_one_datum_and_one_layer_are_gauss_newton(loss, corrected):
    case = Case(model="linear", loss=loss, examples=1, tasks=1, curvature="kfac", **DENSE)
    plain = Plain(case)
    theta = {n: p.clone().requires_grad_() for n, p in plain.start(plain.meta).items()}
    expected = gauss_newton(plain, theta, plain.meta, plain.tasks[0])
    readings = kronecker_matrices(plain, theta, plain.meta, plain.tasks[0], corrected)
    for matrix in readings.values():
        assert torch.allclose(matrix, expected, atol=1e-12)


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    for loss, tail in (("cross-entropy", False), ("nll", True), ("poisson", False)):
        case = Case(model="linear", loss=loss, log_softmax=tail, tasks=1, **DENSE)
        plain = Plain(case)
        theta = {n: p.clone().requires_grad_() for n, p in plain.start(plain.meta).items()}
        both = [
            curvatures(plain_of, theta, plain.meta, plain.tasks[0])[""]
            for plain_of in (Plain(case), Plain(replace(case, curvature="hessian")))
        ]
        assert torch.allclose(*both, atol=1e-12), loss


JUDGED = {
    "loop": Case(),
    "differences": Case(inner="RMSprop", lr=0.05, method="forward"),
    "truncated": Case(method="truncated", solver_steps=1),
    "formula": Case(**DENSE),
    "Krylov": Case(**{**DENSE, "solver": "cg"}, solver_steps=2),
    "polynomial": Case(**{**DENSE, "solver": "neumann"}, solver_steps=3, scale=0.1),
    "Kronecker": Case(**{**DENSE, "solver": "factored"}, curvature="ekfac"),
    "argmin": RIDGE,
    "float32": Case(dtype="float32"),
}


outcome_of = cache(call)


@cache
def verdict_on(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "call", outcome_of)
        return judge(case)


@pytest.mark.parametrize("name", JUDGED)
def test_a_result_that_is_slightly_off_is_wrong_and_one_that_says_so_is_flagged(name, monkeypatch):
    case = JUDGED[name]
    assert verdict_on(case).kind == RIGHT
    outcome = outcome_of(case)
    # differences see the part along a direction alone
    factor = 1 + {"float32": 1e-2, "differences": 1e-3}.get(name, 1e-5)
    grads = {n: g * factor for n, g in outcome.grads.items()}

    def changed(flags):
        off = Outcome(grads, outcome.loss, outcome.params, flags)
        monkeypatch.setattr(verdicts, "call", lambda _: off)
        return judge(case).kind

    assert changed([]) == WRONG
    if name == "loop":  # what a flag does is the same for every oracle
        assert changed(["MAX_STEPS"]) == FLAGGED


def _without_options(step):
    return lambda case, *rest: step(replace(case, options=()), *rest)


def _one_step_more(steps):
    return lambda plain, phi, task, start, kept: steps(plain, phi, task, start, kept + 1)


def _of_the_other_sign(solutions):
    return lambda *args: {name: -u for name, u in solutions(*args).items()}


def _of_three_steps(krylov):
    return lambda case, *rest: krylov(replace(case, solver_steps=3), *rest)


def _twice_as_large(matrices):
    return lambda *args, **how: {name: 2 * m for name, m in matrices(*args, **how).items()}


DECAYED = Case(inner="SGD", options=(("weight_decay", 0.3),))
BROKEN = {
    "momentum": (Case(options=(("momentum", 0.5),)), oracles, "_step", _without_options),
    "decay": (DECAYED, oracles, "_step", _without_options),
    "truncation": (JUDGED["truncated"], oracles, "_steps", _one_step_more),
    "sign": (JUDGED["formula"], dense, "solutions", _of_the_other_sign),
    "Krylov space": (JUDGED["Krylov"], dense, "krylov", _of_three_steps),
    "counting": (JUDGED["Kronecker"], dense, "kronecker_matrices", _twice_as_large),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_oracle_that_is_broken_changes_the_verdict(name, monkeypatch):
    case, module, attribute, change = BROKEN[name]
    assert verdict_on(case).kind == RIGHT
    monkeypatch.setattr(module, attribute, change(getattr(module, attribute)))
    assert judge(case).kind != RIGHT
