"""Single-loop and first-order methods, each in the limit in which its paper calls it exact."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from oracles import largest_error, quadratic, randn, relative_error

from metaimplicit import (
    BilevelProblem,
    GradientDescent,
    Implicit,
    Neumann,
    TorchOptimizer,
    hypergradient,
)
from metaimplicit.iterate import Iterate
from metaimplicit.methods import SAMA, ValueFunction
from metaimplicit.solvers import Richardson, Status

ORACLE = quadratic([[1.0, 1.1, 1.2, 1.3, 1.4], [1.0, 1.05, 1.1, 1.2, 1.3]])
LOOP = GradientDescent(steps=24, lr=0.7)


def run(method, oracle=ORACLE, inner=LOOP, data=None, **options):
    return hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data if data is None else data,
        inner=inner,
        method=method,
        batched=True,
        **options,
    )


def error(method, oracle=ORACLE, **options):
    return largest_error(run(method, oracle, **options).grads, oracle.exact)


# Richardson's iteration: T1–T2, SOBA and AmIGO.


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "calls"), [("soba", 22), ("amigo", 20)])
def test_steps_that_continue_from_call_to_call_converge(flag, calls):
    state = None
    end = None
    errors = []
    for _ in range(calls):
        result = run(flag, state=state, start=end, inner=LOOP.updated(steps=1))
        state = result.report.state
        end = result.end
        errors.append(largest_error(result.grads, ORACLE.exact))
    assert errors[0] > 0.05
    assert errors[-1] < 1e-10
    assert result.report.status.tolist() == [Status.CONVERGED] * 2


@pytest.mark.slow
def test_the_noise_of_minibatches_averages_out_over_the_calls():
    """Two minibatches alternate. They change v by ±noise and leave A as it is.

    The mean of two hypergradients is the exact one, and each of them is nearer to it than the exact
    hypergradient of its own minibatch.
    """
    h, b, t = ORACLE.data
    noise = 3 * randn(*t.shape, seed=9)
    minibatches = [(h, b, t + noise), (h, b, t - noise)]
    at_solution = run("first-order").end
    run_minibatch = partial(run, inner=LOOP.updated(steps=1), start=at_solution)

    state = None
    gradients = []
    for i in range(32):
        method = Implicit(Richardson(scale=0.45))
        result = run_minibatch(method, data=minibatches[i % 2], state=state)
        state = result.report.state
        gradients.append(result.grads["phi"])

    exact = ORACLE.exact["phi"]
    last = gradients[-2:]
    assert relative_error((last[0] + last[1]) / 2, exact) < 1e-8
    for gradient, data in zip(last, minibatches, strict=True):
        of_minibatch = run_minibatch("dense", data=data).grads["phi"]
        assert relative_error(gradient, exact) < relative_error(of_minibatch, exact) / 2


@pytest.mark.parametrize("steps", [1, 3])
def test_from_zero_it_is_the_neumann_series(steps):
    richardson = run(Implicit(Richardson(steps=steps, scale=0.3, warm=False)))
    neumann = run(Implicit(Neumann(terms=steps, scale=0.3)))
    assert largest_error(richardson.grads, neumann.grads) < 1e-13


def test_t1_t2_replaces_the_inverse_curvature_by_the_step_size():
    h, b, t = ORACLE.data
    phi = ORACLE.meta["phi"]
    star = torch.linalg.solve(h, b @ phi)
    expected = phi + 0.3 * torch.einsum("tij,ti->tj", b, star - t).mean(0)
    t1_t2 = Implicit(Richardson(scale=0.3, warm=False))
    assert relative_error(run(t1_t2).grads["phi"], expected) < 1e-12
    assert error(t1_t2) > 0.05


def test_t1_t2_is_exact_where_the_curvature_is_the_inverse_step_size():
    t1_t2 = Implicit(Richardson(scale=0.5, warm=False))
    inner = GradientDescent(steps=1, lr=0.5)
    assert error(t1_t2, quadratic([[2.0] * 5] * 2), inner=inner) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:OneStep ended with BREAKDOWN")  # just after A has grown
def test_the_scale_follows_a_growing_curvature():
    wide = quadratic([[1.0, 1.2, 1.5, 1.8, 2.2], [1.0, 1.1, 1.3, 1.6, 2.0]])
    h, b, t = wide.data
    state = None
    for factor in (1.0, 20.0):
        star = torch.linalg.solve(factor * h, b @ wide.meta["phi"])
        for _ in range(25):
            result = run(
                "soba",
                wide,
                inner=LOOP.updated(steps=1, lr=1e-9),
                data=(factor * h, b, t),
                state=state,
                start=Iterate({"theta": star}),
            )
            state = result.report.state
        assert float(result.report.residual.max()) < 1e-5


def test_a_scale_for_which_it_diverges_is_reported():
    with pytest.warns(RuntimeWarning, match="Richardson ended with BREAKDOWN"):
        result = run(Implicit(Richardson(steps=3, scale=5.0)))
    assert result.report.status.tolist() == [Status.BREAKDOWN] * 2


# SAMA.


def test_sama_with_gradient_descent_is_t1_t2():
    t1_t2 = run(Implicit(Richardson(scale=LOOP.lr, warm=False)))
    assert largest_error(run(SAMA()).grads, t1_t2.grads) < 1e-9


def test_sama_is_exact_where_the_optimiser_inverts_the_curvature():
    alpha = 0.9
    eps = 0.1
    lr = 0.05
    b = randn(5, 3, seed=1)
    t = randn(5, seed=2)
    phi = randn(3, seed=3)
    # At θ*, g = 0. One step leaves α s of the second moment s, and D belongs to the next step.
    second_moment = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    curvature = (alpha * second_moment.sqrt() + eps) / lr

    def inner_loss(params, meta, data):
        theta = params["theta"]
        return 0.5 * (curvature * theta**2).sum() - theta @ b @ meta["phi"]

    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros(5, dtype=torch.float64)},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: 0.5 * (params["theta"] - t).square().sum(),
    )
    star = b @ phi / curvature
    state = {"theta": {"square": second_moment.unsqueeze(0)}}
    run_problem = partial(
        hypergradient,
        problem,
        {"phi": phi},
        None,
        inner=TorchOptimizer(torch.optim.RMSprop, steps=1, lr=lr, alpha=alpha, eps=eps),
        start=Iterate({"theta": star.unsqueeze(0)}, state),
    )
    exact = b.T @ ((star - t) / curvature)
    assert relative_error(run_problem(method="sama").grads["phi"], exact) < 1e-9
    t1_t2 = Implicit(Richardson(scale=lr, warm=False))
    assert relative_error(run_problem(method=t1_t2).grads["phi"], exact) > 0.2


# The value function.


@pytest.mark.slow
def test_the_error_of_the_value_function_is_of_the_order_of_the_inverse_penalty():
    errors = [error(ValueFunction(strength)) for strength in (10, 100, 1000)]
    for larger, smaller in pairwise(errors):
        assert 8 < larger / smaller < 12
    # Extrapolation leaves O(1/λ²).
    far, near = (run(ValueFunction(strength)).grads["phi"] for strength in (1e3, 2e3))
    assert relative_error(2 * near - far, ORACLE.exact["phi"]) < 2e-6


def test_the_value_function_is_the_gradient_of_its_penalty():
    """L(φ) = min_θ g + λ(f − min f), differentiated in closed form at λ = 3."""
    strength = 3.0
    h, b, t = ORACLE.data
    phi = ORACLE.meta["phi"]
    z = torch.linalg.solve(h, b @ phi)
    eye = torch.eye(5, dtype=torch.float64)
    y = torch.linalg.solve(h + eye / strength, b @ phi + t / strength)
    expected = phi + strength * torch.einsum("tij,ti->tj", b, z - y).mean(0)
    assert relative_error(run(ValueFunction(strength)).grads["phi"], expected) < 1e-12


def test_the_value_function_takes_the_direct_gradient_at_y():
    """f = ½(θ − φ)² and g = θφ, so y = φ − φ/λ.

    Then d/dφ min_θ g + λ(f − min f) = y + λ(φ − y) = 2φ − φ/λ.
    """
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros((), dtype=torch.float64)},
        inner_loss=lambda params, meta, data: 0.5 * (params["theta"] - meta["phi"]) ** 2,
        outer_loss=lambda params, meta, data: params["theta"] * meta["phi"],
    )
    phi = torch.tensor(1.5, dtype=torch.float64)
    result = hypergradient(problem, {"phi": phi}, None, inner=LOOP, method=ValueFunction(4.0))
    assert float(result.grads["phi"]) == pytest.approx(2 * 1.5 - 1.5 / 4, rel=1e-12)


@pytest.mark.slow
def test_short_loops_of_the_value_function_continue_with_both_iterates():
    method = ValueFunction(1e3)
    end = None
    for _ in range(7):
        result = run(method, inner=LOOP.updated(steps=3), start=end)
        end = result.end
    assert largest_error(result.grads, run(method).grads) < 1e-8


# First derivatives only.


class OnceDifferentiable(torch.autograd.Function):
    """The identity without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("flag", ["sama", "f2sa"])
def test_no_second_derivative_is_taken(flag):
    plain = ORACLE.problem
    once = BilevelProblem(
        plain.init,
        lambda p, m, d: OnceDifferentiable.apply(plain.inner_loss(p, m, d)),
        plain.outer_loss,
    )
    run_one_task = partial(
        hypergradient,
        meta=ORACLE.meta,
        data=tuple(x[0] for x in ORACLE.data),
        inner=TorchOptimizer(torch.optim.SGD, steps=50, lr=0.4),
        method=flag,
    )
    assert largest_error(run_one_task(once).grads, run_one_task(plain).grads) < 1e-12


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (partial(Richardson, steps=0), "Richardson steps: got 0, expected at least 1"),
        (partial(Richardson, scale=-1.0), "Richardson scale: got -1.0, expected a number > 0"),
        (partial(ValueFunction, 0.0), "ValueFunction strength: got 0.0, expected a number > 0"),
    ],
)
def test_a_bad_argument_is_refused(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()
