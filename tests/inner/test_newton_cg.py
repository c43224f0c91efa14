"""The inner loop of Newton's steps in a trust region, against a loop written out for one task."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracles import randn, relative_error, symmetric
from trust_region_by_hand import trust_region

from metaimplicit import NewtonCG

DOUBLE = torch.float64
EPS = torch.finfo(DOUBLE).eps
SPECTRA = [[0.5, 1, 2, 3, 4], [1, 1, 2, 2, 8], [0.1, 0.2, 0.4, 0.8, 1.6]]
INDEFINITE = [[-2, -1, 1, 3, 4], [1, 2, 3, 4, 5], [-0.1, 0.5, 1, 2, 30]]
TASKS = 3
N = 5
M = 12
B = randn(TASKS, N, seed=1)
START = {"a": randn(TASKS, 2, seed=2), "b": randn(TASKS, 1, 3, seed=3)}


def joined(params):
    return torch.cat([params["a"], params["b"].flatten(1)], dim=1)


def point(*rows):
    return {"x": torch.tensor(rows, dtype=DOUBLE)}


def run(loop, loss, start, *, keep=False):
    return loop.run(loss, start, {}, differentiated_steps=0, keep_iterates=keep)


def quadratic(h, b=B):
    def loss(params, _=0):
        theta = joined(params)
        return 0.5 * torch.einsum("ti,tij,tj->t", theta, h, theta) - (theta * b).sum(1)

    return loss


def logistic(offset=0.0):
    x = randn(TASKS, M, N, seed=0)
    y = (randn(TASKS, M, seed=1) > 0).double()

    def loss(params, _=0):
        theta = joined(params)
        z = torch.einsum("tmn,tn->tm", x, theta)
        return (F.softplus(z) - y * z).mean(1) + 0.05 * theta.square().sum(1) + offset

    return loss


def wavy(tasks=slice(None)):
    """A loss that is not convex, and different for each task.

    Steps are cut, refused and lengthened, in each task at other times.
    """
    h = symmetric(INDEFINITE)[tasks]
    b = B[tasks]
    width = torch.tensor([1.0, 3.0, 0.5], dtype=DOUBLE)[tasks]

    def loss(params, _=0):
        theta = joined(params)
        bumps = (theta * width[:, None]).sin().square().sum(1) + 0.02 * theta.pow(4).sum(1)
        return 0.5 * torch.einsum("ti,tij,tj->t", theta, h, theta) - (theta * b).sum(1) + 2 * bumps

    return loss


def loss_of_task(loss, i):
    """Task i's loss as a function of its flat vector, through the batch with the others at zero."""

    def alone(vector):
        theta = torch.zeros(TASKS, N, dtype=DOUBLE).index_put((torch.tensor([i]),), vector)
        return loss({"a": theta[:, :2], "b": theta[:, 2:].unsqueeze(1)})[i]

    return alone


def gradient_norm(loss, params):
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(loss(leaves).sum(), list(leaves.values()))
    return torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)


# the steps


def test_one_step_solves_a_quadratic():
    h = symmetric(SPECTRA)
    loop = NewtonCG(steps=1, cg_steps=N, radius=1e3, forcing=0.0)
    end = run(loop, quadratic(h), START)
    exact = torch.linalg.solve(h, B)
    for i in range(TASKS):
        assert relative_error(joined(end.params)[i], exact[i]) < 1e-10
    shapes = {name: p.shape for name, p in end.params.items()}
    assert shapes == {name: p.shape for name, p in START.items()}
    assert end.steps.tolist() == [1] * TASKS
    assert end.gradient_norm.max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"radius": 1.0, "cg_steps": 5},
        {"radius": 10.0, "cg_steps": 3, "forcing": 0.3},
        {"radius": 0.02, "cg_steps": 2, "forcing": 0.0, "tol": 1e-1},
    ],
)
def test_the_loop_is_that_of_each_task_alone(options):
    """Iterates, radii by what they do to the next step, and stops are those of the algorithm."""
    loop = NewtonCG(steps=6, **options)
    end = run(loop, wavy(), START, keep=True)
    events = set()  # of the radius and the step: (shortened, lengthened, taken)
    for i in range(TASKS):
        f = loss_of_task(wavy(), i)
        path, radii, taken = trust_region(f, joined(START)[i], steps=6, **options)
        events |= {(b < a, b > a, ok) for (a, b), ok in zip(pairwise(radii), taken, strict=True)}
        assert int(end.steps[i]) == len(path) - 1
        for t, iterate in enumerate(end.iterates):
            assert relative_error(joined(iterate)[i], path[min(t, len(path) - 1)]) < 1e-8
        alone = run(loop, wavy(slice(i, i + 1)), {name: p[i : i + 1] for name, p in START.items()})
        assert relative_error(joined(alone.params)[0], joined(end.params)[i]) < 1e-12
        difference = abs(float(alone.gradient_norm - end.gradient_norm[i]))
        assert difference < 1e-12 * max(1.0, float(alone.gradient_norm))
    assert torch.equal(joined(end.iterates[0]), joined(START))
    assert relative_error(end.gradient_norm, gradient_norm(wavy(), end.params)) < 1e-12
    assert {(False, True, True), (False, False, True)} <= events
    if options["radius"] == 10.0:
        assert (True, False, False) in events


def test_convergence_is_newtons_and_quadratic():
    loss = logistic()
    near = {name: 0.1 * p for name, p in START.items()}
    calls = []

    def counted(params, t):
        calls.append(t)
        return loss(params)

    loop = NewtonCG(steps=7, cg_steps=50, radius=1e3, forcing=0.0, tol=1e-11)
    end = run(loop, counted, near, keep=True)
    # Where no task refuses its step, the trial point is the point of the next model.
    assert calls == [0] * (int(end.steps.max()) + 1)
    for i in range(TASKS):
        f = loss_of_task(loss, i)
        theta = joined(near)[i]
        norms = []
        for iterate in end.iterates:
            g = torch.func.grad(f)(theta)
            norms.append(float(g.norm()))
            assert float((joined(iterate)[i] - theta).norm()) < 1e-9
            theta = theta - torch.linalg.solve(torch.func.hessian(f)(theta), g)
        # ‖g_{k+1}‖ ≤ L/2 ‖s‖² with ‖s‖ ≤ ‖g_k‖/0.1, and L = mean ‖x‖³ max |σ''| bounds the third
        # derivative.
        x = randn(TASKS, M, N, seed=0)[i]
        bound = 0.5 * float(x.norm(dim=1).pow(3).mean()) * 0.0963 / 0.1**2
        assert all(after <= bound * before**2 + 1e-15 for before, after in pairwise(norms))
        assert norms[-1] < 1e-11
    assert end.gradient_norm.max() < 1e-11


@pytest.mark.parametrize("unit", [2.0**60, 2.0**-60])
def test_a_loss_in_other_units_has_the_same_steps(unit):
    """With a forcing term of its own. Powers of two do not round."""
    loss = wavy()
    loop = NewtonCG(steps=8, forcing=0.1, tol=None)
    expected = run(loop, loss, START, keep=True)
    scaled = run(loop, lambda params, t: unit * loss(params, t), START, keep=True)
    for before, after in zip(expected.iterates, scaled.iterates, strict=True):
        assert torch.equal(joined(after), joined(before))
    assert torch.equal(scaled.gradient_norm, unit * expected.gradient_norm)
    assert torch.equal(scaled.steps, expected.steps)


def test_a_refused_step_moves_nothing_and_the_next_is_a_quarter_as_long():
    """Newton's step on √(1 + x²) from x = 2 is to −8, uphill; from 0.5 it is to −0.125."""
    start = point([2.0], [0.5])
    calls = []

    def loss(params, t):
        calls.append(t)
        return (1 + params["x"].square()).sqrt().sum(1)

    first = run(NewtonCG(steps=1, radius=100.0), loss, start)
    assert first.params["x"][0].item() == 2.0
    assert abs(first.params["x"][1].item() + 0.125) < 1e-14
    assert abs(first.gradient_norm[0].item() - 2 / 5**0.5) < 1e-15
    assert calls == [0, 0]
    second = run(NewtonCG(steps=2, radius=100.0), loss, start)
    assert abs(second.params["x"][0].item() - (2 - 10 / 4)) < 1e-14
    assert len(calls) == 2 + 4  # one evaluation more where a task refused
    assert second.steps.tolist() == [2, 2]


def test_a_step_that_all_tasks_refuse_is_an_iterate_too():
    loop = NewtonCG(steps=2, radius=100.0)
    end = run(loop, lambda p, _: (1 + p["x"].square()).sqrt().sum(1), point([2.0]), keep=True)
    assert [at["x"].item() for at in end.iterates[:2]] == [2.0, 2.0]
    assert len(end.iterates) == 3


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("radius", [torch.inf, 1e300, 1e20])
def test_a_radius_without_bound_bounds_nothing(radius, dtype):
    start = {"x": torch.tensor([[3.0, 4.0]], dtype=dtype)}
    loop = NewtonCG(steps=10, radius=radius)
    end = run(loop, lambda p, _: (p["x"] - 1).square().sum(1), start)
    assert end.params["x"].tolist() == [[1.0, 1.0]]


# tolerances and round-off


def test_a_task_at_its_tolerance_takes_no_step():
    """‖∂f/∂θ‖ = 5 ≤ 5."""
    loop = NewtonCG(tol=5.0)
    end = run(loop, lambda p, _: 0.5 * p["x"].square().sum(1), point([3.0, 4.0]))
    assert end.steps.tolist() == [0]


def test_without_a_tolerance_it_steps_until_round_off():
    b = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    loop = NewtonCG(steps=30, tol=None)
    with torch.no_grad():  # as a caller may have it
        end = run(loop, lambda p, _: (p["x"].cosh() - b * p["x"]).sum(1), point([3.0, 4.0]))
    assert end.gradient_norm.item() < 1e-12
    assert relative_error(end.params["x"][0], b.asinh()) < 1e-14


def test_losses_equal_to_round_off_do_not_stop_it():
    """Beside 10⁸ a loss cannot tell points apart whose gradients are below 10⁻⁴."""
    loop = NewtonCG(steps=8, cg_steps=20, radius=1e3, tol=1e-10)
    end = run(loop, logistic(offset=1e8), START)
    assert end.gradient_norm.max() < 1e-10


def test_the_ratio_forgives_ten_units_of_round_off_and_no_more():
    """f = 10⁸ − c sin(πx)/π with c = 10ε 10⁸.

    From 0 the step is to 1, where f does not decrease, and from there back.
    """
    c = 10 * EPS * 1e8
    loop = NewtonCG(steps=2, radius=1.0, tol=1e-12)
    end = run(
        loop,
        lambda p, _: 1e8 - c * (torch.pi * p["x"]).sin().sum(1) / torch.pi,
        point([0.0]),
        keep=True,
    )
    assert [round(at["x"].item(), 12) for at in end.iterates] == [0.0, 1.0, 0.0]


# numbers that are not finite


def test_a_task_at_its_tolerance_or_not_finite_stays_to_the_bit():
    h = symmetric(SPECTRA)
    exact = torch.linalg.solve(h, B)
    start = {name: p.clone() for name, p in START.items()}
    start["a"][0] = exact[0, :2]
    start["b"][0, 0] = exact[0, 2:]
    start["a"][1, 0] = torch.nan
    loop = NewtonCG(steps=2, cg_steps=N, radius=1e3, forcing=0.0)
    end = run(loop, quadratic(h), start)
    assert end.steps.tolist() == [0, 0, 1]
    for name, p in start.items():
        assert torch.equal(end.params[name][0], p[0])
        assert torch.equal(end.params[name][1].isnan(), p[1].isnan())
    assert end.gradient_norm[1].isnan()
    assert relative_error(joined(end.params)[2], exact[2]) < 1e-8


def test_a_trial_point_where_the_loss_is_not_finite_is_refused():
    def loss(params, _):  # 5x − log x, whose steps from 1.5 end below 0
        x = params["x"].squeeze(1)
        return 5 * x - x.log()

    end = run(NewtonCG(steps=20, radius=5.0), loss, point([1.5], [0.25]))
    assert relative_error(end.params["x"][:, 0], torch.full((2,), 0.2, dtype=DOUBLE)) < 1e-7


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (lambda p, _: p["x"].abs().sqrt().sum(1), [1.0]),  # at 0 only f is finite
        (lambda p, _: p["x"].square().sum(1).log(), [1.0, 0.0]),  # at 0 it is −∞
    ],
)
def test_a_trial_point_whose_gradient_is_not_finite_is_refused(loss, start):
    end = run(NewtonCG(steps=3, radius=1.0), loss, point(start))
    assert end.gradient_norm.isfinite().all()
    assert end.steps.tolist() == [3]
    assert end.params["x"].abs().sum() > 0


@pytest.mark.parametrize(("ratio", "end"), [(0.5e-4, 0.0), (1.5e-4, 1.0)])
def test_a_step_is_taken_if_the_loss_falls_by_1e_4_of_what_the_model_promises(ratio, end):
    def loss(params, _):
        x = params["x"].squeeze(1)
        return -x + x.square() / 2 + 0.5 * (1 - ratio) * x**3  # −ratio/2 at 1, the model −1/2

    reached = run(NewtonCG(steps=1, radius=10.0), loss, point([0.0]))
    assert reached.params["x"].item() == pytest.approx(end, abs=1e-12)


def test_where_there_is_no_second_derivative_the_model_is_linear():
    """‖x‖ has a gradient at 0 by convention, and a Hessian of NaN: the first step is Δ along −g."""
    loop = NewtonCG(steps=1, radius=0.5)
    end = run(
        loop,
        lambda p, _: (p["x"] - 1).square().sum(1) + 0.1 * p["x"].norm(dim=1),
        point([0.0, 0.0]),
    )
    expected = torch.full((1, 2), 0.5 / 2**0.5, dtype=DOUBLE)
    assert torch.allclose(end.params["x"], expected, rtol=1e-12)


# gradients


def test_gradients_pass_to_the_start_as_the_identity():
    start = {name: p.clone().requires_grad_() for name, p in START.items()}
    end = run(NewtonCG(), logistic(), start)
    weights = randn(TASKS, N, seed=5)
    grads = torch.autograd.grad((joined(end.params) * weights).sum(), list(start.values()))
    assert torch.equal(joined(dict(zip(start, grads, strict=True))), weights)


# refusals


def test_parameters_of_two_types_are_refused():
    mixed = {"w": torch.zeros(1, 2), "v": torch.zeros(1, 2, dtype=DOUBLE)}
    message = r"NewtonCG: got parameters of \['torch.float32', 'torch.float64'\], expected one"
    with pytest.raises(ValueError, match=message):
        run(NewtonCG(), lambda p, _: p["w"].sum(1) + p["v"].sum(1), mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"cg_steps": 0}, "NewtonCG cg_steps: got 0, expected at least 1 product"),
        ({"radius": 0.0}, "NewtonCG radius: got 0.0, expected a number > 0"),
        (
            {"forcing": 1.0},
            r"NewtonCG forcing: got 1.0, expected a relative residual in \[0, 1\), or None",
        ),
        ({"tol": 0.0}, "tol: got 0.0, expected a gradient norm > 0"),
    ],
)
def test_a_number_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NewtonCG(**options)
