"""Every operator against its dense matrix."""

import pytest
import torch
import torch.nn.functional as F
from oracles import Matrix, generator, randn, relative_error, symmetric

from metaimplicit import GGN, Diagonal, Fisher, Hessian, Identity
from metaimplicit.operators import Scaled
from metaimplicit.params import flatten, unflatten

TASKS, POINTS, INPUTS, HIDDEN, CLASSES = 3, 7, 4, 5, 3
X = randn(TASKS, POINTS, INPUTS, seed=0)
LABELS = torch.arange(POINTS).remainder(CLASSES).expand(TASKS, -1)
TARGETS = randn(TASKS, POINTS, CLASSES, seed=1)
PARAMS = {
    "w1": 0.7 * randn(TASKS, INPUTS, HIDDEN, seed=2),
    "b1": randn(TASKS, HIDDEN, seed=3),
    "w2": 0.7 * randn(TASKS, HIDDEN, CLASSES, seed=4),
    "scale": 1 + 0.1 * randn(TASKS, seed=5),
}


def net(params, x):
    return params["scale"] * (torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"])


OUTPUT_LOSSES = {
    "cross-entropy": (F.cross_entropy, LABELS),
    "mse": (F.mse_loss, TARGETS),
    "user": (lambda z, y: torch.logsumexp(z, -1).square().mean() + (z - y).pow(4).mean(), TARGETS),
}


def lifted(kind):
    loss, y = OUTPUT_LOSSES[kind]
    outputs = torch.vmap(net)
    return (lambda p: outputs(p, X)), (lambda z: torch.vmap(loss)(z, y)), loss, y


def dense_hessian(function, task):
    """By `torch.func`, of one task's loss as a function of its flat parameters."""
    one = {name: p[task : task + 1] for name, p in PARAMS.items()}
    flat = flatten(one)[0]

    def of_flat(vector):
        return function({name: p[0] for name, p in unflatten(vector.unsqueeze(0), one).items()})

    return flat, of_flat


def expected_hessian(kind, task):
    *_, loss, y = lifted(kind)
    flat, of_flat = dense_hessian(lambda p: loss(net(p, X[task]), y[task]), task)
    return torch.func.hessian(of_flat)(flat)


def expected_gauss_newton(kind, task):
    *_, loss, y = lifted(kind)
    flat, of_flat = dense_hessian(lambda p: net(p, X[task]).flatten(), task)
    jacobian = torch.func.jacrev(of_flat)(flat)
    z = of_flat(flat)
    output_hessian = torch.func.hessian(lambda v: loss(v.reshape(POINTS, CLASSES), y[task]))(z)
    return jacobian.T @ output_hessian @ jacobian


def build(name, kind):
    outputs, loss, *_ = lifted(kind)
    if name == "gauss-newton":
        return GGN(outputs, loss, PARAMS)
    return Hessian(lambda p: loss(outputs(p)), PARAMS, products=name)


@pytest.mark.parametrize("kind", OUTPUT_LOSSES)
@pytest.mark.parametrize("name", ["double-backward", "forward-over-reverse", "gauss-newton"])
def test_operator_equals_its_dense_matrix(name, kind):
    operator = build(name, kind)
    tasks, n = operator.shape
    eye = torch.eye(n, dtype=torch.float64)[:, None, :].expand(-1, tasks, -1)
    columns = operator.matmat(eye)
    expected = expected_gauss_newton if name == "gauss-newton" else expected_hessian
    for task in range(tasks):
        assert relative_error(columns[:, task], expected(kind, task)) < 1e-12
    v = randn(tasks, n, seed=6)
    assert relative_error(operator.matvec(v), torch.einsum("jti,tj->ti", columns, v)) < 1e-12
    index = torch.tensor([n - 1, 0, 22, 3, 21, n - 1])  # of several tensors, out of order
    assert relative_error(operator.columns(index), columns[index]) < 1e-12
    assert relative_error(operator.columns(index[2:3]), columns[index[2:3]]) < 1e-12
    some = 2.0 * (operator + Identity(operator, 0.5))
    expected = 2 * columns[index] + torch.nn.functional.one_hot(index, n)[:, None, :]
    assert relative_error(some.columns(index), expected) < 1e-12


@pytest.mark.parametrize("name", ["double-backward", "forward-over-reverse", "gauss-newton"])
def test_operator_carries_the_gradient(name):
    operator = build(name, "cross-entropy")
    for task in range(TASKS):
        flat, of_flat = dense_hessian(
            lambda p, t=task: F.cross_entropy(net(p, X[t]), LABELS[t]), task
        )
        assert (
            relative_error(
                flatten(operator.gradient)[task].detach(), torch.func.grad(of_flat)(flat)
            )
            < 1e-13
        )


def test_gauss_newton_is_psd_where_the_hessian_is_not():
    values = {}
    for name in ("double-backward", "gauss-newton"):
        operator = build(name, "cross-entropy")
        eye = torch.eye(operator.shape[1], dtype=torch.float64)[:, None, :].expand(-1, TASKS, -1)
        values[name] = torch.linalg.eigvalsh(operator.matmat(eye).transpose(0, 1)).min()
    assert values["double-backward"] < -1e-3
    assert values["gauss-newton"] > -1e-13


@pytest.mark.parametrize("kind", OUTPUT_LOSSES)
def test_finite_differences_are_the_hessian_to_their_own_accuracy(kind):
    operator = build("finite-differences", kind)
    eye = torch.eye(operator.shape[1], dtype=torch.float64)[:, None, :].expand(-1, TASKS, -1)
    columns = operator.matmat(eye)
    for task in range(TASKS):
        error = relative_error(columns[:, task], expected_hessian(kind, task))
        assert error < 1e-8
    v = randn(*operator.shape, seed=6)
    assert (
        relative_error(operator.matvec(1e6 * v), 1e6 * operator.matvec(v)) < 1e-12
    )  # the step is θ's, not v's
    assert operator.matvec(0 * v).abs().max() == 0


def fisher(expectation, likelihood="softmax", **options):
    outputs = torch.vmap(net)
    kind = "cross-entropy" if likelihood == "softmax" else "mse"
    _, loss, *_ = lifted(kind)
    scale = 1.0 if likelihood == "softmax" else CLASSES / 2  # ½‖z − y‖² summed over d
    return Fisher(
        lambda p: outputs(p, X),
        lambda z: scale * loss(z),
        PARAMS,
        likelihood=likelihood,
        expectation=expectation,
        **options,
    )


def dense(operator):
    eye = torch.eye(operator.shape[1], dtype=torch.float64)[:, None, :].expand(
        -1, operator.shape[0], -1
    )
    return operator.matmat(eye).transpose(0, 1)


def log_likelihood(likelihood, z, y):
    return torch.log_softmax(z, -1)[y] if likelihood == "softmax" else -0.5 * (z - y).square().sum()


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_exact_fisher_is_the_gauss_newton_matrix_of_the_likelihood(likelihood):
    outputs = torch.vmap(net)
    _, loss, *_ = lifted("cross-entropy" if likelihood == "softmax" else "mse")
    scale = 1.0 if likelihood == "softmax" else CLASSES / 2
    expected = dense(GGN(lambda p: outputs(p, X), lambda z: scale * loss(z), PARAMS))
    assert relative_error(dense(fisher("exact", likelihood)), expected) < 1e-12


def test_exact_fisher_is_the_expectation_over_the_classes():
    """E_y of the outer products of ∂ log p(y|x)/∂θ, class by class, example by example."""
    got = dense(fisher("exact"))
    for task in range(TASKS):
        expected = 0
        for i in range(POINTS):
            flat, of_flat = dense_hessian(
                lambda p, t=task, i=i: torch.log_softmax(net(p, X[t]), -1)[i], task
            )
            scores, probabilities = torch.func.jacrev(of_flat)(flat), of_flat(flat).exp()
            expected = expected + scores.T @ torch.diag(probabilities) @ scores / POINTS
        assert relative_error(got[task], expected) < 1e-12


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_empirical_fisher_is_made_of_the_examples_own_gradients(likelihood):
    got, y = dense(fisher("empirical", likelihood)), LABELS if likelihood == "softmax" else TARGETS
    for task in range(TASKS):

        def each(p, t=task):
            return torch.stack(
                [log_likelihood(likelihood, z, c) for z, c in zip(net(p, X[t]), y[t], strict=True)]
            )

        flat, of_flat = dense_hessian(each, task)
        gradients = torch.func.jacrev(of_flat)(flat)
        assert relative_error(got[task], gradients.T @ gradients / POINTS) < 1e-12


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_sampled_fisher_is_made_of_its_draws_and_tends_to_the_exact_one(likelihood):
    few, again = (
        fisher("monte-carlo", likelihood, samples=2, generator=generator(3)) for _ in range(2)
    )
    assert torch.equal(dense(few), dense(again))
    assert torch.linalg.matrix_rank(dense(few)[0]) <= 2 * POINTS
    exact = dense(fisher("exact", likelihood))
    errors = [
        relative_error(
            dense(fisher("monte-carlo", likelihood, samples=s, generator=generator(0))), exact
        )
        for s in (100, 10000)
    ]
    assert errors[1] < 0.03
    assert 4 < errors[0] / errors[1] < 25  # like 1/√samples


def test_the_symmetrised_divergence_bends_as_the_fisher_matrix():
    """½(KL(p_θ‖p_θ+δ) + KL(p_θ+δ‖p_θ)) has the Hessian F at δ = 0."""
    got = dense(fisher("exact"))
    for task in range(TASKS):
        flat, logits = dense_hessian(lambda p, t=task: torch.log_softmax(net(p, X[t]), -1), task)

        def divergence(delta, flat=flat, logits=logits):
            here, there = logits(flat), logits(flat + delta)
            return 0.5 * ((here.exp() - there.exp()) * (here - there)).sum(-1).mean()

        assert (
            relative_error(got[task], torch.func.hessian(divergence)(torch.zeros_like(flat))) < 1e-8
        )


def test_a_loss_without_curvature_gives_zero():
    outputs = torch.vmap(net)
    linear_in_z = GGN(lambda p: outputs(p, X), lambda z: z.flatten(1).mean(1), PARAMS)
    v = randn(*linear_in_z.shape, seed=7)
    assert linear_in_z.matvec(v).abs().max() == 0
    linear_in_theta = Hessian(lambda p: flatten(p).sum(1), PARAMS)
    assert linear_in_theta.matvec(v).abs().max() == 0
    assert linear_in_theta.matmat(v.unsqueeze(0)).shape == (1, *v.shape)
    assert linear_in_theta.columns(torch.tensor([2, 0])).shape == (2, *v.shape)


def test_a_diagonal_is_exact_or_the_mean_over_its_signs():
    operator = build("gauss-newton", "cross-entropy")
    tasks, n = operator.shape
    eye = torch.eye(n, dtype=torch.float64)[:, None, :].expand(-1, tasks, -1)
    matrix = operator.matmat(eye).transpose(0, 1)
    exact = matrix.diagonal(dim1=1, dim2=2)
    assert relative_error(Diagonal(operator, samples=None).values, exact) < 1e-12
    few = Diagonal(operator, samples=4, generator=generator(3))
    signs = 1 - 2 * torch.randint(2, (4, 1, n), generator=generator(3)).double()
    expected = sum(s * (matrix @ s.T).squeeze(-1) for s in signs) / 4
    assert relative_error(few.values, expected) < 1e-12
    # all 2ⁿ sign vectors of a small matrix: the mean is the diagonal itself
    small = symmetric([[1.0, 4.0, -2.0]])
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    assert relative_error((every * (every @ small[0])).mean(0), small[0].diagonal()) < 1e-14
    v = randn(tasks, n, seed=6)
    assert relative_error(few.matvec(v), few.values * v) < 1e-15
    assert relative_error(few.matmat(v[None])[0], few.values * v) < 1e-15
    assert relative_error(few.inverse(v, 0.5), v / (few.values.clamp(min=0) + 0.5)) < 1e-15
    assert (few.setup_products, Diagonal(operator, samples=None).setup_products) == (4, n)
    bent = Matrix(symmetric([[-1.0, 2.0, -3.0]]))
    assert (Diagonal(bent, samples=3, generator=generator(1)).values < 0).any()
    clamped = Diagonal(bent, samples=3, semidefinite=True, generator=generator(1)).values
    assert torch.equal(
        clamped, Diagonal(bent, samples=3, generator=generator(1)).values.clamp(min=0)
    )
    for name, gradient in few.gradient.items():
        assert torch.equal(gradient, operator.gradient[name])
    with pytest.raises(ValueError, match="Diagonal samples: got 0, expected at least 1"):
        Diagonal(operator, samples=0)


def test_a_loss_that_is_not_convex_in_the_outputs_is_told():
    outputs = torch.vmap(net)
    for loss, convex in (
        (lambda z: torch.vmap(F.cross_entropy)(z, LABELS), True),
        (lambda z: z.square().mean((1, 2)), True),
        (
            lambda z: torch.log1p((z - TARGETS).square()).mean((1, 2)),
            False,
        ),  # Cauchy's: bent down far out
        (lambda z: -z.square().mean((1, 2)), False),
        (lambda z: z.sum((1, 2)), True),
    ):
        operator = GGN(lambda p: outputs(p, X), loss, PARAMS)
        if convex:
            operator.check_convex()
        else:
            with pytest.raises(
                ValueError,
                match=r"not convex in the outputs \(curvature -.*use curvature='hessian'",
            ):
                operator.check_convex()


def test_saturated_logits_in_single_precision_are_still_convex():
    for seed in range(20):
        params = {"z": 50 * torch.randn(4, 6, 5, generator=generator(seed))}
        labels = params["z"].argmax(-1)
        operator = GGN(
            lambda p: p["z"], lambda z, y=labels: torch.vmap(F.cross_entropy)(z, y), params
        )
        operator.check_convex()
    scalar = {"z": torch.tensor([0.5, 2.0], dtype=torch.float64)}
    bent = torch.tensor([1.0, -1e-5], dtype=torch.float64)
    with pytest.raises(ValueError, match="not convex"):
        GGN(lambda p: p["z"], lambda z: bent * z.square(), scalar).check_convex()
    fisher(expectation="exact").check_convex()


def test_algebra_and_split():
    a, b = symmetric([[1.0, 2.0, 4.0]], seed=1), symmetric([[3.0, -1.0, 2.0]], seed=2)
    operator = 2.0 * (Matrix(a) + Identity(Matrix(a), 0.5)) + (Matrix(b) + Identity(Matrix(b), 3.0))
    expected = 2 * a + b + 4 * torch.eye(3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)[:, None, :]
    assert relative_error(operator.matmat(eye)[:, 0], expected[0]) < 1e-14
    v = randn(1, 3, seed=3)
    assert relative_error(operator.matvec(v), (expected @ v.unsqueeze(-1)).squeeze(-1)) < 1e-14
    core, sigma = operator.split()
    assert sigma == 4.0
    assert relative_error(core.matmat(eye)[:, 0], (2 * a + b)[0]) < 1e-14
    core, sigma = (Identity(v, 2.0) + Scaled(3.0, Identity(v, 1.0))).split()
    assert sigma == 5.0
    assert core.matvec(v).abs().max() == 0


def test_bad_operators_are_refused():
    with pytest.raises(ValueError, match=r"operator sum: got shapes \(1, 2\) and \(1, 3\)"):
        Matrix(symmetric([[1.0, 2.0]])) + Identity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="Hessian products: got 'forward'"):
        Hessian(lambda p: flatten(p).sum(1), PARAMS, products="forward")
    for change, message in (
        ({"likelihood": "poisson"}, "Fisher likelihood: got 'poisson'"),
        ({"expectation": "sampled"}, "Fisher expectation: got 'sampled'"),
        ({"samples": 0}, "Fisher samples: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher(**({"expectation": "exact"} | change))
    with pytest.raises(
        ValueError, match=r"Fisher outputs: got shape \(3, 7\), expected \[tasks, examples"
    ):
        Fisher(lambda p: torch.vmap(net)(p, X).sum(-1), lambda z: z.square().mean(1), PARAMS)
