"""`Ridge` and `Newton` against dense Newton steps on the loss in plain torch."""

from types import SimpleNamespace

import pytest
import torch
from convex_heads import CLASSES, LOSSES, PIXELS, TASKS, body, make, solve
from oracles import largest_error, randn, relative_error
from torch.autograd import forward_ad

from metaimplicit import (
    METHODS,
    BilevelProblem,
    Composite,
    FromMeta,
    Implicit,
    Stream,
    Unrolled,
    argmin,
)
from metaimplicit.inner import (
    LinearHead,
    Logistic,
    Newton,
    Ridge,
    SoftmaxCrossEntropy,
    SquaredError,
)
from metaimplicit.solvers import Factored, Status

DUAL = {"p": 8, "m": 5}
PRIMAL = {"p": 3, "m": 9}
WITHOUT_BIAS = DUAL | {"bias": False}
ONE_EXAMPLE = {"p": 6, "m": 1}

# A Hessian has one block for all outputs (squares), one for each (logistic, hinge), or couples them
# (softmax). Each has a dual and a primal form. The rows of a table below reach what it depends on.
RIDGE = ("squares", Ridge())
SQUARES, LOGISTIC, SOFTMAX, HINGE = ((loss, Newton()) for loss in LOSSES)


def rows(*names_and_rows):
    """A table of a loss, its inner loop, and what else a test needs."""
    names, *table = names_and_rows
    return pytest.mark.parametrize(
        ("loss", "inner", *names), [(*loop, *others) for loop, *others in table], ids=str
    )


def dense(case, task, near):
    """θ*, and dg/dφ by the dense implicit function theorem, of one task in plain torch.

    The loss is strictly convex, so that Newton's steps end at the same θ* from anywhere.
    """
    data = tuple(x[task] for x in case.data)
    start = case.problem.init(case.meta, data)

    def read(vector):
        sizes = [p.numel() for p in start.values()]
        parts = zip(start.items(), vector.split(sizes), strict=True)
        return {name: part.view_as(p) for (name, p), part in parts}

    def inner(vector, meta):
        return case.plain(read(vector), meta, data)

    def outer(vector, meta):
        return case.problem.outer_loss(read(vector), meta, data)

    theta = torch.cat([near[name][task].flatten() for name in start])
    gradient = torch.func.grad(inner)
    hessian = torch.func.hessian(inner)
    while (slope := gradient(theta, case.meta)).norm() > 1e-13:
        step = torch.linalg.solve(hessian(theta, case.meta), slope)
        sizes = 0.5 ** torch.arange(4)
        values = torch.stack([inner(theta - s * step, case.meta) for s in sizes])
        theta = theta - sizes[values.argmin()] * step

    by_theta, by_meta = torch.func.grad(outer, argnums=(0, 1))(theta, case.meta)
    u = torch.linalg.solve(hessian(theta, case.meta), by_theta)
    pulled = torch.func.grad(lambda meta: gradient(theta, meta) @ u)(case.meta)
    return read(theta), {name: by_meta[name] - pulled[name] for name in case.meta}


@rows(
    ["shape"],
    (RIDGE, DUAL),
    (RIDGE, PRIMAL),
    (RIDGE, ONE_EXAMPLE),
    (SQUARES, WITHOUT_BIAS),
    (LOGISTIC, DUAL),
    (LOGISTIC, PRIMAL),
    (HINGE, DUAL),
    (SOFTMAX, DUAL),
    (SOFTMAX, PRIMAL),
    (SOFTMAX, WITHOUT_BIAS),
    (SOFTMAX, ONE_EXAMPLE),
)
def test_the_argmin_and_its_derivative_are_those_of_a_dense_solve(loss, inner, shape):
    case = make(loss, **shape)
    by_factor = solve(case, inner)
    unrolled = solve(case, inner, "unrolled")
    tasks = [dense(case, task, by_factor.params) for task in range(TASKS)]
    params, grads = zip(*tasks, strict=True)
    for name, value in by_factor.params.items():
        assert relative_error(value, torch.stack([p[name] for p in params])) < 1e-10
    expected = {name: torch.stack([g[name] for g in grads]).mean(0) for name in case.meta}
    assert largest_error(by_factor.grads, expected) < 1e-8
    assert largest_error(unrolled.grads, expected) < 1e-8
    assert largest_error(unrolled.grads, by_factor.grads) < 1e-10


@rows(["shape"], (RIDGE, PRIMAL), (LOGISTIC, PRIMAL), (SOFTMAX, DUAL))
def test_the_report_says_that_the_factor_was_used(loss, inner, shape):
    report = solve(make(loss, **shape), inner).report
    assert report.products == 0
    assert report.chosen == "Factored: the inner loop left its inverse"
    assert report.curvature == "hessian"
    assert report.residual.max() < 1e-12
    assert report.inner_gradient_norm.max() < 1e-10
    assert report.status.tolist() == [Status.CONVERGED] * TASKS
    assert report.sigma == pytest.approx(torch.tensor(-0.3).exp().item())
    assert report.error_bound.max() < 1e-12


@pytest.mark.parametrize(
    "method", ["dense", Implicit(Factored()), Implicit(Factored(), "gauss-newton")]
)
def test_other_solvers_multiply_by_the_hessian_that_the_loop_leaves(method):
    case = make("softmax")
    assert largest_error(solve(case, Newton(), method).grads, solve(case, Newton()).grads) < 1e-10


@pytest.mark.parametrize(("shape", "size"), [(DUAL, 5), (PRIMAL, 4)], ids=["dual", "primal"])
def test_ridge_factorises_once_for_all_tasks(monkeypatch, shape, size):
    shapes = []
    cholesky = torch.linalg.cholesky_ex

    def counted(matrix, **options):
        shapes.append(tuple(matrix.shape))
        return cholesky(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    solve(make("squares", **shape), Ridge())
    assert shapes == [(TASKS, size, size)]


@rows([], (RIDGE,), (SOFTMAX,))
def test_a_batch_is_a_loop_over_its_tasks(loss, inner):
    case = make(loss)
    batch = solve(case, inner)
    looped = solve(case, inner, vectorize="loop")
    single = [
        solve(case, inner, data=tuple(x[task : task + 1] for x in case.data))
        for task in range(TASKS)
    ]
    assert largest_error(looped.grads, batch.grads) < 1e-12
    for name, gradient in batch.grads.items():
        mean = torch.stack([s.grads[name] for s in single]).mean(0)
        assert relative_error(mean, gradient) < 1e-12


@rows(
    ["shape"],
    (RIDGE, DUAL),
    (RIDGE, PRIMAL),
    (LOGISTIC, PRIMAL),
    (HINGE, DUAL),
    (SOFTMAX, DUAL),
    (SOFTMAX, PRIMAL),
)
def test_float32_with_repeated_features_and_examples_is_right(loss, inner, shape):
    """The features have rank 1, and λ is a millionth of their square."""
    exact = make(loss, **shape)
    exact.meta["body"] = exact.meta["body"][:, :1].expand(PIXELS, shape["p"]).contiguous()
    exact.meta["log_strength"] = torch.tensor(-6.0, dtype=torch.float64)
    exact.meta["scale"] = torch.tensor(15.0, dtype=torch.float64)
    short = make(loss, **shape, dtype=torch.float32)
    short.meta = {name: value.float() for name, value in exact.meta.items()}
    expected = solve(exact, inner)
    for method in ("auto", "unrolled"):
        result = solve(short, inner, method)
        assert {g.dtype for g in result.grads.values()} == {torch.float32}
        assert largest_error(result.params, expected.params) < 1e-4
        vectors = [torch.cat([g.flatten() for g in r.grads.values()]) for r in (result, expected)]
        assert relative_error(*vectors) < 1e-4


@rows(
    ["method"],
    (RIDGE, "auto"),
    (SQUARES, "unrolled"),
    (LOGISTIC, "auto"),
    (HINGE, "unrolled"),
    (SOFTMAX, "auto"),
    (SOFTMAX, "unrolled"),
)
def test_support_of_one_class_and_features_of_zero_are_no_special_case(loss, inner, method):
    case = make(loss)
    images, labels, queries, targets = case.data
    images = torch.cat([0 * images[:1], images[1:]])  # all features of the first task are zero
    result = solve(case, inner, method, data=(images, 0 * labels, queries, targets))
    assert all(p.isfinite().all() for p in result.params.values())
    assert result.params["weight"][0].abs().max() == 0
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in result.grads.values())


@rows(
    ["method"],
    (RIDGE, "auto"),
    (LOGISTIC, "unrolled"),
    (SOFTMAX, "auto"),
    (SOFTMAX, "unrolled"),
)
def test_a_task_without_an_outer_gradient_adds_nothing(loss, inner, method):
    case = make(loss, bias=False)
    images, labels, queries, targets = case.data
    alone = tuple(x[1:] for x in case.data)
    # Queries of zeros have outputs of zero, whatever the head is.
    queries = torch.cat([0 * queries[:1], queries[1:]])
    grads = solve(case, inner, method, data=(images, labels, queries, targets)).grads
    expected = solve(case, inner, method, data=alone).grads
    halves = {name: g / TASKS for name, g in expected.items()}
    assert largest_error(grads, halves) < 1e-12


@pytest.mark.parametrize("method", ["auto", "unrolled"])
def test_a_head_of_one_output_has_a_softmax_without_a_gradient(method):
    head = LinearHead(
        lambda meta, x: x * meta["scale"],
        lambda meta, x: torch.zeros(2, dtype=torch.int64),
        loss=SoftmaxCrossEntropy(),
        strength=1.0,
    )
    scale = torch.tensor(2.0, requires_grad=True)
    params = argmin(
        head,
        init=lambda meta, x: {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)},
        meta={"scale": scale},
        data=torch.ones(2, 3),
        inner=Newton(),
        method=method,
    )
    sum(p.sum() for p in params.values()).backward()
    assert params["weight"].tolist() == [[0.0] * 3]
    assert scale.grad == 0


def test_newton_is_damped_where_full_steps_diverge():
    """From far away, the Hessian of the logistic loss is nearly λI, and full steps overshoot."""
    case = make("logistic")
    case.meta["log_strength"] = torch.tensor(-7.0, dtype=torch.float64)
    near = solve(case, Newton())
    start = near.end
    far = {name: p + 40 * randn(*p.shape, seed=9) for name, p in start.params.items()}
    result = solve(case, Newton(), start=type(start)(far))
    assert largest_error(result.params, near.params) < 1e-9
    assert result.report.inner_gradient_norm.max() < 1e-10


@pytest.mark.parametrize(("gain", "end"), [(0.5e-4, -0.5), (1.5e-4, -1.0)])
def test_newton_halves_a_step_unless_the_loss_falls_by_1e_4_of_the_slope(gain, end):
    """The slope is 1, and the loop ends after its first step."""

    class Barely:
        rows = torch.zeros(1, 1, 1, dtype=torch.float64)
        strength = None

        def gradient(self, v):
            return torch.where(v == 0, 1.0, 0.0)

        def curvature(self, v):
            identity = SimpleNamespace(is_dual=False)
            identity.factorise = lambda strength: None
            identity.inverse = lambda gradient, factor, strength: gradient
            return identity

        def values_along(self, v, direction, sizes):
            return torch.where(sizes == 1, -gain, -sizes)[:, None]

    start = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert Newton().minimise(Barely(), start).end == end


def test_tasks_end_where_roundoff_stops_them():
    case = make("softmax")
    case.meta["scale"] = torch.tensor(1e4, dtype=torch.float64)
    report = solve(case, Newton(max_steps=100, tol=None)).report
    assert report.inner_steps.max() < 30
    assert report.inner_gradient_norm.max() < 1e-6  # ε times the square of the features is 1e-8


def test_tasks_end_one_by_one():
    case = make("softmax")
    start = solve(case, Newton()).end
    moved = {name: torch.cat([p[:1], 3 * p[1:]]) for name, p in start.params.items()}
    report = solve(case, Newton(), start=type(start)(moved)).report
    assert report.inner_steps[0] == 0
    assert report.inner_steps[1] >= 3


@rows(
    ["method"],
    (RIDGE, "auto"),
    (RIDGE, "unrolled"),
    (LOGISTIC, "auto"),
    (HINGE, "unrolled"),
    (SOFTMAX, "auto"),
    (SOFTMAX, "unrolled"),
)
def test_argmin_has_second_derivatives_and_tangents(loss, inner, method):
    case = make(loss, **PRIMAL)

    def total(log_strength):
        params = argmin(
            case.head,
            case.problem.init,
            case.meta | {"log_strength": log_strength},
            case.data,
            inner=inner,
            method=method,
            batched=True,
        )
        return sum(p.square().sum() for p in params.values())

    def slope(log_strength, create_graph=False):
        x = log_strength.requires_grad_()
        return torch.autograd.grad(total(x), x, create_graph=create_graph)[0]

    at = case.meta["log_strength"]
    h = 1e-4
    values = [slope(at + k * h) for k in (1, -1, 2, -2)]
    differences = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
    x = at.clone()
    (second,) = torch.autograd.grad(slope(x, create_graph=True), x)
    assert second.item() == pytest.approx(differences.item(), rel=1e-8)

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(total(forward_ad.make_dual(at, torch.ones(())))).tangent
    assert tangent.item() == pytest.approx(slope(at.clone()).item(), rel=1e-9)


@rows(["method"], (RIDGE, "auto"), (SOFTMAX, "auto"), (SOFTMAX, "unrolled"))
def test_the_body_runs_once_where_its_features_are_the_problems(loss, inner, method):
    case = make(loss)
    expected = solve(case, inner, method)
    calls = []

    def features(meta, data):
        calls.append(len(data[0]))
        return (body(meta, data[0]), data[1], body(meta, data[2]), data[3])

    convex_loss = LOSSES[loss][0]
    head = LinearHead(
        lambda meta, c: c[0],
        lambda meta, c: c[1],
        loss=convex_loss,
        strength=FromMeta("log_strength", torch.exp),
        temperature=FromMeta("log_temperature", torch.exp),
    )

    def outer_loss(params, meta, c):
        return torch.nn.functional.cross_entropy(head.predict(params, meta, c[2]), c[3])

    case.problem = BilevelProblem(case.problem.init, head, outer_loss, features=features)
    images, *others = case.data
    data = (images.clone().requires_grad_(), *others)
    result = solve(case, inner, method, data=data)
    assert calls == [TASKS]
    assert largest_error(result.grads, expected.grads) < 1e-11

    direction = 1e-4 * randn(*images.shape, seed=6)
    ahead = solve(case, inner, data=(images + direction, *others)).outer_loss
    behind = solve(case, inner, data=(images - direction, *others)).outer_loss
    slope = (result.data_grads[0] * direction).sum().item()
    assert slope == pytest.approx(0.5 * (ahead - behind).item(), rel=1e-6)


def test_targets_may_be_numbers_and_depend_on_meta():
    """Soft labels are meta-parameters as good as any, and one-hot ones are class indices."""
    case = make("softmax")
    soft = LinearHead(
        case.head.features,
        lambda meta, data: meta["labels"],
        loss=SoftmaxCrossEntropy(),
        strength=FromMeta("log_strength", torch.exp),
        temperature=FromMeta("log_temperature", torch.exp),
    )
    labels = torch.nn.functional.one_hot(case.data[1][0], CLASSES).double()
    expected = solve(case, Newton())
    case.problem = type(case.problem)(case.problem.init, soft, case.problem.outer_loss)
    meta = case.meta | {"labels": labels}
    result = solve(case, Newton(), meta=meta)
    assert largest_error(result.params, expected.params) < 1e-12
    assert largest_error(solve(case, Newton(), "unrolled", meta=meta).grads, result.grads) < 1e-10


@pytest.mark.parametrize(("p", "m"), [(3, 5), (8, 5)], ids=["primal", "dual"])
def test_an_example_of_weight_zero_has_derivatives(p, m):
    """The root of the Hessian has an infinite derivative there, and the Hessian has none."""
    x, labels = randn(m, p, seed=1), torch.arange(m) % CLASSES
    one_hot = torch.nn.functional.one_hot(labels, CLASSES)
    head = LinearHead(
        lambda meta, data: x,
        lambda meta, data: meta["weights"].unsqueeze(-1) * one_hot,
        loss=SoftmaxCrossEntropy(),
        strength=0.5,
        bias=None,
    )

    def derivatives(method):
        weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
        start = {"weight": torch.zeros(CLASSES, p, dtype=torch.float64)}
        end = argmin(
            head, lambda *_: start, {"weights": weights}, None, inner=Newton(), method=method
        )
        (slope,) = torch.autograd.grad(end["weight"].pow(3).sum(), weights, create_graph=True)
        (second,) = torch.autograd.grad(slope @ randn(m, seed=2), weights, create_graph=True)
        (third,) = torch.autograd.grad(second @ randn(m, seed=3), weights)
        return {"slope": slope.detach(), "second": second.detach(), "third": third}

    assert largest_error(derivatives("unrolled"), derivatives("auto")) < 1e-12


@pytest.mark.parametrize("targets", [torch.arange(5)[:, None] - 1, torch.zeros(5, 1).bool()])
def test_whole_numbers_are_targets_as_good_as_any(targets):
    x = randn(5, 2, seed=1)

    def fit(targets, x=x):
        head = LinearHead(
            lambda meta, data: x,
            lambda meta, data: targets,
            loss=SquaredError(),
            strength=0.5,
            bias=None,
        )
        start = {"weight": torch.zeros(1, 2, dtype=torch.float64)}
        meta = {"unused": torch.zeros(())}
        return argmin(head, lambda *_: start, meta, None, inner=Ridge(), method="auto")["weight"]

    assert torch.equal(fit(targets), fit(targets.double()))
    assert fit(torch.arange(0), x[:0]).abs().max() == 0  # there are no classes without examples


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_curvature_of_the_logistic_loss_has_all_digits_far_from_zero(dtype, rtol):
    """It is σ(z) σ(−z) = e^(−|z|)/(1 + e^(−|z|))²."""
    z = torch.linspace(-40, 40, 17, dtype=dtype, requires_grad=True)
    losses = Logistic().value(z.unsqueeze(-1), torch.zeros(1))
    (slope,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    small = (-z.detach().double().abs()).exp()
    expected = (small / (1 + small).square()).to(dtype)
    torch.testing.assert_close(curvature, expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("kind", [SquaredError, Logistic, SoftmaxCrossEntropy])
def test_value_and_slope_agree_far_from_zero_as_well(kind):
    """Torch's softplus is linear above 20, so that its second derivative is zero there."""
    loss = kind()
    z = torch.linspace(-40, 40, 21).double().unsqueeze(1) * torch.tensor([1.0, -0.5, 0.7])
    z.requires_grad_()
    y = torch.tensor([0.2, 0.3, 0.5]).double().expand_as(z)
    v = randn(*z.shape, seed=0)
    (slope,) = torch.autograd.grad(loss.value(z, y).sum(), z, create_graph=True)
    torch.testing.assert_close(slope, loss.slope(z, y), rtol=1e-12, atol=1e-15)
    (of_value,) = torch.autograd.grad(slope, z, v)
    (of_slope,) = torch.autograd.grad(loss.slope(z, y), z, v)
    torch.testing.assert_close(of_value, of_slope, rtol=1e-12, atol=1e-15)


# Refusals.


@pytest.mark.parametrize(
    "flag", [flag for flag, m in METHODS.items() if not isinstance(m, (Implicit, Unrolled))]
)
def test_other_methods_are_refused_by_name(flag):
    case = make("squares")
    with pytest.raises(ValueError, match=f"{METHODS[flag].flag}: got Ridge, .* 'auto' solves"):
        solve(case, Ridge(), flag)


def test_all_iterates_are_refused():
    with pytest.raises(ValueError, match="Newton: got a method that differentiates all iterates"):
        solve(make(), Newton(tol=None), Unrolled(iterates=True))


def test_ridge_refuses_other_losses():
    with pytest.raises(ValueError, match="LinearHead with SoftmaxCrossEntropy, expected"):
        solve(make("softmax"), Ridge())


def test_other_inner_losses_and_streams_are_refused():
    case = make()
    plain = Composite(case.head.outputs, lambda z, data: z.square().mean())
    other = type(case.problem)(case.problem.init, plain, case.problem.outer_loss)
    case.problem, problem = other, case.problem
    with pytest.raises(ValueError, match="Newton: got an inner loss of type Composite"):
        solve(case, Newton())
    case.problem = problem
    with pytest.raises(ValueError, match="Newton: got a Stream"):
        solve(case, Newton(), "unrolled", data=Stream(lambda t: case.data))


def change(case, name):
    images, labels, queries, targets = case.data
    if name == "labels":
        case.data = (images, labels + 7, queries, targets)
    elif name == "shape":
        case.data = (images, labels[:, :-1], queries, targets)
    elif name == "strength":
        case.head.strength = -1 * torch.ones(())
    elif name == "temperature":
        case.head.temperature = torch.zeros(())
    elif name == "features":
        case.head.features = lambda meta, data: data[0]
    elif name == "whole features":
        case.head.features = lambda meta, data: body(meta, data[0]).round().long()
    elif name == "complex targets":
        case.head.targets = lambda meta, data: data[1] + 0j
    else:
        case.head.bias = None


@pytest.mark.compared  # a loop comes first, and names the shapes of one task
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels", "targets: got class 9, expected class indices from 0 to 2"),
        ("shape", r"targets: got shape \(4,\), expected \(5, 3\)"),
        ("strength", "LinearHead strength: got -1.0, expected one number > 0"),
        ("temperature", "LinearHead temperature: got 0.0, expected one number > 0"),
        ("features", r"features: got shape \(5, 4\), expected \[m, 8\]"),
        ("whole features", "features: got torch.int64, expected real floating-point numbers"),
        ("complex targets", "targets: got torch.complex.*, expected real floating-point numbers"),
        ("bias", r"got the parameters \['bias', 'weight'\], expected \['weight'\]"),
    ],
)
def test_what_does_not_fit_is_named(name, message):
    case = make()
    change(case, name)
    with pytest.raises(ValueError, match=message):
        solve(case, Newton())


def test_a_head_checks_its_numbers():
    with pytest.raises(ValueError, match="LinearHead strength: got 0, expected a number > 0"):
        LinearHead(len, len, loss=SquaredError(), strength=0)
    with pytest.raises(ValueError, match="LinearHead loss: got 'softmax', expected a ConvexLoss"):
        LinearHead(len, len, loss="softmax", strength=1.0)
