"""`check_hypergradient` tells right from wrong, and why."""

from functools import partial

import numpy as np
import pytest
import torch
from oracles import quadratic, randn
from tanh_network import DATA, INITIAL, network

from metaimplicit import (
    CG,
    LBFGS,
    BilevelProblem,
    GradientDescent,
    Implicit,
    Neumann,
    Proximal,
    check_hypergradient,
)

SOLVED, SHORT = GradientDescent(steps=150, lr=0.2), GradientDescent(steps=3, lr=0.1)
PROBLEM = network(Proximal(1.0))
check = partial(check_hypergradient, PROBLEM, INITIAL, DATA, batched=True, directions=2)


@pytest.mark.parametrize("inner", [SOLVED, SHORT])
def test_unrolled_is_right(inner):
    found = check(inner=inner, method="unrolled")
    assert found.verdict.startswith("Right")
    assert found.error < 1e-7
    assert found.noise < 1e-5
    assert found.dense_error is found.cosine is found.residual is None
    assert "against finite differences" in str(found)


@pytest.mark.parametrize(
    ("method", "inner", "verdict"),
    [
        ("dense", SOLVED, "Right"),
        ("dense", "newton-cg", "Right"),
        ("dense", LBFGS(steps=100), "Right"),
        (Implicit(CG(60)), SOLVED, "Right"),
        (Implicit(CG(1)), SOLVED, "Wrong: the linear system is not solved"),
        (Implicit(Neumann(terms=1)), SOLVED, "Wrong: the linear system is not solved"),
        ("dense", SHORT, "Wrong: the solve is fine, but θ_T is no stationary point"),
        (
            Implicit(CG(60), curvature="gauss-newton"),
            SOLVED,
            "so it is A (gauss-newton, damping 0.0)",
        ),
        (Implicit(CG(60), damping=0.5), SOLVED, "so it is A (hessian, damping 0.5)"),
        ("first-order", SOLVED, "as this method leaves out part of it; 'unrolled' is exact"),
    ],
)
def test_the_verdict_names_the_reason(method, inner, verdict):
    found = check(inner=inner, method=method)
    assert verdict in found.verdict
    assert (found.error < 1e-3) == (verdict == "Right")
    assert str(found).endswith(found.verdict)
    if method == "dense":
        assert found.dense_error == 0
        assert found.cosine == pytest.approx(1)


def test_negative_curvature_is_named():
    oracle = quadratic([[-0.5, 1.0, 2.0]])
    with pytest.warns(RuntimeWarning, match="NEGATIVE_CURVATURE"):
        found = check_hypergradient(
            oracle.problem,
            oracle.meta,
            oracle.data,
            inner=SHORT,
            method=Implicit(CG(9)),
            batched=True,
        )
    assert found.negative_curvature == 1
    assert found.verdict.startswith("Wrong: the curvature is not positive definite")


def test_what_cannot_be_checked_is_told():
    single = {name: p.float() for name, p in INITIAL.items()}
    rough = check_hypergradient(
        PROBLEM,
        single,
        tuple(x.float() for x in DATA),
        inner=SHORT,
        method="dense",
        batched=True,
        tolerance=1e-6,
    )
    assert rough.verdict.startswith("Undecided: the finite differences are known to")
    with pytest.raises(ValueError, match="directions: got 0"):
        check(inner=SHORT, method="dense", directions=0)
    noisy = BilevelProblem(
        PROBLEM.init,
        PROBLEM.inner_loss,
        lambda p, m, d: PROBLEM.outer_loss(p, m, d) + torch.rand(()) * randn(1, seed=0)[0],
    )
    with pytest.raises(ValueError, match="outer loss: got two values in two calls"):
        check_hypergradient(noisy, INITIAL, DATA, inner=SHORT, method="unrolled", batched=True)
    rng = np.random.default_rng(0)  # not torch's: nothing but a second call can tell
    shaken = BilevelProblem(
        PROBLEM.init,
        lambda p, m, d: PROBLEM.inner_loss(p, m, d) * (1 + 0.1 * rng.random()),
        PROBLEM.outer_loss,
    )
    with pytest.raises(ValueError, match="inner loss: got two values in two calls"):
        check_hypergradient(shaken, INITIAL, DATA, inner=SHORT, method="unrolled", batched=True)
