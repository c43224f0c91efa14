"""Single-loop and first-order methods: each against the exact hypergradient in the limit that its paper states."""

from itertools import pairwise

import pytest
import torch
from oracles import quadratic, randn, relative_error

from metaimplicit import (
    SAMA,
    BilevelProblem,
    GradientDescent,
    Implicit,
    Iterate,
    Neumann,
    Richardson,
    Status,
    Stream,
    TorchOptimizer,
    ValueFunction,
    argmin,
    hypergradient,
)

SPECTRA = [[0.5, 1.0, 1.5, 2.0, 3.0], [0.4, 0.7, 1.1, 1.3, 2.5]]
ORACLE = quadratic(SPECTRA)
LOOP = GradientDescent(steps=150, lr=0.55)
SOLVED = hypergradient(
    ORACLE.problem, ORACLE.meta, ORACLE.data, inner=LOOP, method="first-order", batched=True
).end  # θ*


def run(method, oracle=ORACLE, inner=LOOP, **options):
    return hypergradient(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=inner,
        method=method,
        batched=True,
        **options,
    )


def error(method, oracle=ORACLE, **options):
    return relative_error(run(method, oracle, **options).grads["phi"], oracle.exact["phi"])


@pytest.mark.parametrize(("flag", "calls"), [("soba", 200), ("amigo", 40)])
def test_warm_steps_on_the_linear_system_converge(flag, calls):
    state, end, errors = None, None, []
    for _ in range(calls):
        found = run(flag, state=state, start=end, inner=LOOP.updated(steps=4))
        state, end = found.report.state, found.end
        errors.append(relative_error(found.grads["phi"], ORACLE.exact["phi"]))
    assert errors[0] > 0.05
    assert errors[-1] < 1e-10
    assert found.report.status.tolist() == [Status.CONVERGED] * 2


def test_noise_averages_out_along_the_calls():
    """Minibatches of the linear term leave A as it is and scatter b by turns: the mean of two is the exact one."""
    h, b, t = ORACLE.data
    state, found, wrong = None, [], []
    shift = 3 * randn(*t.shape, seed=9)
    for i in range(300):
        data, short = (h, b, t + shift * (-1) ** i), LOOP.updated(steps=1)
        options = {"inner": short, "batched": True, "start": SOLVED}
        method = Implicit(Richardson(scale=0.2))
        result = hypergradient(
            ORACLE.problem, ORACLE.meta, data, method=method, state=state, **options
        )
        state = result.report.state
        if i >= 298:
            found.append(result.grads["phi"])
            exact = hypergradient(
                ORACLE.problem, ORACLE.meta, data, method="dense", **options
            ).grads["phi"]
            wrong.append(relative_error(exact, ORACLE.exact["phi"]))
    assert relative_error((found[0] + found[1]) / 2, ORACLE.exact["phi"]) < 1e-8
    for got, noise in zip(
        found, wrong, strict=True
    ):  # and each is nearer than a solve of its own minibatch
        assert relative_error(got, ORACLE.exact["phi"]) < noise / 2


@pytest.mark.parametrize("steps", [1, 3])
def test_from_zero_it_is_the_polynomial_of_neumann(steps):
    a = run(Implicit(Richardson(steps=steps, scale=0.3, warm=False))).grads["phi"]
    b = run(Implicit(Neumann(terms=steps, scale=0.3))).grads["phi"]
    assert relative_error(a, b) < 1e-13


def test_t1_t2_takes_the_curvature_for_the_identity():
    found = run(Implicit(Richardson(scale=0.3, warm=False)))
    h, b, t = ORACLE.data
    star = torch.linalg.solve(h, b @ ORACLE.meta["phi"])
    expected = ORACLE.meta["phi"] + 0.3 * torch.einsum("tij,ti->tj", b, star - t).mean(0)
    assert relative_error(found.grads["phi"], expected) < 1e-12
    assert error(Implicit(Richardson(scale=0.3, warm=False))) > 0.05
    assert error(Implicit(Richardson(scale=0.5, warm=False)), quadratic([[2.0] * 5] * 2)) < 1e-12


@pytest.mark.filterwarnings(
    "ignore:Richardson ended with BREAKDOWN"
)  # once, where A has just grown
def test_the_scale_follows_the_curvature():
    state, phi = None, ORACLE.meta["phi"]
    for factor in (1.0, 20.0):
        h, b, t = factor * ORACLE.data[0], *ORACLE.data[1:]
        for _ in range(120):
            star = Iterate({"theta": torch.linalg.solve(h, b @ phi)})
            found = hypergradient(
                ORACLE.problem, ORACLE.meta, (h, b, t), inner=LOOP.updated(steps=1, lr=1e-9), method="soba",
                batched=True, state=state, start=star,
            )  # fmt: skip
            state = found.report.state
        assert float(found.report.residual.max()) < 1e-5


def test_a_step_too_long_is_told():
    with pytest.warns(RuntimeWarning, match="Richardson ended with BREAKDOWN"):
        found = run(Implicit(Richardson(steps=3, scale=5.0)))
    assert found.report.status.tolist() == [Status.BREAKDOWN] * 2


def test_sama_with_gradient_descent_is_t1_t2():
    t1t2 = run(Implicit(Richardson(scale=LOOP.lr, warm=False))).grads["phi"]
    assert relative_error(run(SAMA()).grads["phi"], t1t2) < 1e-9


def test_sama_is_exact_where_the_optimiser_inverts_the_curvature():
    alpha, eps, lr, n, d = 0.9, 0.1, 0.05, 5, 3
    second = torch.linspace(0.1, 2, n, dtype=torch.float64)
    # one step at g = 0 leaves α s, and D is of the step after it
    curvature = (alpha * second.sqrt() + eps) / lr
    b, t = randn(n, d, seed=1), randn(n, seed=2)
    phi = randn(d, seed=3)
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros(n, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (
            0.5 * (curvature * params["theta"] ** 2).sum() - params["theta"] @ b @ meta["phi"]
        ),
        outer_loss=lambda params, meta, data: 0.5 * (params["theta"] - t).square().sum(),
    )
    star = b @ phi / curvature
    start = Iterate({"theta": star.unsqueeze(0)}, {"theta": {"square": second.unsqueeze(0)}})
    inner = TorchOptimizer(torch.optim.RMSprop, steps=1, lr=lr, alpha=alpha, eps=eps)
    found = hypergradient(problem, {"phi": phi}, None, inner=inner, method="sama", start=start)
    assert relative_error(found.grads["phi"], b.T @ ((star - t) / curvature)) < 1e-9
    one_step = Implicit(Richardson(scale=lr, warm=False))
    plain = hypergradient(problem, {"phi": phi}, None, inner=inner, method=one_step, start=start)
    assert relative_error(plain.grads["phi"], b.T @ ((star - t) / curvature)) > 0.2


def test_the_value_function_is_exact_as_its_penalty_grows():
    errors = [error(ValueFunction(strength)) for strength in (10, 100, 1000)]
    for wide, narrow in pairwise(errors):  # O(1/λ)
        assert 8 < wide / narrow < 12
    far, near = (run(ValueFunction(s)).grads["phi"] for s in (1e3, 2e3))
    assert relative_error(2 * near - far, ORACLE.exact["phi"]) < 2e-6  # O(1/λ²)


def test_the_value_function_is_the_gradient_of_its_penalty():
    """L(φ) = min_θ g + λ(f − min f), differentiated in closed form at λ = 3."""
    strength, (h, b, t), phi = 3.0, ORACLE.data, ORACLE.meta["phi"]
    z = torch.linalg.solve(h, b @ phi)
    eye = torch.eye(5, dtype=torch.float64)
    y = torch.linalg.solve(h + eye / strength, b @ phi + t / strength)
    expected = phi + strength * torch.einsum("tij,ti->tj", b, z - y).mean(0)
    assert relative_error(run(ValueFunction(strength)).grads["phi"], expected) < 1e-12


def test_the_value_function_takes_the_direct_gradient_at_its_own_point():
    """f = ½(θ − φ)², g = θφ: y = φ − φ/λ, and d/dφ min_θ g + λ(f − min f) = y + λ(φ − y) = 2φ − φ/λ."""
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros((), dtype=torch.float64)},
        inner_loss=lambda params, meta, data: 0.5 * (params["theta"] - meta["phi"]) ** 2,
        outer_loss=lambda params, meta, data: params["theta"] * meta["phi"],
    )
    phi = torch.tensor(1.5, dtype=torch.float64)
    found = hypergradient(problem, {"phi": phi}, None, inner=LOOP, method=ValueFunction(4.0))
    assert float(found.grads["phi"]) == pytest.approx(2 * 1.5 - 1.5 / 4, rel=1e-12)


def test_the_value_function_goes_on_with_both_iterates():
    short, end = LOOP.updated(steps=3), None
    for _ in range(60):
        found = run(ValueFunction(1e3), inner=short, start=end)
        end = found.end
    far = run(ValueFunction(1e3)).grads["phi"]
    assert relative_error(found.grads["phi"], far) < 1e-8


@pytest.mark.parametrize("flag", ["sama", "f2sa"])
def test_no_second_derivative_is_taken(flag):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    h, b, t = (x[0] for x in ORACLE.data)
    plain = BilevelProblem(
        *(getattr(ORACLE.problem, n) for n in ("init", "inner_loss", "outer_loss"))
    )
    cut = BilevelProblem(
        plain.init, lambda p, m, d: Once.apply(plain.inner_loss(p, m, d)), plain.outer_loss
    )
    inner = TorchOptimizer(torch.optim.SGD, steps=50, lr=0.4)
    values = [
        hypergradient(problem, ORACLE.meta, (h, b, t), inner=inner, method=flag).grads["phi"]
        for problem in (plain, cut)
    ]
    assert relative_error(values[1], values[0]) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Richardson(steps=0), "Richardson steps: got 0, expected at least 1"),
        (lambda: Richardson(scale=-1.0), "Richardson scale: got -1.0, expected a number > 0"),
        (lambda: ValueFunction(0.0), "ValueFunction strength: got 0.0, expected a number > 0"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", [SAMA(), ValueFunction()], ids=["sama", "f2sa"])
def test_what_they_cannot_do_is_refused(method):
    with pytest.raises(ValueError, match="batch: got none with a Stream"):
        hypergradient(
            ORACLE.problem,
            ORACLE.meta,
            Stream(lambda t: ORACLE.data),
            inner=LOOP,
            method=method,
            batched=True,
        )
    if method.flag == "f2sa":
        with pytest.raises(
            ValueError, match="got 'f2sa', which is no derivative without its outer loss"
        ):
            argmin(
                ORACLE.problem.inner_loss,
                ORACLE.problem.init,
                ORACLE.meta,
                ORACLE.data,
                inner=LOOP,
                method=method,
            )
