"""The Hessian and the Gauss–Newton matrix against dense matrices by `torch.func`."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import dense, generator, randn, relative_error
from small_classifier import (
    CLASSES,
    LOSSES,
    PARAMS,
    POINTS,
    SIZE,
    TARGETS,
    TASKS,
    X,
    loss_of,
    loss_of_task,
    network,
    of_task,
    outputs,
)

from metaimplicit.operators import GGN, Hessian
from metaimplicit.params import flatten

EXACT = ["double-backward", "forward-over-reverse", "gauss-newton"]


def build(name, kind):
    """The Gauss–Newton matrix, or the Hessian by a way of taking products."""
    loss = loss_of(kind)
    if name == "gauss-newton":
        return GGN(outputs, loss, PARAMS)
    return Hessian(lambda p: loss(outputs(p)), PARAMS, products=name)


def expected_matrix(name, kind, task):
    if name != "gauss-newton":
        theta, loss = loss_of_task(kind, task)
        return torch.func.hessian(loss)(theta)
    loss, targets = LOSSES[kind]
    theta, flat_outputs = of_task(lambda p: network(p, X[task]).flatten(), task)
    jacobian = torch.func.jacrev(flat_outputs)(theta)
    output_hessian = torch.func.hessian(lambda z: loss(z.reshape(POINTS, CLASSES), targets[task]))(
        flat_outputs(theta)
    )
    return jacobian.T @ output_hessian @ jacobian


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("name", EXACT)
def test_an_operator_is_its_dense_matrix(name, kind):
    matrix = dense(build(name, kind))
    for task in range(TASKS):
        assert relative_error(matrix[task], expected_matrix(name, kind, task)) < 1e-12


def test_finite_differences_are_the_hessian_to_their_own_accuracy():
    operator = build("finite-differences", "neither")
    matrix = dense(operator)
    for task in range(TASKS):
        assert relative_error(matrix[task], expected_matrix("hessian", "neither", task)) < 1e-8
    # The step is as long as θ says, not as v does.
    v = randn(*operator.shape, seed=6)
    assert relative_error(operator.matvec(1e6 * v), 1e6 * operator.matvec(v)) < 1e-12
    assert operator.matvec(0 * v).abs().max() == 0


@pytest.mark.parametrize("name", EXACT)
def test_an_operator_carries_the_gradient(name):
    gradient = flatten(build(name, "cross-entropy").gradient).detach()
    for task in range(TASKS):
        theta, loss = loss_of_task("cross-entropy", task)
        assert relative_error(gradient[task], torch.func.grad(loss)(theta)) < 1e-13


def test_the_gauss_newton_matrix_is_semidefinite_where_the_hessian_is_not():
    smallest = {
        name: torch.linalg.eigvalsh(dense(build(name, "cross-entropy"))).min() for name in EXACT
    }
    assert smallest["double-backward"] < -1e-3
    assert smallest["gauss-newton"] > -1e-13


def test_a_loss_without_curvature_gives_zero():
    v = randn(TASKS, SIZE, seed=7)
    with pytest.warns(RuntimeWarning, match="the loss is linear in the outputs"):
        linear_in_z = GGN(outputs, lambda z: z.flatten(1).mean(1), PARAMS)
    assert linear_in_z.matvec(v).abs().max() == 0
    linear_in_theta = Hessian(lambda p: flatten(p).sum(1), PARAMS)
    assert linear_in_theta.matvec(v).abs().max() == 0
    assert linear_in_theta.matmat(v.unsqueeze(0)).shape == (1, *v.shape)
    assert linear_in_theta.columns(torch.tensor([2, 0])).shape == (2, *v.shape)
    constant = Hessian(lambda p: torch.ones(TASKS).double(), PARAMS)
    assert constant.matvec(v).abs().max() == 0
    assert flatten(constant.gradient).abs().max() == 0


# whether the loss is convex in the outputs


@pytest.mark.parametrize(
    ("loss", "convex"),
    [
        (loss_of("cross-entropy"), True),
        (lambda z: z.square().mean((1, 2)), True),
        (lambda z: -z.square().mean((1, 2)), False),
        # Cauchy's loss bends down far from its minimum.
        (lambda z: torch.log1p((z - TARGETS).square()).mean((1, 2)), False),
    ],
    ids=["cross-entropy", "square", "concave", "cauchy"],
)
def test_a_loss_that_is_not_convex_in_the_outputs_is_refused(loss, convex):
    operator = GGN(outputs, loss, PARAMS)
    if convex:
        operator.check_convex()
        return
    message = r"not convex in the outputs \(curvature -.*use curvature='hessian'"
    with pytest.raises(ValueError, match=message):
        operator.check_convex()


def test_saturated_logits_in_single_precision_are_convex():
    for seed in range(20):
        params = {"z": 50 * torch.randn(4, 6, 5, generator=generator(seed))}
        labels = params["z"].argmax(-1)

        def loss(z, y=labels):
            return torch.vmap(F.cross_entropy)(z, y)

        GGN(lambda p: p["z"], loss, params).check_convex()


def test_one_output_that_bends_down_a_little_is_found():
    params = {"z": torch.tensor([0.5, 2.0], dtype=torch.float64)}
    curvature = torch.tensor([1.0, -1e-5], dtype=torch.float64)
    operator = GGN(lambda p: p["z"], lambda z: curvature * z.square(), params)
    with pytest.raises(ValueError, match="not convex"):
        operator.check_convex()


def test_a_loss_that_holds_single_precision_is_checked_in_it():
    """Its outputs cannot be turned into float64."""
    params = {"z": torch.randn(2, 3, generator=generator(0))}
    weight = torch.ones(3, 3)
    GGN(lambda p: p["z"], lambda z: (z @ weight).square().sum(1), params).check_convex()
    concave = GGN(lambda p: p["z"], lambda z: -(z @ weight).square().sum(1), params)
    with pytest.raises(ValueError, match="not convex"):
        concave.check_convex()


def test_an_unknown_way_of_taking_products_is_refused():
    with pytest.raises(ValueError, match="Hessian products: got 'forward', expected one of double"):
        build("forward", "cross-entropy")


def test_complex_outputs_have_the_matrix_of_their_real_and_imaginary_parts():
    w = {"w": randn(2, 3, seed=1)}
    rotation = torch.complex(randn(3, 3, seed=2), randn(3, 3, seed=3))

    def outputs(params):
        return (params["w"] ** 2).to(rotation) @ rotation

    def loss(z):
        return (z.abs().square() + 1).sqrt().sum(1)

    def parts(params):
        return torch.view_as_real(outputs(params)).flatten(1)

    def loss_of_parts(x):
        return loss(torch.view_as_complex(x.unflatten(1, (3, 2))))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = GGN(outputs, loss, w)
        operator.check_convex()
    assert relative_error(dense(operator), dense(GGN(parts, loss_of_parts, w))) < 1e-12


def test_a_loss_of_complex_outputs_that_is_not_convex_is_refused():
    operator = GGN(
        lambda p: p["w"] * 1j, lambda z: -z.abs().square().sum(1), {"w": randn(2, 3, seed=1)}
    )
    with pytest.raises(ValueError, match="not convex in the outputs"):
        operator.check_convex()
