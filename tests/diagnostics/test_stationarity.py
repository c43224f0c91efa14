"""What a report and the check say of an inner loop that has not arrived."""

from functools import partial

import pytest
import torch

from metaimplicit import (
    BilevelProblem,
    Dense,
    FromMeta,
    GradientDescent,
    Implicit,
    NewtonCG,
    TorchOptimizer,
    argmin,
    check_hypergradient,
    hypergradient,
)
from metaimplicit.diagnostics.smoothness import has_kink
from metaimplicit.methods import FixedPoint, ValueFunction
from metaimplicit.solvers import CG, GMRES, Status

M, N = 20, 3
X = torch.randn(M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
V = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
META = {"s": torch.tensor(1.3, dtype=torch.float64)}
check_in_s = partial(check_hypergradient, meta=META, data=None, directions=1)


def problem(term=lambda w: 0.0):
    """Least squares with a term more, and a g that is linear, so that first orders are exact."""
    return BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(N, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (
            (X @ params["w"] - meta["s"] * Y).square().mean() / 2 + term(params["w"])
        ),
        outer_loss=lambda params, meta, data: params["w"] @ V + 3.0,
    )


@pytest.mark.parametrize("method", [Implicit(Dense()), FixedPoint(GMRES(max_steps=N, tol=1e-13))])
def test_leftover_is_the_change_of_g_that_the_loop_has_still_to_make(method):
    short = hypergradient(
        problem(), META, None, inner=GradientDescent(steps=4, lr=0.2), method=method
    )
    end = hypergradient(problem(), META, None, inner=NewtonCG(tol=1e-10), method="dense")
    change = end.outer_loss - short.outer_loss
    assert short.report.leftover.item() == pytest.approx(change.item(), rel=1e-9)
    assert end.report.leftover.abs().item() < 1e-9


def test_leftover_is_that_of_each_task():
    data = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    tasks = BilevelProblem(
        init=lambda meta, c: {"w": torch.zeros((), dtype=torch.float64)},
        inner_loss=lambda params, meta, c: (params["w"] - c * meta["s"]).square(),
        outer_loss=lambda params, meta, c: params["w"],
    )
    inner = GradientDescent(steps=1, lr=0.25)
    result = hypergradient(tasks, META, data, inner=inner, method="dense", batched=True)
    assert torch.allclose(result.report.leftover, 1.3 * data - result.params["w"])


@pytest.mark.parametrize(("steps", "status"), [(4, "NOT_STATIONARY"), (400, "CONVERGED")])
def test_a_solve_away_from_a_stationary_point_has_a_status_of_its_own(steps, status):
    inner = GradientDescent(steps=steps, lr=0.2)
    report = hypergradient(problem(), META, None, inner=inner, method="dense").report
    assert Status(int(report.status)).name == status


def test_a_loop_that_decoupled_decay_keeps_from_settling_is_not_stationary():
    inner = TorchOptimizer(torch.optim.AdamW, steps=100, lr=0.06, weight_decay=0.5)
    report = hypergradient(problem(), META, None, inner=inner, method="dense").report
    assert report.share(Status.NOT_STATIONARY) == 1
    settled = TorchOptimizer(torch.optim.Adam, steps=300, lr=0.2, eps=0.5)
    report = hypergradient(problem(), META, None, inner=settled, method="dense").report
    assert report.share(Status.CONVERGED) == 1


def test_a_solve_that_failed_keeps_its_status():
    inner = GradientDescent(steps=2, lr=0.2)
    method = Implicit(CG(max_steps=1))
    report = hypergradient(problem(), META, None, inner=inner, method=method).report
    assert report.share(Status.MAX_STEPS) == 1


def test_argmin_has_no_report_and_warns_of_an_unfinished_solve():
    s = META["s"].clone().requires_grad_()
    params = argmin(
        problem().inner_loss,
        problem().init,
        {"s": s},
        None,
        inner=NewtonCG(tol=1e-10),
        method=Implicit(CG(max_steps=1)),
    )
    with pytest.warns(RuntimeWarning, match="left with a residual of .*; take more solver steps"):
        params["w"].sum().backward()


def test_the_check_names_decoupled_weight_decay():
    inner = TorchOptimizer(torch.optim.AdamW, steps=60, lr=0.1, weight_decay=0.5)
    check = check_in_s(problem(), inner=inner, method="dense")
    assert "the decoupled weight decay of AdamW keeps the loop from settling" in check.verdict


CLIPPED = {"weight_decay": 0.8, "max_grad_norm": 0.1}


def test_the_check_names_clipping_that_moves_the_fixed_point():
    """Clipping scales ∂f/∂θ and not the decay, so that it counts where both are used."""
    inner = TorchOptimizer(torch.optim.SGD, steps=45, lr=0.4, **CLIPPED)
    check = check_in_s(problem(), inner=inner, method="dense")
    assert "max_grad_norm, which does not clip the decay of SGD, keeps the loop" in check.verdict
    fixed = FixedPoint(GMRES(max_steps=N, tol=1e-12))
    assert check_in_s(problem(), inner=inner, method=fixed).error < 1e-6


NADAM = partial(TorchOptimizer, torch.optim.NAdam, lr=0.1)
SGD = partial(TorchOptimizer, torch.optim.SGD, lr=0.1)
DRIFTS = {
    "decay of the first": (NADAM, {"weight_decay": {"w": 0.1, "b": 0.0}}, True),
    "decay of the last": (NADAM, {"weight_decay": {"b": 0.0, "w": 0.1}}, True),
    "decay of some steps": (NADAM, {"weight_decay": [0.1] + 4 * [0.0]}, True),
    "decay from meta": (NADAM, {"weight_decay": FromMeta("wd")}, True),
    "no decay": (NADAM, {"weight_decay": {"w": 0.0, "b": 0.0}}, False),
    "coupled decay": (SGD, {"weight_decay": {"w": 0.1, "*": 0.0}}, False),
    "clipping alone": (SGD, {"max_grad_norm": 1.0}, False),
    "clipping beside decay": (
        SGD,
        {"weight_decay": {"w": 0.1, "*": 0}, "max_grad_norm": 1.0},
        True,
    ),
}


@pytest.mark.parametrize(("optimizer", "options", "drifts"), DRIFTS.values(), ids=DRIFTS)
def test_what_moves_the_fixed_point_of_any_parameter_is_named(optimizer, options, drifts):
    if optimizer is NADAM:
        options = {"decoupled_weight_decay": True, **options}
    assert bool(optimizer(**options).drift) == drifts


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"weight_decay": 0.8, "max_grad_norm": 100.0}, "CONVERGED"),
        (CLIPPED, "NOT_STATIONARY"),
    ],
    ids=["inactive", "active"],
)
@pytest.mark.parametrize("method", ["dense", ValueFunction(strength=1e3)], ids=["dense", "f2sa"])
def test_only_active_clipping_is_flagged(method, options, status):
    inner = TorchOptimizer(torch.optim.SGD, steps=80, lr=0.2, **options)
    report = hypergradient(problem(), META, None, inner=inner, method=method).report
    assert report.drift
    assert Status(int(report.status)).name == status


def test_f2sa_has_the_residual_of_its_difference_quotient():
    """Both losses are quadratic, so that the residual is exact: v − A u with u = λ (z − y)."""
    inner = TorchOptimizer(torch.optim.AdamW, steps=200, lr=0.02, eps=0.5, weight_decay=0.5)
    strength = 50.0
    method = ValueFunction(strength=strength)
    result = hypergradient(problem(), META, None, inner=inner, method=method)
    z, y = result.end.params["w"][0], result.end.companion.params["w"][0]
    residual = V - X.T @ X / M @ (strength * (z - y))
    assert result.report.residual.item() == pytest.approx((residual.norm() / V.norm()).item())
    assert result.report.share(Status.NOT_STATIONARY) == 1
    assert result.report.drift == "the decoupled weight decay of AdamW"


@pytest.mark.parametrize(("steps", "status"), [(3, "NOT_STATIONARY"), (200, "CONVERGED")])
def test_f2sa_says_whether_its_loops_have_settled(steps, status):
    method = ValueFunction(strength=50.0)
    inner = GradientDescent(steps=steps, lr=0.2)
    report = hypergradient(problem(), META, None, inner=inner, method=method).report
    assert Status(int(report.status)).name == status
    assert (report.residual.item() < 1e-2) is (status == "CONVERGED")


def hinge(w):
    return (1 - w).clamp(min=0).sum()


@pytest.mark.parametrize(
    "term",
    [
        lambda w: w.abs().sum(),
        lambda w: hinge(1 - 2 * (0.1 - w)) + hinge(1 + 2 * (0.1 - w)),
        lambda w: (w - 0.1).abs().max(),
        lambda w: 2 * torch.nn.functional.relu(w + 0.2).sum(),
        lambda w: 2 * torch.nn.functional.l1_loss(w, torch.full_like(w, 0.1)),
        lambda w: 2 * torch.maximum(0.2 * (w - 0.1), 0.8 * (0.1 - w)).sum(),
        lambda w: 2 * torch.linalg.vector_norm(w - 0.3, ord=1),
        lambda w: (
            torch.nn.functional.margin_ranking_loss(
                w, torch.zeros_like(w), torch.ones_like(w), margin=0.5
            )
            * 6
        ),
    ],
    ids=["l1", "hinge", "max", "relu", "l1_loss", "pinball", "l1 norm", "margin"],
)
def test_the_check_names_a_kink_of_the_inner_loss(term):
    inner = GradientDescent(steps=20, lr=0.2)
    check = check_in_s(problem(term), inner=inner, method="dense")
    assert check.inner_gradient_norm > 1e-2
    assert "the inner loss has a kink there" in check.verdict
    assert "ProximalGradient" in check.verdict


@pytest.mark.parametrize(
    "term",
    [
        lambda w: w.pow(4).sum(),
        lambda w: torch.nn.functional.softplus(5 * w).sum(),
        lambda w: torch.nn.functional.huber_loss(w, torch.zeros_like(w)),
        lambda w: 0.1 * w.exp().sum(),
        lambda w: 1e3 * w.square().sum(),
    ],
    ids=["quartic", "softplus", "huber", "exp", "stiff"],
)
def test_a_smooth_loss_has_no_kink(term):
    def loss(params):
        return torch.stack([problem(term).inner_loss({"w": w}, META, None) for w in params["w"]])

    torch.manual_seed(0)
    for scale in (0.01, 1.0, 10.0):
        assert not has_kink(loss, {"w": scale * torch.randn(5, N, dtype=torch.float64)})


def test_a_smooth_loss_has_no_kink_next_to_its_minimum():
    """There ∂f/∂θ is so small that it changes by all its size on any ray."""

    def loss(params):
        return 1e4 * (params["w"] - 1).square().sum(1)

    for distance in (1e-4, 1e-6, 1e-8):
        w = torch.full((1, N), 1 + distance, dtype=torch.float64)
        assert not has_kink(loss, {"w": w})
