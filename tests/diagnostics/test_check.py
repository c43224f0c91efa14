"""`check_hypergradient` tells right from wrong, and why."""

from functools import partial

import numpy as np
import pytest
import torch
from oracles import quadratic, randn
from small_problems import number, scalar_problem
from tanh_network import DATA, INITIAL, network
from torch import nn
from torch.nn import functional as F

from metaimplicit import (
    CG,
    LBFGS,
    BilevelProblem,
    GradientDescent,
    Implicit,
    MetaLearner,
    Proximal,
    Stream,
    Unrolled,
    check_hypergradient,
)

SOLVED = GradientDescent(steps=5, lr=0.05, momentum=0.05)
SHORT = GradientDescent(steps=3, lr=0.02)
PROBLEM = network(Proximal(16.0))
check = partial(check_hypergradient, PROBLEM, INITIAL, DATA, batched=True, directions=2)


@pytest.mark.parametrize(
    "inner",
    [pytest.param(SOLVED, id="solved", marks=pytest.mark.slow), pytest.param(SHORT, id="short")],
)
def test_unrolled_is_right(inner):
    result = check(inner=inner, method="unrolled")
    assert result.verdict.startswith("Right")
    assert result.error < 1e-7
    assert result.noise < 1e-5
    assert result.dense_error is result.cosine is result.residual is None
    assert "against finite differences" in str(result)


NOT_SOLVED = "Wrong: the linear system is not solved"
NOT_STATIONARY = "Wrong: the solve is fine, but θ_T is no stationary point"
GAUSS_NEWTON = Implicit(CG(60), curvature="gauss-newton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "inner", "verdict"),
    [
        pytest.param("dense", SOLVED, "Right", id="dense"),
        pytest.param("dense", LBFGS(steps=100), "Right", id="lbfgs"),
        pytest.param(Implicit(CG(1)), SOLVED, NOT_SOLVED, id="one step of cg"),
        pytest.param("dense", SHORT, NOT_STATIONARY, id="short loop"),
        pytest.param(
            GAUSS_NEWTON, SOLVED, "so it is A (gauss-newton, damping 0.0)", id="gauss-newton"
        ),
        pytest.param(
            Implicit(CG(60), damping=0.5),
            SOLVED,
            "so it is A (hessian, damping 0.5)",
            id="damping",
        ),
        pytest.param(
            "first-order",
            SOLVED,
            "as this method leaves out part of it; 'unrolled' is exact",
            id="first-order",
        ),
    ],
)
def test_the_verdict_names_the_reason(method, inner, verdict):
    result = check(inner=inner, method=method, directions=1)
    assert verdict in result.verdict
    assert (result.error < 1e-3) == (verdict == "Right")
    assert str(result).endswith(result.verdict)


def test_a_dense_solve_agrees_with_itself():
    result = check(inner=SHORT, method="dense")
    assert result.dense_error == 0
    assert result.cosine == pytest.approx(1)


def test_negative_curvature_is_named():
    oracle = quadratic([[-0.5, 1.0, 2.0]])
    run = partial(check_hypergradient, oracle.problem, oracle.meta, oracle.data, batched=True)
    with pytest.warns(RuntimeWarning, match="NEGATIVE_CURVATURE"):
        result = run(inner=SHORT, method=Implicit(CG(9)))
    assert result.negative_curvature == 1
    assert result.verdict.startswith("Wrong: the curvature is not positive definite")


def test_differences_in_single_precision_decide_nothing_at_a_small_tolerance():
    result = check_hypergradient(
        PROBLEM,
        {name: p.float() for name, p in INITIAL.items()},
        tuple(x.float() for x in DATA),
        inner=SHORT,
        method="dense",
        batched=True,
        directions=1,
        tolerance=1e-6,
    )
    assert result.verdict.startswith("Undecided: the finite differences are known to")


def test_an_outer_loss_that_draws_random_numbers_is_refused():
    problem = BilevelProblem(
        PROBLEM.init,
        PROBLEM.inner_loss,
        lambda p, m, d: PROBLEM.outer_loss(p, m, d) + torch.rand(()),
    )
    with pytest.raises(ValueError, match="outer loss: got two values in two calls"):
        check_hypergradient(problem, INITIAL, DATA, inner=SHORT, method="unrolled", batched=True)


def test_an_inner_loss_that_draws_random_numbers_is_refused():
    """They are not those of torch, so that only a second call shows it."""
    rng = np.random.default_rng(0)
    problem = BilevelProblem(
        PROBLEM.init,
        lambda p, m, d: PROBLEM.inner_loss(p, m, d) * (1 + 0.1 * rng.random()),
        PROBLEM.outer_loss,
    )
    with pytest.raises(ValueError, match="inner loss: got two values in two calls"):
        check_hypergradient(problem, INITIAL, DATA, inner=SHORT, method="unrolled", batched=True)


@pytest.mark.parametrize("method", ["dense", "unrolled"])
def test_a_hypergradient_that_is_not_finite_is_wrong_and_no_random_number(method):
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: w * m["a"].log())
    with pytest.warns(RuntimeWarning):
        result = check_hypergradient(problem, {"a": number(-1.0)}, None, inner=SHORT, method=method)
    assert result.verdict.startswith("Wrong: it is not finite; lower the inner step size")


def test_differences_that_are_not_finite_decide_nothing():
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: w + m["a"].sqrt())
    meta = {"a": number(1e-12)}  # differences need roots of numbers below zero
    result = check_hypergradient(problem, meta, None, inner=SHORT, method="unrolled")
    assert result.verdict.startswith("Undecided: the finite differences are not finite")


def test_round_off_that_hides_the_differences_decides_nothing():
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: 1e13 + w.square())
    result = check_hypergradient(problem, {"a": number(1.0)}, None, inner=SHORT, method="unrolled")
    assert result.verdict.startswith("Undecided: the finite differences are known to")


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="directions: got 0, expected at least 1"):
        check(inner=SHORT, method="dense", directions=0)
    with pytest.raises(ValueError, match="tolerance: got nan, expected a number ≥ 0"):
        check(inner=SHORT, method="dense", tolerance=float("nan"))


def test_an_outer_loss_of_all_iterates_is_refused():
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: w.sum())
    method = Unrolled(iterates=True)
    with pytest.raises(ValueError, match=r"method: got Unrolled\(iterates=True\)"):
        check_hypergradient(problem, {"a": number(1.0)}, None, inner=SHORT, method=method)


def test_meta_without_a_floating_point_entry_is_refused():
    problem = scalar_problem(lambda w, m: (w - m["n"]).square(), lambda w, m: w.square())
    with pytest.raises(ValueError, match=r"meta: got \['n'\], expected a floating-point entry"):
        check_hypergradient(problem, {"n": torch.tensor(1)}, None, inner=SHORT, method="unrolled")


def ridge_problem(scale=1.0, hidden=False):
    """Ridge regression in φ = log λ, whose losses may hide φ from autograd."""
    x, y = randn(20, 4, seed=1), randn(20, seed=2)
    validation = randn(20, 4, seed=3)

    def inner_loss(params, meta, data):
        log_strength = meta["log_strength"].detach() if hidden else meta["log_strength"]
        error = (x @ params["w"] - y).square().mean()
        return scale * (error + log_strength.exp() * params["w"].square().sum())

    return BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(4, dtype=torch.float64)},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: (validation @ params["w"] - 1).square().mean(),
    )


META = {"log_strength": number(-1.0)}
check_ridge = partial(check_hypergradient, meta=META, data=None, directions=1)


@pytest.mark.parametrize("method", ["dense", "unrolled", "forward"])
def test_a_detach_is_looked_for_where_the_method_is_exact(method):
    """Nothing else reads φ, so that neither loss has a graph to it."""
    inner = GradientDescent(steps=30, lr=0.3)
    result = check_ridge(ridge_problem(hidden=True), inner=inner, method=method)
    assert result.verdict.startswith("Wrong by 1.0e+00, although")
    assert "such as a detach()" in result.verdict


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_a_verdict_does_not_depend_on_the_scale_of_the_inner_loss(scale):
    check = partial(check_ridge, ridge_problem(scale))
    short = check(inner=GradientDescent(steps=5, lr=0.1 / scale), method="dense")
    assert NOT_STATIONARY in short.verdict
    settled = GradientDescent(steps=30, lr=0.3 / scale)
    assert check(inner=settled, method="dense").verdict.startswith("Right")
    damped = check(inner=settled, method=Implicit(CG(20), damping=0.3 * scale))
    assert "so it is A (hessian, damping" in damped.verdict


def test_a_loop_that_took_no_step_is_named_though_nothing_disagrees():
    """Its gradient is within `tol` at once, and with a detach() all slopes are 0."""
    problem = scalar_problem(
        inner=lambda w, meta: 1e-8 * (w - meta["a"].detach()).square() + 0 * meta["a"],
        outer=lambda w, meta: (w - 1).square(),
    )
    result = check_hypergradient(
        problem, {"a": number(3.0)}, None, inner=LBFGS(tol=1e-6), method="dense"
    )
    assert result.slopes.abs().max() == result.error == 0
    assert "Right: it agrees with finite differences. But θ_T is no stationary" in result.verdict


def test_a_wrong_entry_is_seen_beside_one_with_a_much_larger_derivative():
    x, y = randn(8, 3, seed=1), randn(8, seed=2)

    def problem(hidden):
        def inner_loss(params, meta, data):
            decay = meta["decay"].detach() if hidden else meta["decay"]
            return (x @ params["w"] - y).square().mean() + decay * params["w"].square().sum()

        return BilevelProblem(
            init=lambda meta, data: {"w": meta["w"]},
            inner_loss=inner_loss,
            outer_loss=lambda params, meta, data: (x @ params["w"] + y).square().sum(),
        )

    meta = {"w": randn(3, seed=3), "decay": number(1e-4)}
    inner = GradientDescent(steps=1, lr=1e-3)
    check = partial(check_hypergradient, meta=meta, data=None, inner=inner, method="unrolled")
    wrong = check(problem(hidden=True))
    assert wrong.error < 1e-3  # along directions of all of φ
    assert wrong.entries["decay"] == 1
    assert wrong.entries["w"] < 1e-9
    assert wrong.verdict.startswith("Wrong by 1.0e+00 in 'decay', whose derivative is small beside")
    assert check(problem(hidden=False)).verdict.startswith("Right")


@pytest.mark.parametrize("unit", [1.0, 1e-6])
def test_a_slope_where_the_outer_loss_is_flat_is_wrong_in_any_unit(unit):
    class Sign(torch.autograd.Function):
        """With the derivative of the identity."""

        @staticmethod
        def forward(ctx, w):
            return w.sign()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    problem = scalar_problem(
        lambda w, m: (w - m["a"]).square(), lambda w, m: unit * Sign.apply(w).sum()
    )
    result = check_hypergradient(problem, {"a": number(2.0)}, None, inner=SHORT, method="unrolled")
    assert result.error == 1
    assert result.verdict.startswith("Wrong by 1.0e+00, although 'unrolled' is exact")


@pytest.mark.parametrize("method", ["unrolled", "dense"])
def test_a_kink_at_the_meta_parameters_decides_nothing(method):
    """At 0, an example weight that is clamped has two slopes, of which the difference is a mean."""
    problem = scalar_problem(
        lambda w, m: (w - 1).square() + m["a"].clamp(min=0) * (w + 1).square(),
        lambda w, m: w.square(),
    )
    inner = GradientDescent(steps=4, lr=0.5)
    result = check_hypergradient(problem, {"a": number(0.0)}, None, inner=inner, method=method)
    assert result.verdict.startswith("Undecided: the outer loss has a kink at or near these meta")


@pytest.mark.parametrize("padded", range(4))
def test_padding_rows_of_any_batch_of_a_stream_stay_where_they_are(padded):
    words = [torch.tensor([[1, 0 if t == padded else 2], [3, 4]]) for t in range(4)]

    def loss(target):
        def of(params, meta, data):
            rows = F.embedding(data, params["rows"], padding_idx=0)
            return (rows.sum((1, 2)) - target).square().mean()

        return of

    problem = BilevelProblem(lambda meta, data: {"rows": meta["rows"]}, loss(1.0), loss(-1.0))
    result = check_hypergradient(
        problem,
        {"rows": randn(5, 2, seed=0)},
        Stream(lambda t: words[t]),
        inner=SHORT,
        method="unrolled",
    )
    assert result.verdict == "Right: it agrees with finite differences."


def test_biases_without_effect_are_no_errors():
    """In front of batch normalisation, their differences are round-off."""
    norm = partial(nn.BatchNorm1d, 8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(6, 8), norm(), nn.Tanh(), nn.Linear(8, 8), norm(), nn.Tanh())
    labels = (torch.arange(8) % 4).expand(2, 8)
    episodes = ((torch.randn(2, 8, 6), labels), (torch.randn(2, 8, 6), labels))
    check = MetaLearner(model, nn.CrossEntropyLoss()).check(episodes)
    assert check.verdict == "Right: it agrees with finite differences."
    assert check.entries["3.bias"] == 0


def test_a_wrong_entry_is_found_among_others_without_effect():
    problem = scalar_problem(
        lambda w, m: (w - m["a"]).square() + 1e-4 * (m["b"].detach() + 0 * m["unread 0"]) * w,
        lambda w, m: w.square(),
    )
    meta = {"a": number(1.0), "b": number(1.0)} | {f"unread {i}": number(0.0) for i in range(8)}
    result = check_hypergradient(problem, meta, None, inner=SHORT, method="unrolled")
    assert result.verdict.startswith("Wrong by 1.0e+00 in 'b', whose derivative is small beside")


def test_an_entry_moves_alone_by_a_step_of_its_own_size():
    """The step of all of φ, 6e-3 here, is larger than the small entry."""
    moves = []

    def outer_loss(w, m):
        moves.append((m["a"].item(), m["decay"].item()))
        return w.square() + 1e-9 / m["decay"]

    problem = scalar_problem(lambda w, m: (w - m["a"]).square() + m["decay"] * w, outer_loss)
    meta = {"a": number(1000.0), "decay": number(1e-3)}
    result = check_hypergradient(problem, meta, None, inner=SHORT, method="unrolled")
    assert result.verdict == "Right: it agrees with finite differences."
    alone = [abs(decay - 1e-3) for a, decay in moves if a == 1000 and decay != 1e-3]
    assert 0 < max(alone) < 1e-5


def test_a_small_entry_that_damping_makes_wrong_is_said_to_be():
    """The derivative in a is 11, of which damping changes 0.26, and that in b is of θ alone."""
    problem = scalar_problem(
        lambda w, m: (w - m["a"]).square() + 1e-5 * m["b"] * w, lambda w, m: w.square() + 9 * m["a"]
    )
    result = check_hypergradient(
        problem,
        {"a": number(1.0), "b": number(1.0)},
        None,
        inner=GradientDescent(steps=1, lr=0.5),
        method=Implicit(CG(2), damping=0.3),
        tolerance=0.05,
    )
    assert result.error < 0.05
    assert result.verdict.startswith("Wrong by 1.3e-01 in 'b', whose derivative is small beside")
    assert result.verdict.endswith("it may be A (hessian, damping 0.3).")


def test_a_shorter_step_at_which_nothing_moves_is_not_taken():
    """In float32, 1 + 0.01 a does not change within h/100."""
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: 1 + 0.01 * m["a"])
    meta = {"a": number(1.0).float()}
    result = check_hypergradient(problem, meta, None, inner=SHORT, method="unrolled")
    assert result.verdict == "Right: it agrees with finite differences."


def test_a_kink_in_one_entry_hides_no_error_of_another():
    problem = scalar_problem(
        lambda w, m: (w - m["a"]).square(),
        lambda w, m: 1 + m["a"] + (m["a"] - 1 - 1e-8).relu() + 1e-5 * (m["b"] + m["b"].detach()),
    )
    meta = {"a": number(1.0), "b": number(1.0)}
    result = check_hypergradient(problem, meta, None, inner=SHORT, method="unrolled")
    assert result.verdict.startswith("Wrong by 5.0e-01 in 'b'")


def test_a_kink_at_a_third_of_the_step_is_no_error():
    """There, the kink that is extrapolated vanishes."""
    third = torch.finfo(torch.float64).eps ** (1 / 3) / 3
    problem = scalar_problem(
        lambda w, m: (w - m["a"]).square(), lambda w, m: m["a"] + 0.015 * (m["a"] - third).relu()
    )
    meta = {"a": number(0.0)}
    result = check_hypergradient(problem, meta, None, inner=SHORT, method="unrolled")
    assert result.verdict == "Right: it agrees with finite differences."
