"""Newton's steps by truncated conjugate gradients against dense algebra and a loop written out for one task."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command_line import RunOptions, build_learner
from oracles import Matrix, randn, relative_error, ridge, symmetric
from torch import nn

from metaimplicit import (
    BilevelProblem,
    GradientDescent,
    MetaLearner,
    NewtonCG,
    Unrolled,
    argmin,
    hypergradient,
)
from metaimplicit.inner.trust_region import steihaug

DOUBLE = torch.float64
SPECTRA = [[0.5, 1, 2, 3, 4], [1, 1, 2, 2, 8], [0.1, 0.2, 0.4, 0.8, 1.6]]
INDEFINITE = [[-2, -1, 1, 3, 4], [1, 2, 3, 4, 5], [-0.1, 0.5, 1, 2, 30]]
TASKS, N, M = 3, 5, 12
B, START = randn(TASKS, N, seed=1), {"a": randn(TASKS, 2, seed=2), "b": randn(TASKS, 1, 3, seed=3)}
ONES = torch.ones(TASKS, 1, dtype=DOUBLE)
ALL = torch.ones(TASKS, 1, dtype=torch.bool)


def joined(params):
    return torch.cat([params["a"], params["b"].flatten(1)], dim=1)


def quadratic(h, b=B):
    def loss(params, _=0):
        theta = joined(params)
        return 0.5 * torch.einsum("ti,tij,tj->t", theta, h, theta) - (theta * b).sum(1)

    return loss


def logistic(seed=0, decay=0.1, offset=0.0):
    x, y = randn(TASKS, M, N, seed=seed), (randn(TASKS, M, seed=seed + 1) > 0).double()

    def loss(params, _=0):
        z = torch.einsum("tmn,tn->tm", x, joined(params))
        return (
            (F.softplus(z) - y * z).mean(1) + 0.5 * decay * joined(params).square().sum(1) + offset
        )

    return loss


def wavy(tasks=slice(None)):
    """Neither convex nor alike in any two tasks: steps are cut, refused and lengthened, each at its own time."""
    h, b, width = (
        symmetric(INDEFINITE)[tasks],
        B[tasks],
        torch.tensor([1.0, 3.0, 0.5], dtype=DOUBLE)[tasks],
    )

    def loss(params, _=0):
        theta = joined(params)
        bumps = (theta * width[:, None]).sin().square().sum(1) + 0.02 * theta.pow(4).sum(1)
        return 0.5 * torch.einsum("ti,tij,tj->t", theta, h, theta) - (theta * b).sum(1) + 2 * bumps

    return loss


def one(loss, i):
    """Task i's loss as a function of its flat vector, through the batch with the others at zero."""

    def alone(vector):
        theta = torch.zeros(TASKS, N, dtype=DOUBLE).index_put((torch.tensor([i]),), vector)
        return loss({"a": theta[:, :2], "b": theta[:, 2:].unsqueeze(1)})[i]

    return alone


def boundary(s, d, radius):
    """The positive root of ‖s + τd‖² = Δ² by the eigenvalues of the companion matrix."""
    a, b, c = float(d @ d), float(2 * s @ d), float(s @ s - radius**2)
    companion = torch.tensor([[0.0, -c / a], [1.0, -b / a]], dtype=DOUBLE)
    return float(torch.linalg.eigvals(companion).real.max())


def steihaug_by_hand(g, h, radius, tol, steps):
    """Nocedal & Wright (2006), Algorithm 7.2, for one task; the step, and whether it is at the boundary."""
    z, r, d = torch.zeros_like(g), g.clone(), -g
    for _ in range(steps):
        if float(d @ h @ d) <= 0:
            return z + boundary(z, d, radius) * d, True
        alpha = float(r @ r) / float(d @ h @ d)
        if float((z + alpha * d).norm()) >= radius:
            return z + boundary(z, d, radius) * d, True
        z, before, r = z + alpha * d, r, r + alpha * h @ d
        if float(r.norm()) <= tol:
            break
        d = -r + float(r @ r) / float(before @ before) * d
    return z, False


def trust_region_by_hand(f, theta, *, steps, cg_steps, radius, forcing=None, tol=1e-6):
    """Nocedal & Wright (2006), Algorithm 4.1 for one task: its iterates, radii and which of the steps were taken."""
    path, radii, taken = [theta], [radius], []
    for _ in range(steps):
        g = torch.func.grad(f)(theta)
        if float(g.norm()) <= tol:
            break
        h = torch.func.hessian(f)(theta)
        eta = min(0.5, float(g.norm()) ** 0.5) if forcing is None else forcing
        s, edge = steihaug_by_hand(g, h, radius, eta * float(g.norm()), cg_steps)
        ratio = float((f(theta) - f(theta + s)) / -(g @ s + 0.5 * s @ h @ s))
        if ratio > 1e-4:
            theta = theta + s
        if ratio < 0.25:
            radius = float(s.norm()) / 4
        elif ratio > 0.75 and edge:
            radius = 2 * radius
        path.append(theta)
        radii.append(radius)
        taken.append(ratio > 1e-4)
    return path, radii, taken


def gradient_norm(loss, params):
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(leaves).sum(), list(leaves.values()))
    return torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)


# one subproblem


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("spectra", [SPECTRA, INDEFINITE])
@pytest.mark.parametrize("scale", [0.05, 0.6, 2.0, 50.0])
@pytest.mark.parametrize("tol", [1e-12, 0.8])
def test_the_subproblem_is_steihaugs(spectra, scale, steps, tol):
    h, radius = symmetric(spectra), scale * torch.tensor([[1.0], [0.3], [2.0]], dtype=DOUBLE)
    s, decrease, bound = steihaug(Matrix(h), B, radius, tol * ONES, ALL, steps)
    for i in range(TASKS):
        expected, edge = steihaug_by_hand(B[i], h[i], float(radius[i]), tol, steps)
        assert relative_error(s[i], expected) < 1e-11
        model = -(B[i] @ expected + 0.5 * expected @ h[i] @ expected)
        assert abs(float(decrease[i] - model)) < 1e-11 * float(model)
        assert float(model) > 0
        assert bool(bound[i]) == edge
        if edge:
            assert abs(float(s[i].norm() / radius[i]) - 1) < 1e-13


def test_where_the_answer_is_known():
    """One step is Cauchy's point; n steps in a wide region are Newton's; negative curvature leads to the boundary."""
    h, tiny = symmetric(SPECTRA), 1e-3 * ONES
    assert (
        relative_error(
            steihaug(Matrix(h), B, tiny, 0 * ONES, ALL, 1)[0], -tiny * F.normalize(B, dim=1)
        )
        < 1e-14
    )
    newton = steihaug(Matrix(h), B, 1e3 * ONES, 0 * ONES, ALL, N)[0]
    assert relative_error(newton, -torch.linalg.solve(h, B)) < 1e-10
    operator = Matrix(-h)
    bent, decrease, bound = steihaug(operator, B, 7 * ONES, 0 * ONES, ALL, N)
    assert operator.products == 1
    assert relative_error(bent, -7 * F.normalize(B, dim=1)) < 1e-14
    assert bool(bound.all())
    g, s = B, bent
    assert (
        relative_error(
            decrease[:, 0], -(g * s).sum(1) + 0.5 * torch.einsum("ti,tij,tj->t", s, h, s)
        )
        < 1e-13
    )


def test_an_idle_task_stays_and_products_end_with_the_last_task():
    operator = Matrix(symmetric([[2.0] * N, [2.0] * N, [1, 2, 3, 4, 5]]))
    s = steihaug(operator, B, 1e3 * ONES, 1e-10 * ONES, torch.tensor([[True], [True], [False]]), N)[
        0
    ]
    assert operator.products == 1
    assert relative_error(s[:2], -B[:2] / 2) < 1e-15
    assert torch.equal(s[2], torch.zeros(N, dtype=DOUBLE))


def test_products_past_convergence_do_no_harm():
    """A residual of round-off meets negative curvature sooner or later."""
    h = symmetric(SPECTRA)
    s, _, bound = steihaug(Matrix(h), B, 1e3 * ONES, 0 * ONES, ALL, 100)
    assert relative_error(s, -torch.linalg.solve(h, B)) < 1e-12
    assert not bound.any()


# the loop


def test_one_step_solves_a_quadratic():
    h = symmetric(SPECTRA)
    end = NewtonCG(steps=1, cg_steps=N, radius=1e3, forcing=0.0).run(
        quadratic(h), START, {}, track=0
    )
    exact = torch.linalg.solve(h, B)
    for i in range(TASKS):
        assert relative_error(joined(end.params)[i], exact[i]) < 1e-10
    assert {name: p.shape for name, p in end.params.items()} == {
        name: p.shape for name, p in START.items()
    }
    assert end.steps.tolist() == [1] * TASKS
    assert end.gradient_norm.max() < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 1.0, "cg_steps": 5},
        {"radius": 10.0, "cg_steps": 3, "forcing": 0.3},
        {"radius": 0.02, "cg_steps": 2, "forcing": 0.0, "tol": 1e-1},
    ],
)
def test_the_loop_is_that_of_each_task_alone(options):
    """Iterates, radii by what they do to the next step, and stops are those of the algorithm written out."""
    seen = set()
    found = NewtonCG(steps=12, **options).run(wavy(), START, {}, track=0, keep=True)
    for i in range(TASKS):
        path, radii, taken = trust_region_by_hand(
            one(wavy(), i), joined(START)[i], steps=12, **options
        )
        seen |= {(a < b, a > b, ok) for a, b, ok in zip(radii[1:], radii, taken, strict=False)}
        assert int(found.steps[i]) == len(path) - 1
        for t, iterate in enumerate(found.iterates):
            assert relative_error(joined(iterate)[i], path[min(t, len(path) - 1)]) < 1e-8
        alone = NewtonCG(steps=12, **options).run(
            wavy(slice(i, i + 1)), {name: p[i : i + 1] for name, p in START.items()}, {}, track=0
        )
        assert relative_error(joined(alone.params)[0], joined(found.params)[i]) < 1e-12
        assert abs(float(alone.gradient_norm - found.gradient_norm[i])) < 1e-12 * max(
            1.0, float(alone.gradient_norm)
        )
    assert torch.equal(joined(found.iterates[0]), joined(START))
    assert relative_error(found.gradient_norm, gradient_norm(wavy(), found.params)) < 1e-12
    assert {(False, True, True), (False, False, True)} <= seen  # lengthened, kept
    if options["radius"] == 10.0:
        assert (True, False, False) in seen  # refused


def test_convergence_is_newtons_and_quadratic():
    loss, near, calls = logistic(), {name: 0.1 * p for name, p in START.items()}, []

    def counted(params, t):
        calls.append(t)
        return loss(params)

    inner = NewtonCG(steps=7, cg_steps=50, radius=1e3, forcing=0.0, tol=1e-11)
    found = inner.run(counted, near, {}, track=0, keep=True)
    assert calls == [0] * (
        int(found.steps.max()) + 1
    )  # where no task refuses, a trial is the next expansion
    for i in range(TASKS):
        f, theta, norms = one(loss, i), joined(near)[i], []
        for iterate in found.iterates:
            g = torch.func.grad(f)(theta)
            norms.append(float(g.norm()))
            assert float((joined(iterate)[i] - theta).norm()) < 1e-9
            theta = theta - torch.linalg.solve(torch.func.hessian(f)(theta), g)
        # ‖g_{k+1}‖ ≤ L/2 ‖s‖² with ‖s‖ ≤ ‖g_k‖/0.1 and L, the third derivative's bound, mean ‖x‖³ max |σ''|
        x = randn(TASKS, M, N, seed=0)[i]
        bound = 0.5 * float(x.norm(dim=1).pow(3).mean()) * 0.0963 / 0.1**2
        assert all(after <= bound * before**2 + 1e-15 for before, after in pairwise(norms))
        assert norms[-1] < 1e-11
    assert found.gradient_norm.max() < 1e-11


def test_losses_equal_to_round_off_do_not_stop_it():
    """Beside 10⁸ a loss cannot tell points apart whose gradients are below 10⁻⁴."""
    end = NewtonCG(steps=8, cg_steps=20, radius=1e3, tol=1e-10).run(
        logistic(offset=1e8), START, {}, track=0
    )
    assert end.gradient_norm.max() < 1e-10


def test_a_refused_step_moves_nothing_and_the_next_is_a_quarter_as_long():
    """Newton's step on √(1 + x²) from x = 2 is to −8, uphill; from 0.5 it is to −0.125."""
    start = {"x": torch.tensor([[2.0], [0.5]], dtype=DOUBLE)}
    calls = []

    def loss(params, t):
        calls.append(t)
        return (1 + params["x"].square()).sqrt().sum(1)

    first = NewtonCG(steps=1, radius=100.0).run(loss, start, {}, track=0)
    assert first.params["x"][0].item() == 2.0
    assert abs(first.params["x"][1].item() + 0.125) < 1e-14
    assert abs(first.gradient_norm[0].item() - 2 / 5**0.5) < 1e-15
    assert calls == [0, 0]
    second = NewtonCG(steps=2, radius=100.0).run(loss, start, {}, track=0)
    assert abs(second.params["x"][0].item() - (2 - 10 / 4)) < 1e-14
    assert len(calls) == 2 + 4  # one more expansion where a task refused
    assert second.steps.tolist() == [2, 2]


def test_a_task_at_its_tolerance_or_not_finite_stays_to_the_bit():
    h = symmetric(SPECTRA)
    start = {name: p.clone() for name, p in START.items()}
    exact = torch.linalg.solve(h, B)[0]
    start["a"][0], start["b"][0, 0], start["a"][1, 0] = exact[:2], exact[2:], torch.nan
    end = NewtonCG(steps=2, cg_steps=N, radius=1e3, forcing=0.0).run(
        quadratic(h), start, {}, track=0
    )
    assert end.steps.tolist() == [0, 0, 1]
    for name, p in start.items():
        assert torch.equal(end.params[name][0], p[0])
        assert torch.equal(end.params[name][1].isnan(), p[1].isnan())
    assert end.gradient_norm[1].isnan()
    assert relative_error(joined(end.params)[2], torch.linalg.solve(h, B)[2]) < 1e-8


def test_a_loss_that_is_not_finite_at_the_trial_refuses_it():
    def loss(params, _):  # −log x, whose steps from 1.5 end below 0
        x = params["x"].squeeze(1)
        return 5 * x - x.log()

    start = {"x": torch.tensor([[1.5], [0.25]], dtype=DOUBLE)}
    end = NewtonCG(steps=20, radius=5.0).run(loss, start, {}, track=0)
    assert relative_error(end.params["x"][:, 0], torch.full((2,), 0.2, dtype=DOUBLE)) < 1e-7


def point(*rows):
    return {"x": torch.tensor(rows, dtype=DOUBLE)}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("radius", [torch.inf, 1e300, 1e20])
def test_a_radius_without_bound_bounds_nothing(radius, dtype):
    start = {"x": torch.tensor([[3.0, 4.0]], dtype=dtype)}
    end = NewtonCG(steps=10, radius=radius).run(
        lambda p, _: (p["x"] - 1).square().sum(1), start, {}, track=0
    )
    assert end.params["x"].tolist() == [[1.0, 1.0]]


def test_where_there_is_no_second_derivative_the_model_is_linear():
    """‖x‖ has a gradient at 0 by convention, and a Hessian of NaN: the first step is Δ along −g."""
    loop = NewtonCG(steps=1, radius=0.5)
    first = loop.run(
        lambda p, _: (p["x"] - 1).square().sum(1) + 0.1 * p["x"].norm(dim=1),
        point([0.0, 0.0]),
        {},
        track=0,
    )
    assert torch.allclose(
        first.params["x"], torch.full((1, 2), 0.5 / 2**0.5, dtype=DOUBLE), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (lambda p, _: p["x"].abs().sqrt().sum(1), [1.0]),  # at 0 finite, but not its derivative
        (lambda p, _: p["x"].square().sum(1).log(), [1.0, 0.0]),  # at 0 it is −∞
    ],
)
def test_a_point_from_which_there_is_no_way_on_is_refused(loss, start):
    end = NewtonCG(steps=3, radius=1.0).run(loss, point(start), {}, track=0)
    assert end.gradient_norm.isfinite().all()
    assert end.steps.tolist() == [3]
    assert end.params["x"].abs().sum() > 0


def test_the_ratio_is_blurred_by_ten_units_of_the_loss_and_no_more():
    """f = 10⁸ − c sin(πx)/π with c = 10ε 10⁸: from 0 the step is to 1, where f falls by nothing; from there back."""
    c = 10 * torch.finfo(DOUBLE).eps * 1e8
    loop = NewtonCG(steps=2, radius=1.0, tol=1e-12)
    end = loop.run(
        lambda p, _: 1e8 - c * (torch.pi * p["x"]).sin().sum(1) / torch.pi,
        point([0.0]),
        {},
        track=0,
        keep=True,
    )
    assert [round(at["x"].item(), 12) for at in end.iterates] == [0.0, 1.0, 0.0]


def test_without_a_tolerance_it_goes_on_to_round_off():
    b = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    loop = NewtonCG(steps=30, tol=None)
    with torch.no_grad():  # of the caller
        end = loop.run(
            lambda p, _: (p["x"].cosh() - b * p["x"]).sum(1), point([3.0, 4.0]), {}, track=0
        )
    assert end.gradient_norm.item() < 1e-12
    assert relative_error(end.params["x"][0], b.asinh()) < 1e-14


def test_at_its_tolerance_a_task_is_done():
    """‖∂f/∂θ‖ = 5 ≤ 5."""
    end = NewtonCG(tol=5.0).run(
        lambda p, _: 0.5 * p["x"].square().sum(1), point([3.0, 4.0]), {}, track=0
    )
    assert end.steps.tolist() == [0]


def test_a_step_that_all_refuse_is_an_iterate_too():
    loop = NewtonCG(steps=2, radius=100.0)
    end = loop.run(
        lambda p, _: (1 + p["x"].square()).sqrt().sum(1), point([2.0]), {}, track=0, keep=True
    )
    assert [at["x"].item() for at in end.iterates[:2]] == [2.0, 2.0]
    assert len(end.iterates) == 3


# where it is used


def test_hypergradients_are_those_of_the_closed_form_and_of_gradient_descent():
    oracle = ridge()
    common = {"method": "dense", "batched": True}
    newton = hypergradient(
        oracle.problem, oracle.meta, oracle.data, inner=NewtonCG(tol=1e-10), **common
    )
    descent = hypergradient(
        oracle.problem, oracle.meta, oracle.data, inner=GradientDescent(steps=500, lr=0.3), **common
    )
    flag = hypergradient(oracle.problem, oracle.meta, oracle.data, inner="newton-cg", **common)
    for found in (newton, descent, flag):
        assert relative_error(found.grads["log_decay"], oracle.exact["log_decay"]) < (
            1e-5 if found is flag else 1e-8
        )


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_the_learner_takes_it_by_its_flag(vectorize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    labels = torch.arange(4).expand(TASKS, -1)
    pair = (randn(TASKS, 4, 6, seed=0), labels)
    data = SimpleNamespace(support=pair, query=(randn(TASKS, 4, 6, seed=1), labels))
    grads = {}
    for name, inner in {
        "newton": "newton-cg",
        "descent": GradientDescent(steps=400, lr=0.3),
    }.items():
        learn = MetaLearner(
            model, F.cross_entropy, inner=inner, method="cg", proximal=0.5, vectorize=vectorize
        )
        model.zero_grad()
        step = learn.backward(data)
        grads[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert step.report.inner_gradient_norm.max() < 2e-5
    assert relative_error(grads["newton"], grads["descent"]) < 1e-5
    learn = MetaLearner(
        model, F.cross_entropy, inner="newton-cg", proximal=0.5, vectorize=vectorize
    )
    losses, accuracies = learn.evaluate(data, steps=12)
    assert losses.shape == accuracies.shape == (13, TASKS)
    assert relative_error(losses[-1].mean(), step.loss) < 1e-5
    assert learn.adapt((pair[0][0], labels[0])).params["0.weight"].shape == (5, 6)


def test_gradients_pass_to_the_start_as_the_identity():
    start = {name: p.clone().requires_grad_() for name, p in START.items()}
    end = NewtonCG().run(logistic(), start, {}, track=0)
    weights = randn(TASKS, N, seed=5)
    grads = torch.autograd.grad((joined(end.params) * weights).sum(), list(start.values()))
    assert torch.equal(joined(dict(zip(start, grads, strict=True))), weights)


def test_the_command_line_builds_it():
    family = SimpleNamespace(kind="regression", input_shape=(1,), outputs=1)
    options = RunOptions(
        inner_optimizer="newton-cg", inner_steps=3, inner_options={"cg_steps": 7}, device="cpu"
    )
    inner = build_learner(options, family).inner
    assert inner == NewtonCG(steps=3, cg_steps=7)
    images = SimpleNamespace(kind="classification", input_shape=(1, 16, 16), outputs=2)
    features = build_learner(replace(options, activation="gelu"), images).model.features
    assert sum(isinstance(layer, nn.GELU) for layer in features) == 4


def test_what_it_cannot_do_is_refused():
    oracle = ridge()
    for method, message in (
        (
            "unrolled",
            r"inner: got NewtonCG with a method that differentiates steps, expected an implicit method",
        ),
        (
            "truncated",
            r"inner: got NewtonCG with a method that differentiates steps, expected an implicit method",
        ),
        (Unrolled(iterates=True), r"inner: got NewtonCG with a method that differentiates steps"),
        ("forward", r"inner: got NewtonCG, whose steps are not differentiable"),
    ):
        with pytest.raises(ValueError, match=message):
            hypergradient(
                oracle.problem,
                oracle.meta,
                oracle.data,
                inner="newton-cg",
                method=method,
                batched=True,
            )
    mixed = {"w": torch.zeros(1, 2), "v": torch.zeros(1, 2, dtype=DOUBLE)}
    with pytest.raises(
        ValueError,
        match=r"NewtonCG: got parameters of \['torch.float32', 'torch.float64'\], expected one",
    ):
        NewtonCG().run(lambda p, _: p["w"].sum(1) + p["v"].sum(1), mixed, {}, track=0)
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2)},
        inner_loss=lambda params, meta, data: (params["w"] - meta["c"]).square().sum(),
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    meta = {"c": torch.ones(2)}
    with pytest.raises(
        ValueError,
        match=r"inner: got 'newton', expected one of gradient-descent, .*lbfgs, newton-cg, or",
    ):
        hypergradient(problem, meta, None, inner="newton", method="cg")
    with pytest.raises(ValueError, match="inner: got 'newton', expected one of"):
        argmin(problem.inner_loss, problem.init, meta, None, inner="newton", method="cg")
    with pytest.raises(ValueError, match="learn 'lr': got an inner loop with lr=None"):
        MetaLearner(nn.Linear(2, 1), F.mse_loss, inner="newton-cg", method="unrolled", learn={"lr"})
    for options, message in (
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"cg_steps": 0}, "NewtonCG cg_steps: got 0, expected at least 1 product"),
        ({"radius": 0.0}, "NewtonCG radius: got 0.0, expected a number > 0"),
        (
            {"forcing": 1.0},
            r"NewtonCG forcing: got 1.0, expected a relative residual in \[0, 1\), or None",
        ),
        ({"tol": 0.0}, "tol: got 0.0, expected a gradient norm > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            NewtonCG(**options)
