"""Weight decay of an inner optimiser is a penalty of the inner loss, and implicit methods see it.

The problem is a ridge regression with two tensors, w of 3 elements and b:

    f = ‖Xw + b − s y‖²/(2m) + ½ Σ_j λ_j θ_j²,    A = ZᵀZ/m + diag(λ),    θ* = A⁻¹ Zᵀ s y/m

with Z = [X, 1]. The derivatives in s and λ follow from the closed form.
"""

from functools import partial

import pytest
import torch
from oracles import relative_error
from small_problems import number, scalar_problem
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, RMSprop

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    Dense,
    FromMeta,
    Implicit,
    Proximal,
    TorchOptimizer,
    argmin,
    hypergradient,
)
from metaimplicit.methods import SAMA, ValueFunction
from metaimplicit.operators import GGN

M = 20
X = torch.randn(M, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X_VAL = torch.randn(M, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Z = torch.cat([X, torch.ones(M, 1, dtype=torch.float64)], dim=1)
Z_VAL = torch.cat([X_VAL, torch.ones(M, 1, dtype=torch.float64)], dim=1)
META = {"s": torch.tensor(1.3, dtype=torch.float64)}

# Each converges to round-off on this problem.
LOOPS = {
    "sgd": partial(TorchOptimizer, SGD, steps=40, lr=0.65),
    "momentum": partial(TorchOptimizer, SGD, steps=60, lr=0.4, momentum=0.3),
    "nesterov": partial(TorchOptimizer, SGD, steps=60, lr=0.4, momentum=0.3, nesterov=True),
    "adam": partial(TorchOptimizer, Adam, steps=80, lr=0.3, eps=0.5, betas=(0.5, 0.9)),
    "rmsprop": partial(TorchOptimizer, RMSprop, steps=60, lr=0.3, eps=0.5),
    "adagrad": partial(TorchOptimizer, Adagrad, steps=60, lr=0.6, eps=0.5),
    "adamax": partial(TorchOptimizer, Adamax, steps=80, lr=0.3, eps=0.5, betas=(0.5, 0.9)),
    "adadelta": partial(TorchOptimizer, Adadelta, steps=60, lr=0.6, eps=0.05),
}


def residuals(params, meta):
    return X @ params["w"] + params["b"] - meta["s"] * Y


PLAIN = BilevelProblem(
    init=lambda meta, data: {
        "w": torch.zeros(3, dtype=torch.float64),
        "b": torch.zeros((), dtype=torch.float64),
    },
    inner_loss=lambda params, meta, data: 0.5 * residuals(params, meta).square().mean(),
    outer_loss=lambda params, meta, data: (
        (X_VAL @ params["w"] + params["b"] - Y).square().mean() / 2
    ),
)


def composite(penalty=None):
    split = Composite(
        outputs=lambda params, meta, data: residuals(params, meta),
        loss=lambda z, data: 0.5 * z.square().mean(),
        penalty=penalty,
    )
    return BilevelProblem(PLAIN.init, split, PLAIN.outer_loss)


def closed_form(strengths):
    """dg/ds and dg/dλ_j for f with the decays `strengths`, `[4]`."""
    s = META["s"].clone().requires_grad_()
    decays = strengths.clone().requires_grad_()
    theta = torch.linalg.solve(Z.T @ Z / M + torch.diag(decays), Z.T @ (s * Y) / M)
    outer = (Z_VAL @ theta - Y).square().mean() / 2
    return torch.autograd.grad(outer, (s, decays))


def shared(decay):
    return torch.full((4,), decay, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_every_optimiser_with_weight_decay_has_the_gradient_of_ridge(name):
    inner = LOOPS[name](weight_decay=0.4)
    result = hypergradient(PLAIN, META, None, inner=inner, method="dense")
    right, _ = closed_form(shared(0.4))
    assert relative_error(result.grads["s"], right) < 1e-7
    assert result.report.sigma == 0.4
    assert result.report.inner_gradient_norm.max() < 1e-7


def test_averaged_sgd_decays_by_lambd_and_weight_decay():
    """Its step size shrinks, so the formula is held at the iterate, which is near the minimum."""
    options = {"lambd": 0.1, "weight_decay": 0.3}
    inner = TorchOptimizer(torch.optim.ASGD, steps=300, lr=0.3, **options)
    result = hypergradient(PLAIN, META, None, inner=inner, method="dense")

    # u = A⁻¹ v,  dg/ds = uᵀ Zᵀy/m
    theta = torch.cat([result.params["w"], result.params["b"][None]])
    u = torch.linalg.solve(Z.T @ Z / M + torch.diag(shared(0.4)), Z_VAL.T @ (Z_VAL @ theta - Y) / M)
    assert relative_error(result.grads["s"], u @ (Z.T @ Y) / M) < 1e-12
    assert result.report.sigma == pytest.approx(0.4)


@pytest.mark.parametrize(
    "method",
    [
        Implicit(CG(max_steps=20, tol=1e-12)),
        Implicit(Dense(), products="finite-differences"),
        Implicit(Dense(), products="forward-over-reverse"),
        Implicit(Dense(), curvature="gauss-newton"),
        Implicit(Dense(), curvature=partial(GGN)),
        Implicit(CG(max_steps=20, tol=1e-12), preconditioner="diagonal"),
    ],
    ids=lambda method: f"{method.curvature}-{method.products}-{method.preconditioner}",
)
def test_every_curvature_and_product_sees_the_decay(method):
    problem = PLAIN if method.products != "double-backward" else composite()
    inner = LOOPS["sgd"](weight_decay=0.4)
    result = hypergradient(problem, META, None, inner=inner, method=method)
    tolerance = 1e-6 if method.products == "finite-differences" else 1e-9
    assert relative_error(result.grads["s"], closed_form(shared(0.4))[0]) < tolerance


def test_decay_and_penalty_add_up():
    problem = composite(Proximal(0.3, center="zero"))
    inner = LOOPS["sgd"](weight_decay=0.1)
    result = hypergradient(problem, META, None, inner=inner, method="cg")
    assert result.report.sigma == pytest.approx(0.4)
    assert relative_error(result.grads["s"], closed_form(shared(0.4))[0]) < 1e-6


@pytest.mark.parametrize("products", ["double-backward", "finite-differences"])
def test_a_learnt_decay_has_its_gradient(products):
    meta = META | {"decay": torch.tensor(0.4, dtype=torch.float64)}
    inner = LOOPS["sgd"](weight_decay=FromMeta("decay"))
    method = Implicit(Dense(), products=products)
    result = hypergradient(PLAIN, meta, None, inner=inner, method=method)
    of_s, of_decay = closed_form(shared(0.4))
    tolerance = 1e-6 if products == "finite-differences" else 1e-9
    assert relative_error(result.grads["s"], of_s) < tolerance
    assert relative_error(result.grads["decay"], of_decay.sum()) < tolerance
    assert result.report.sigma == 0.4


@pytest.mark.parametrize("method", [ValueFunction(strength=1e5), SAMA()], ids=["f2sa", "sama"])
def test_a_number_that_the_loss_reads_may_be_the_decay_as_well(method):
    """f = (w − s)²/2 + s w²/2 has ∂f/∂w∂s = w − 1 = −1/(1 + s) at w* = s/(1 + s)."""
    lr = 0.35
    result = hypergradient(
        scalar_problem(lambda w, meta: 0.5 * (w - meta["s"]).square(), lambda w, meta: w),
        {"s": number(1.5)},
        None,
        inner=TorchOptimizer(SGD, steps=30, lr=lr, weight_decay=FromMeta("s")),
        method=method,
    )
    mixed = 1 / 2.5
    exact = mixed * lr if isinstance(method, SAMA) else mixed / 2.5
    assert result.grads["s"].item() == pytest.approx(exact, rel=1e-4)


def test_decays_of_tensors_and_elements_are_no_multiple_of_the_identity():
    strengths = torch.tensor([0.2, 0.4, 0.6, 0.1], dtype=torch.float64)
    meta = META | {"decay.w": strengths[:3], "decay.b": strengths[3]}
    inner = LOOPS["sgd"](weight_decay=FromMeta("decay"))
    result = hypergradient(PLAIN, meta, None, inner=inner, method="dense")
    of_s, of_decay = closed_form(strengths)
    assert relative_error(result.grads["s"], of_s) < 1e-9
    assert relative_error(result.grads["decay.w"], of_decay[:3]) < 1e-9
    assert relative_error(result.grads["decay.b"], of_decay[3]) < 1e-9
    assert result.report.sigma == 0.0


def test_a_parameter_that_the_loss_does_not_read_is_not_decayed():
    """Torch leaves it alone, so its derivative in the decay is zero, though g reads it."""
    idle = torch.tensor(2.0, dtype=torch.float64)
    problem = BilevelProblem(
        init=lambda meta, data: PLAIN.init(meta, data) | {"idle": idle},
        inner_loss=PLAIN.inner_loss,
        outer_loss=lambda params, meta, data: (
            PLAIN.outer_loss(params, meta, data) + params["idle"].square()
        ),
    )
    meta = META | {"decay": torch.tensor(0.4, dtype=torch.float64)}
    inner = LOOPS["sgd"](weight_decay=FromMeta("decay"))
    result = hypergradient(problem, meta, None, inner=inner, method="dense")
    assert result.params["idle"] == idle
    assert relative_error(result.grads["decay"], closed_form(shared(0.4))[1].sum()) < 1e-9


def test_argmin_sees_the_decay():
    s = META["s"].clone().requires_grad_()
    params = argmin(
        PLAIN.inner_loss,
        PLAIN.init,
        {"s": s},
        None,
        inner=LOOPS["sgd"](weight_decay=0.4),
        method="dense",
    )
    PLAIN.outer_loss(params, {"s": s}, None).backward()
    assert relative_error(s.grad, closed_form(shared(0.4))[0]) < 1e-9
