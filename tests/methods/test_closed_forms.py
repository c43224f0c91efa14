"""Every method against closed forms: a quadratic of prescribed spectrum and ridge regression."""

from functools import partial

import pytest
import torch
from oracles import quadratic, relative_error, ridge

from metaimplicit import (
    CG,
    Dense,
    GradientDescent,
    Implicit,
    Neumann,
    Nystrom,
    Status,
    Unrolled,
    hypergradient,
)

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
    call = partial(
        hypergradient,
        oracle.problem,
        oracle.meta,
        inner=GradientDescent(steps=50, lr=lr),
        method="cg",
    )
    one, batch = (
        call(tuple(x[1] for x in oracle.data)),
        call(tuple(x[1:2] for x in oracle.data), batched=True),
    )
    assert one.params["w"].shape == (6,)
    assert batch.params["w"].shape == (1, 6)
    assert relative_error(one.params["w"], batch.params["w"][0]) < 1e-13
    assert relative_error(one.grads["log_decay"], batch.grads["log_decay"]) < 1e-13
    # the mean over tasks
    parts = [call(tuple(x[i] for x in oracle.data)).grads["log_decay"] for i in range(3)]
    assert (
        relative_error(
            call(oracle.data, batched=True).grads["log_decay"], torch.stack(parts).mean()
        )
        < 1e-12
    )


def test_negative_curvature_is_told_and_strict_raises():
    oracle = quadratic([[-1.0, 1.0, 2.0, 3.0]])
    ask = partial(
        hypergradient,
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=GradientDescent(steps=2, lr=0.1),
        batched=True,
    )
    with pytest.warns(RuntimeWarning, match="CG ended with NEGATIVE_CURVATURE.*gauss-newton"):
        result = ask(method="cg")
    assert result.report.status.tolist() == [Status.NEGATIVE_CURVATURE]
    assert result.report.rayleigh.item() <= 0
    with pytest.raises(FloatingPointError, match="NEGATIVE_CURVATURE"):
        ask(method=Implicit(CG(), strict=True))
