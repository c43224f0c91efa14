"""Fixed points of inner optimisers: against closed forms, unrolling, and Neumann's series.

The smooth problem is ridge regression, f = ‖Xw − s y‖²/(2m), whose fixed point under SGD with
momentum μ and decoupled decay δ solves (XᵀX/m + (1 − μ) δ I) w = Xᵀ s y/m.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import largest_error, relative_error
from torch import nn

from metaimplicit import (
    CG,
    BilevelProblem,
    Composite,
    FromMeta,
    GradientDescent,
    Implicit,
    MetaLearner,
    Neumann,
    Proximal,
    TorchOptimizer,
    argmin,
    hypergradient,
)
from metaimplicit.inner import (
    SGDW,
    BoxConstraint,
    GroupLasso,
    L1Norm,
    ProximalGradient,
    SimplexConstraint,
)
from metaimplicit.methods import FixedPoint
from metaimplicit.solvers import GMRES, Richardson

M, N = 300, 6
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(M, N, generator=GENERATOR, dtype=torch.float64)
Y = X @ torch.tensor([2.0, -1.5, 0.0, 0.0, 0.8, 0.0]).double()
Y = Y + 0.1 * torch.randn(M, generator=GENERATOR, dtype=torch.float64)
X_VAL = torch.randn(M, N, generator=GENERATOR, dtype=torch.float64)
Y_VAL = torch.randn(M, generator=GENERATOR, dtype=torch.float64)
META = {"s": torch.tensor(1.3, dtype=torch.float64)}
EXACT = FixedPoint(GMRES(max_steps=2 * N, tol=1e-13))

PROBLEM = BilevelProblem(
    init=lambda meta, data: {"w": torch.zeros(N, dtype=torch.float64)},
    inner_loss=lambda params, meta, data: (X @ params["w"] - meta["s"] * Y).square().mean() / 2,
    outer_loss=lambda params, meta, data: (X_VAL @ params["w"] - Y_VAL).square().mean() / 2,
)


def ridge(decay):
    """dg/ds and dg/dδ of the ridge regression with this decay, by autograd through the solve."""
    s = META["s"].clone().requires_grad_()
    decay = torch.as_tensor(decay, dtype=torch.float64).clone().requires_grad_()
    a = X.T @ X / M + decay * torch.eye(N, dtype=torch.float64)
    w = torch.linalg.solve(a, X.T @ (s * Y) / M)
    return torch.autograd.grad((X_VAL @ w - Y_VAL).square().mean() / 2, (s, decay))


def run(inner, method=EXACT, meta=META, problem=PROBLEM):
    return hypergradient(problem, meta, None, inner=inner, method=method)


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.5, True)])
def test_decoupled_decay_with_momentum_is_ridge_with_one_minus_momentum_times_the_decay(
    momentum, nesterov
):
    inner = TorchOptimizer(
        SGDW, steps=40, lr=0.8, momentum=momentum, nesterov=nesterov, decoupled_weight_decay=0.5
    )
    right, _ = ridge((1 - momentum) * 0.5)
    assert relative_error(run(inner).grads["s"], right) < 1e-8
    # The implicit method takes the same penalty from the rule of the optimiser.
    assert relative_error(run(inner, "dense").grads["s"], right) < 1e-8


def test_dampening_scales_the_decay_as_well():
    inner = TorchOptimizer(
        SGDW, steps=40, lr=0.8, momentum=0.6, dampening=0.2, decoupled_weight_decay=0.5
    )
    right, _ = ridge(0.4 / 0.8 * 0.5)
    assert relative_error(run(inner).grads["s"], right) < 1e-8
    assert relative_error(run(inner, "dense").grads["s"], right) < 1e-8


def test_a_learnt_decoupled_decay_has_its_gradient():
    meta = META | {"decay": torch.tensor(0.5, dtype=torch.float64)}
    inner = TorchOptimizer(
        SGDW, steps=40, lr=0.8, momentum=0.5, decoupled_weight_decay=FromMeta("decay")
    )
    result = run(inner, meta=meta)
    of_s, of_decay = ridge(0.25)
    assert relative_error(result.grads["s"], of_s) < 1e-8
    assert relative_error(result.grads["decay"], 0.5 * of_decay) < 1e-8


@pytest.mark.parametrize(
    "inner",
    [
        GradientDescent(steps=25, lr=1.0),
        GradientDescent(steps=40, lr=0.8, momentum=0.2),
        TorchOptimizer(torch.optim.SGD, steps=25, lr=0.9, weight_decay=0.2),
    ],
    ids=["sgd", "momentum", "coupled decay"],
)
def test_it_agrees_with_unrolling_to_convergence(inner):
    result = run(inner)
    assert largest_error(result.grads, run(inner, "unrolled").grads) < 1e-8
    assert result.report.leftover.abs().max() < 1e-10


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_for_gradient_descent_it_is_neumann_on_the_hessian_term_for_term(terms):
    """At any iterate, converged or not."""
    inner = GradientDescent(steps=3, lr=0.2)
    neumann = Implicit(Neumann(terms=terms, scale=0.2), curvature="hessian")
    for solver in (Neumann(terms=terms), Richardson(steps=terms, warm=False)):
        result = run(inner, FixedPoint(solver))
        assert relative_error(result.grads["s"], run(inner, neumann).grads["s"]) < 1e-12


def test_the_spectral_radius_is_that_of_the_step():
    inner = GradientDescent(steps=20, lr=0.9)
    eigenvalues = torch.linalg.eigvalsh(X.T @ X / M)
    radius = (1 - 0.9 * eigenvalues).abs().max()
    report = run(inner, FixedPoint(radius_steps=200)).report
    assert report.spectral_radius.item() == pytest.approx(radius.item(), rel=1e-2)


def test_a_loop_that_diverges_has_a_radius_above_one():
    inner = GradientDescent(steps=3, lr=3.0)
    assert run(inner, EXACT).report.spectral_radius.item() > 1


def lasso(strength, w, groups=None):
    """dg/ds and dg/dλ of the (group) lasso from its support: a smooth equation there."""
    s = META["s"].clone().requires_grad_()
    strength = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    on = w.abs() > 1e-8
    x = X[:, on]

    def gradient(theta, s, strength):
        slope = x.T @ (x @ theta - s * Y) / M
        if groups is None:
            return slope + strength * theta.sign()
        norm = theta.reshape(-1, 2).norm(dim=1, keepdim=True).expand(-1, 2).reshape(-1)
        return slope + strength * theta / norm

    theta = w[on].detach()
    assert gradient(theta, s, strength).abs().max() < 1e-7
    a, b, c = torch.autograd.functional.jacobian(gradient, (theta, s, strength))
    v = X_VAL[:, on].T @ (X_VAL[:, on] @ theta - Y_VAL) / M
    u = torch.linalg.solve(a.T, v)
    return -(u @ b), -(u @ c)


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_lasso_has_the_derivative_of_its_support(accelerated):
    meta = META | {"l1": torch.tensor(0.3, dtype=torch.float64)}
    inner = ProximalGradient(L1Norm(FromMeta("l1")), steps=60, lr=1.0, accelerated=accelerated)
    result = run(inner, meta=meta)
    w = result.params["w"]
    assert 0 < (w == 0).sum() < N
    of_s, of_strength = lasso(0.3, w)
    assert relative_error(result.grads["s"], of_s) < 1e-6
    assert relative_error(result.grads["l1"], of_strength) < 1e-6


def test_the_group_lasso_has_the_derivative_of_its_support():
    meta = META | {"l1": torch.tensor(0.6, dtype=torch.float64)}
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3, 2, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: PROBLEM.inner_loss(
            {"w": params["w"].reshape(-1)}, meta, data
        ),
        outer_loss=lambda params, meta, data: PROBLEM.outer_loss(
            {"w": params["w"].reshape(-1)}, meta, data
        ),
    )
    inner = ProximalGradient(GroupLasso(FromMeta("l1")), steps=40, lr=1.0)
    result = run(inner, meta=meta, problem=problem)
    w = result.params["w"].reshape(-1)
    assert 0 < (w == 0).sum() < N
    of_s, of_strength = lasso(0.6, w, groups=True)
    assert relative_error(result.grads["s"], of_s) < 1e-6
    assert relative_error(result.grads["l1"], of_strength) < 1e-6


def test_a_box_has_the_derivative_of_the_coordinates_that_are_free():
    meta = META | {"upper": torch.tensor(1.0, dtype=torch.float64)}
    inner = ProximalGradient(BoxConstraint(0.0, FromMeta("upper")), steps=40, lr=1.0)
    result = run(inner, meta=meta)
    w = result.params["w"]
    free = (w > 0) & (w < 1)
    at_upper = (w == 1).double()
    assert free.any()
    assert at_upper.any()
    # On the free set A w_F = Xᵀ(s y − X_U upper)/m.
    a = X[:, free].T @ X[:, free] / M
    v = X_VAL.T @ (X_VAL @ w - Y_VAL) / M
    u = torch.linalg.solve(a, v[free])
    of_upper = v @ at_upper - u @ (X[:, free].T @ X @ at_upper) / M
    assert relative_error(result.grads["s"], u @ (X[:, free].T @ Y) / M) < 1e-6
    assert relative_error(result.grads["upper"], of_upper) < 1e-6


def test_a_simplex_has_the_derivative_of_its_face():
    inner = ProximalGradient(SimplexConstraint(5.0), steps=40, lr=1.0)
    result = run(inner)
    w = result.params["w"]
    on = w > 0
    assert w.sum().item() == pytest.approx(5)
    assert 1 < on.sum() < N
    # A w_F + τ1 = s Xᵀy/m and 1ᵀw_F = 5, so dw_F/ds solves the bordered system.
    k = int(on.sum())
    bordered = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    bordered[:k, :k] = X[:, on].T @ X[:, on] / M
    bordered[:k, k] = bordered[k, :k] = 1
    right = torch.cat([X[:, on].T @ Y / M, torch.zeros(1, dtype=torch.float64)])
    slope = torch.linalg.solve(bordered, right)[:k]
    v = X_VAL.T @ (X_VAL @ w - Y_VAL) / M
    assert relative_error(result.grads["s"], v[on] @ slope) < 1e-6


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("method", ["unrolled", "forward"])
def test_proximal_steps_are_differentiable_along_the_path(method, accelerated):
    numbers = {"l1": 0.3, "lr": 0.2}
    meta = META | {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
    inner = ProximalGradient(
        L1Norm(FromMeta("l1")), steps=4, lr=FromMeta("lr"), accelerated=accelerated
    )
    grads = run(inner, method, meta=meta).grads

    def outer_loss(name, change):
        # It is that of either method.
        return run(inner, "unrolled", meta=meta | {name: meta[name] + change}).outer_loss

    for name in meta:
        slope = (outer_loss(name, 1e-6) - outer_loss(name, -1e-6)) / 2e-6
        assert relative_error(grads[name], slope) < 1e-6


def test_truncated_steps_pass_the_initialisation_as_the_identity():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["start"]},
        inner_loss=lambda params, meta, data: (X @ params["w"] - Y).square().mean() / 2,
        outer_loss=PROBLEM.outer_loss,
    )
    meta = {"start": torch.ones(N, dtype=torch.float64)}
    inner = ProximalGradient(L1Norm(0.1), steps=4, lr=0.2)
    result = run(inner, "first-order", meta=meta, problem=problem)
    v = X_VAL.T @ (X_VAL @ result.params["w"] - Y_VAL) / M
    assert relative_error(result.grads["start"], v) < 1e-12


def test_argmin_is_differentiated_at_the_fixed_point():
    s = META["s"].clone().requires_grad_()
    inner = TorchOptimizer(SGDW, steps=40, lr=0.8, momentum=0.5, decoupled_weight_decay=0.5)
    params = argmin(PROBLEM.inner_loss, PROBLEM.init, {"s": s}, None, inner=inner, method=EXACT)
    PROBLEM.outer_loss(params, {"s": s}, None).backward()
    assert relative_error(s.grad, ridge(0.25)[0]) < 1e-8


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_the_learner_takes_it_by_its_flag(vectorize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    labels = torch.arange(6).remainder(2).expand(2, 6)
    episodes = SimpleNamespace(
        support=(torch.randn(2, 6, 3).double(), labels),
        query=(torch.randn(2, 6, 3).double(), labels),
    )
    gradients = []
    inner = GradientDescent(steps=20, lr=0.19)
    for method in (FixedPoint(GMRES(max_steps=40, tol=1e-12)), "unrolled"):
        model.zero_grad()
        learner = MetaLearner(
            model, F.cross_entropy, inner=inner, method=method, proximal=5.0, vectorize=vectorize
        )
        learner.backward(episodes)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert largest_error(*gradients) < 1e-8


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Rprop]
)
def test_adaptive_steps_are_refused_by_name(optimizer):
    with pytest.raises(ValueError, match=rf"{optimizer.__name__} is not differentiable at its"):
        run(TorchOptimizer(optimizer, steps=3, lr=0.1))


def test_solvers_of_symmetric_systems_are_refused():
    with pytest.raises(ValueError, match="CG, which needs a symmetric matrix, expected GMRES"):
        FixedPoint(CG())


def test_implicit_methods_refuse_proximal_steps():
    inner = ProximalGradient(L1Norm(0.1), steps=3)
    with pytest.raises(ValueError, match="no stationary point of the inner loss alone"):
        run(inner, "cg")


def test_an_initialisation_that_the_loss_does_not_read_has_no_gradient():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["start"]},
        inner_loss=PROBLEM.inner_loss,
        outer_loss=PROBLEM.outer_loss,
    )
    meta = META | {"start": torch.zeros(N, dtype=torch.float64)}
    with pytest.raises(ValueError, match="fixed-point cannot give the gradient of meta"):
        run(GradientDescent(steps=3), meta=meta, problem=problem)


def test_a_proximal_term_gives_the_initialisation_its_gradient():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=Composite(
            outputs=lambda params, meta, data: X @ params["w"] - Y,
            loss=lambda z, data: z.square().mean() / 2,
            penalty=Proximal(0.7),
        ),
        outer_loss=PROBLEM.outer_loss,
    )
    meta = {"w": torch.ones(N, dtype=torch.float64)}
    inner = GradientDescent(steps=40, lr=0.65)
    exact = run(inner, "dense", meta=meta, problem=problem)
    assert largest_error(run(inner, meta=meta, problem=problem).grads, exact.grads) < 1e-8
