"""Losses in other units: their gradients scale by powers of two, which do not round.

A threshold that forgets the size of what it is compared with is all that makes a difference.
"""

import pytest
import torch
import torch.nn.functional as F
from tanh_network import DATA, INITIAL, forward, outer

from metaimplicit import (
    CG,
    METHODS,
    BilevelProblem,
    Composite,
    FromMeta,
    GradientDescent,
    Implicit,
    Proximal,
    hypergradient,
)
from metaimplicit.solvers import MINRES, Auto, Lanczos

META = INITIAL | {"strength": torch.tensor(0.3, dtype=torch.float64)}

# The first two have no gradient of the strength. K-FAC needs to know the likelihood of the loss.
# A step size of T1–T2 and the strength of F2SA are numbers in units of the losses.
LEFT_OUT = {"first-order", "reptile", "kfac", "ekfac", "t1-t2", "f2sa"}
CASES = {name: method for name, method in METHODS.items() if name not in LEFT_OUT} | {
    "cg to the end": Implicit(CG(30, 1e-10), check_curvature=True),
    "gauss-newton to the end": Implicit(CG(40, 1e-8), curvature="gauss-newton"),
    "gauss-newton and the hessian": Implicit(CG(9), curvature="gauss-newton", check_curvature=True),
    "finite differences": Implicit(CG(9), products="finite-differences"),
    "nine steps of minres": Implicit(MINRES(9)),
    "nine steps of lanczos": Implicit(Lanczos(9)),
    "auto without a matrix": Implicit(Auto(9, dense=0)),
}

# The units of a report's numbers, as powers of those of the inner and the outer loss.
UNITS = {
    "status": (0, 0),
    "products": (0, 0),
    "residual": (0, 0),
    "hessian_residual": (0, 0),
    "spectral_radius": (0, 0),
    "relative_leftover": (0, 0),
    "leftover": (0, 1),
    "inner_gradient_norm": (1, 0),
    "rayleigh": (1, 0),
    "sigma": (1, 0),
    "error_bound": (-1, 1),
}


def run(method, inner_unit, outer_unit):
    fit = Composite(
        outputs=lambda params, meta, data: forward(params, data[0]),
        loss=lambda z, data: inner_unit * F.mse_loss(z, data[1]),
        penalty=Proximal(FromMeta("strength", lambda strength: inner_unit * strength)),
    )
    problem = BilevelProblem(
        init=lambda meta, data: {name: meta[name] for name in INITIAL},
        inner_loss=fit,
        outer_loss=lambda *arguments: outer_unit * outer(*arguments),
    )
    torch.manual_seed(0)  # of sketches
    inner = GradientDescent(steps=6, lr=0.1 / inner_unit)
    return hypergradient(problem, META, DATA, method=method, inner=inner, batched=True)


@pytest.mark.filterwarnings("ignore:.* ended with")  # after six steps A may be indefinite
@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_a_hypergradient_has_the_units_of_the_outer_loss(method):
    expected = run(method, 1.0, 1.0)
    for inner_unit, outer_unit in (
        (2.0**60, 1.0),
        (2.0**-60, 1.0),
        (1.0, 2.0**40),  # a larger gradient is warned of
        (1.0, 2.0**-60),
    ):
        result = run(method, inner_unit, outer_unit)
        for name, gradient in expected.grads.items():
            assert torch.equal(result.grads[name], outer_unit * gradient), name
        for name, (of_inner, of_outer) in UNITS.items():
            before, after = (getattr(r.report, name) for r in (expected, result))
            unit = inner_unit**of_inner * outer_unit**of_outer
            if isinstance(before, torch.Tensor):
                assert torch.equal(after, (before * unit).to(before)), name
            else:
                assert after == (before if before is None else before * unit), name
