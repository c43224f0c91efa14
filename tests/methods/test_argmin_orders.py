"""Derivatives of `argmin` beyond the first gradient: of second order, and in forward mode."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, randn, relative_error
from small_problems import number
from torch.autograd import forward_ad

from metaimplicit import (
    CG,
    Composite,
    Dense,
    FirstOrder,
    FixedPoint,
    Forward,
    FromMeta,
    GradientDescent,
    Implicit,
    NewtonCG,
    Proximal,
    ProximalGradient,
    TorchOptimizer,
    Truncated,
    Unrolled,
    argmin,
)
from metaimplicit.inner import L1Norm
from metaimplicit.methods import SAMA

TASKS, M, N = 2, 8, 2
X = randn(TASKS, M, N, seed=1)
Y = randn(TASKS, M, seed=2).sign()
CONVERGED = NewtonCG(steps=50, tol=1e-14)
EXACT = Implicit(Dense())


def smooth_hinge(margin):
    """½ − m below 0, ½(1 − m)² up to 1, and 0 above (Rennie & Srebro 2005)."""
    quadratic = 0.5 * (1 - margin).square()
    return torch.where(margin >= 1, 0.0, torch.where(margin <= 0, 0.5 - margin, quadratic))


LOSSES = {
    "ridge": lambda scores, y: 0.5 * (scores - y).square().mean(),
    "logistic": lambda scores, y: F.softplus(-y * scores).mean(),
}


def train(loss, decay, data, *, method=EXACT, inner=CONVERGED, batched=True, **options):
    """argmin of the loss of w plus ½ eᵠ‖w‖², `[tasks, n]`."""
    params = argmin(
        Composite(
            outputs=lambda params, meta, data: data[0] @ params["w"],
            loss=lambda scores, data: loss(scores, data[1]),
            penalty=Proximal(FromMeta("decay", torch.exp), center="zero"),
        ),
        lambda meta, data: {"w": torch.zeros(N, dtype=torch.float64)},
        {"decay": decay},
        data,
        inner=inner,
        method=method,
        batched=batched,
        **options,
    )
    return params["w"]


def along(loss, t, **options):
    """The argmin on a line through φ and the data, at the distance t."""
    decay = number(-1.0) + 0.7 * t
    return train(loss, decay, (X + t * randn(TASKS, M, N, seed=3), Y), **options)


def objective(loss, t, **options):
    """A function of the argmin that is not linear, so that all terms of its derivatives count."""
    w = along(loss, t, **options)
    return (randn(TASKS, N, seed=4) * w).sum() + w.pow(3).sum()


def slope(function, t, create_graph=False):
    t = t if create_graph else t.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(t), t, create_graph=create_graph)
    return gradient


def gradient_at(function):
    return lambda t: torch.autograd.grad(function(t), t)[0]


def differences(function):
    return finite_difference(function, at=number(0.0), direction=number(1.0))


def jvp(function, t, tangent):
    """The tangent of a function in forward mode."""
    return forward_ad.unpack_dual(function(forward_ad.make_dual(t, tangent))).tangent


# Against finite differences.


def test_derivatives_of_the_first_three_orders():
    value = partial(objective, LOSSES["logistic"])
    t = number(0.0).requires_grad_()
    first = slope(value, t, create_graph=True)
    (second,) = torch.autograd.grad(first, t, create_graph=True)
    (third,) = torch.autograd.grad(second, t)
    assert relative_error(first.detach(), differences(value)) < 1e-7
    assert relative_error(second.detach(), differences(partial(slope, value))) < 1e-7

    def curvature(t):
        t = t.detach().requires_grad_()
        return slope(partial(slope, value, create_graph=True), t)

    assert relative_error(third, differences(curvature)) < 1e-7


def test_tangents_in_forward_mode():
    function = partial(along, LOSSES["logistic"])
    with forward_ad.dual_level():
        tangent = jvp(function, number(0.0), number(1.0))
    assert relative_error(tangent.detach(), differences(function)) < 1e-7


def test_tangents_without_a_graph():
    function = partial(along, LOSSES["logistic"])
    with torch.no_grad(), forward_ad.dual_level():
        tangent = jvp(function, number(0.0).requires_grad_(), number(1.0))
    assert not tangent.requires_grad
    assert relative_error(tangent, differences(function)) < 1e-7


def test_forward_and_reverse_mode_in_both_orders():
    value = partial(objective, LOSSES["logistic"])
    expected = differences(partial(slope, value))
    t = number(0.0).requires_grad_()
    with forward_ad.dual_level():
        (reverse_over_forward,) = torch.autograd.grad(jvp(value, t, number(1.0)), t)
        forward_over_reverse = jvp(gradient_at(value), t, number(1.0))
    assert relative_error(reverse_over_forward, expected) < 1e-7
    assert relative_error(forward_over_reverse.detach(), expected) < 1e-7


@pytest.mark.parametrize("options", [{"method": Unrolled()}, {"method": Implicit(Dense())}])
def test_the_weight_decay_of_the_loop_has_its_second_derivative(options):
    """It is a part of f: f = ½‖θ − φ‖² + ½λ‖θ‖² has its minimum at φ/(1 + λ)."""
    decay = number(0.5).requires_grad_()
    inner = TorchOptimizer(torch.optim.SGD, steps=60, lr=0.5, weight_decay=FromMeta("decay"))
    params = argmin(
        lambda p, m, d: 0.5 * (p["w"] - 3.0).square(),
        lambda m, d: {"w": number(0.0)},
        {"decay": decay},
        None,
        inner=inner,
        **options,
    )
    (first,) = torch.autograd.grad(params["w"], decay, create_graph=True)
    (second,) = torch.autograd.grad(first, decay)
    assert first.item() == pytest.approx(-3.0 / 1.5**2, rel=1e-12)
    assert second.item() == pytest.approx(6.0 / 1.5**3, rel=1e-12)


def test_a_minimum_that_was_found_elsewhere():
    """Also if the values are changed in place: they are a copy."""
    decay = number(-1.0).requires_grad_()
    with torch.no_grad():
        minimum = closed_form(decay, X[0], Y[0])

    w = train(
        LOSSES["ridge"],
        decay,
        (X[0], Y[0]),
        inner=None,
        solution={"w": minimum},
        batched=False,
    )
    expected = torch.autograd.functional.hessian(
        lambda decay: (2.0 * closed_form(decay, X[0], Y[0])).pow(3).sum(), decay
    )
    (first,) = torch.autograd.grad(w.mul_(2.0).pow(3).sum(), decay, create_graph=True)
    (second,) = torch.autograd.grad(first, decay)
    assert relative_error(second, expected) < 1e-10


# Against closed forms and plain loops.


def closed_form(decay, x, y):
    m = x.shape[-2]
    a = x.mT @ x / m + decay.exp() * torch.eye(N, dtype=torch.float64)
    return torch.linalg.solve(a, x.mT @ y.unsqueeze(-1) / m).squeeze(-1)


def test_the_whole_hessian_of_ridge_is_that_of_the_closed_form():
    """In φ, the inputs and the targets at once."""
    at = (number(-1.0), X[0, :4], Y[0, :4])

    def outer(solve, *arguments):
        return solve(*arguments).pow(3).sum()

    def by_argmin(decay, x, y):
        return train(LOSSES["ridge"], decay, (x, y), batched=False)

    hessian = torch.autograd.functional.hessian
    actual = hessian(partial(outer, by_argmin), at)
    expected = hessian(partial(outer, closed_form), at)
    for actual_row, expected_row in zip(actual, expected, strict=True):
        for a, e in zip(actual_row, expected_row, strict=True):
            assert relative_error(a, e) < 1e-10


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_batch_is_a_loop_over_its_tasks(vectorize):
    v = randn(TASKS, N, seed=4)
    direction = randn(TASKS, M, N, seed=5)

    def derivatives(x, y, v, direction, **options):
        """The gradient in x, its derivative along the direction, and the tangent of w."""
        x = x.clone().requires_grad_()
        solve = partial(train, LOSSES["logistic"], number(-1.0), **options)
        value = (v * solve((x, y))).sum().square()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), x)
        with forward_ad.dual_level():
            tangent = jvp(lambda x: solve((x, y)), x.detach(), direction)
        return gradient.detach(), second, tangent

    def of_tasks(tensors):
        return [torch.stack(t) for t in zip(*tensors, strict=True)]

    # The square couples the tasks, so each task has one of its own.
    per_task = [
        derivatives(*arguments, batched=False) for arguments in zip(X, Y, v, direction, strict=True)
    ]
    batches = []
    for task in range(TASKS):
        only = torch.zeros_like(v)
        only[task] = v[task]
        batch = derivatives(X, Y, only, direction, vectorize=vectorize)
        batches.append([t[task] for t in batch])
    for actual, expected in zip(of_tasks(batches), of_tasks(per_task), strict=True):
        assert relative_error(actual, expected) < 1e-12


# Uses.


TARGET = randn(N, seed=6)


def top_of_three_levels(psi, method):
    """ψ tunes the regularisation of φ, which is tuned for what it makes of θ."""

    def innermost(phi):
        return argmin(
            lambda p, m, d: (0.5 * (p["theta"] - m["phi"]).square() + p["theta"].pow(4)).sum(),
            lambda m, d: {"theta": torch.zeros(N, dtype=torch.float64)},
            {"phi": phi},
            None,
            inner=CONVERGED,
            method=method,
        )["theta"]

    def middle(p, m, d):
        fit = (innermost(p["phi"]) - TARGET).square().sum()
        return fit + m["psi"].exp() * p["phi"].square().sum()

    phi = argmin(
        middle,
        lambda m, d: {"phi": torch.zeros(N, dtype=torch.float64)},
        {"psi": psi},
        None,
        inner=CONVERGED,
        method=method,
    )["phi"]
    return (innermost(phi) - 0.5 * TARGET).square().sum()


def top_by_hand(psi):
    """The same with φ = θ + 4θ³, which the innermost level says of its minimum."""

    def middle(theta):
        return ((theta - TARGET).square() + psi.exp() * (theta + 4 * theta**3).square()).sum()

    slope = torch.func.grad(middle)
    curvature = torch.func.grad(lambda theta: slope(theta).sum())
    theta = torch.zeros(N, dtype=torch.float64)
    for _ in range(30):
        theta = theta - slope(theta) / curvature(theta)
    assert slope(theta).abs().max() < 1e-13
    return (theta - 0.5 * TARGET).square().sum()


@pytest.mark.slow
def test_a_third_level():
    by_cg = Implicit(CG(max_steps=20, tol=1e-14))
    actual = slope(partial(top_of_three_levels, method=by_cg), number(-2.0))
    expected = finite_difference(top_by_hand, number(-2.0), number(1.0), step=1e-2)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-7)


def test_a_convex_head_is_ten_lines_of_torch():
    """As MetaOptNet (Lee et al. 2019): a multi-class hinge in the features of a body."""
    support, query = randn(TASKS, 6, 4, seed=7), randn(TASKS, 6, 4, seed=8)
    labels = torch.arange(6).remainder(3).expand(TASKS, -1)
    weight = randn(4, N, seed=9)

    def head_loss(params, meta, data):
        features, labels = data
        scores = features @ params["w"]
        margins = scores.gather(1, labels[:, None]) - scores
        others = 1 - F.one_hot(labels, 3)
        return (others * smooth_hinge(margins)).sum(1).mean() + params["w"].square().sum()

    def zeros(meta, data):
        return {"w": torch.zeros(N, 3, dtype=torch.float64)}

    def query_loss(weight):
        embed = lambda x: torch.tanh(x @ weight)  # noqa: E731
        head = argmin(
            head_loss,
            zeros,
            {"unused": torch.zeros(())},
            (embed(support), labels),
            inner=CONVERGED,
            method="dense",
            batched=True,
        )
        scores = embed(query) @ head["w"]
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten())

    body = weight.clone().requires_grad_()
    query_loss(body).backward()
    direction = randn(4, N, seed=10)
    expected = finite_difference(query_loss, weight, direction)
    assert (body.grad * direction).sum().item() == pytest.approx(expected.item(), rel=1e-7)


# Refusals.

ONCE = {
    "gauss-newton": Implicit(curvature="gauss-newton"),
    "damping": Implicit(damping=0.1),
    "finite-differences": Implicit(products="finite-differences"),
}
SETTLED = GradientDescent(steps=40, lr=1.5)


@pytest.mark.parametrize("method", ONCE.values(), ids=ONCE)
def test_a_second_derivative_that_does_not_exist_is_refused(method):
    t = number(0.0).requires_grad_()
    value = partial(objective, LOSSES["logistic"], method=method, inner=SETTLED)
    gradient = slope(value, t, create_graph=True)
    with pytest.raises(RuntimeError, match=r"argmin is differentiable once under .*'unrolled'"):
        gradient.backward()


@pytest.mark.parametrize("name", ["gauss-newton", "damping"])
def test_another_matrix_has_tangents_that_are_differentiable_once(name):
    """The tangents are the transpose of the gradients."""
    function = partial(along, LOSSES["logistic"], method=ONCE[name], inner=SETTLED)
    v = randn(TASKS, N, seed=4)
    t = number(0.0).requires_grad_()
    with forward_ad.dual_level():
        tangent = jvp(function, t, number(1.0))
        (gradient,) = torch.autograd.grad((v * function(t)).sum(), t)
        assert relative_error((v * tangent).sum().detach(), gradient) < 1e-12
        with pytest.raises(RuntimeError, match="argmin is differentiable once under"):
            tangent.sum().backward()
        with pytest.raises(RuntimeError, match="argmin is differentiable once under"):
            jvp(gradient_at(lambda dual: function(dual).sum()), t, number(1.0))


@pytest.mark.parametrize(
    "method",
    [SAMA(), Forward(), FixedPoint(), FirstOrder(), ONCE["finite-differences"]],
    ids=lambda method: method.flag,
)
def test_a_method_without_tangents_is_refused_in_forward_mode(method):
    function = partial(along, LOSSES["logistic"], method=method, inner=SETTLED)
    message = f"argmin has no derivative in forward mode under {method.flag}"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        jvp(function, number(0.0), number(1.0))


def test_unrolled_has_tangents_as_well():
    inner = GradientDescent(steps=4, lr=1.5)
    function = partial(along, LOSSES["logistic"], method="unrolled", inner=inner)
    with forward_ad.dual_level():
        tangent = jvp(function, number(0.0), number(1.0))
    expected = differences(function)
    assert relative_error(tangent.detach(), expected.detach()) < 1e-7


@pytest.mark.parametrize("method", ["unrolled", Truncated(2)], ids=["unrolled", "truncated"])
@pytest.mark.parametrize(
    "inner", [GradientDescent(5, 0.1), ProximalGradient(L1Norm(0.1), steps=5, lr=0.1)], ids=repr
)
def test_a_start_that_requires_no_grad_has_its_tangent(inner, method):
    def end(start):
        return argmin(
            lambda params, meta, data: (params["w"] - 1).pow(4).sum(),
            init=lambda meta, data: {"w": meta["start"]},
            meta={"start": start},
            data=None,
            inner=inner,
            method=method,
        )["w"]

    start = torch.tensor([0.3, -0.8, 1.9], dtype=torch.float64)
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = jvp(end, start, direction)
    variable = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(end(variable).sum(), variable)
    torch.testing.assert_close(tangent.detach(), gradient * direction)  # the elements are apart
