"""Truncated conjugate gradients and the ratio of reductions, against formulas for one task."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import Matrix, randn, relative_error, symmetric
from trust_region_by_hand import steihaug

from metaimplicit.solvers.trust_region import reduction_ratio, truncated_cg

SPECTRA = [[0.5, 1, 2, 3, 4], [1, 1, 2, 2, 8], [0.1, 0.2, 0.4, 0.8, 1.6]]
INDEFINITE = [[-2, -1, 1, 3, 4], [1, 2, 3, 4, 5], [-0.1, 0.5, 1, 2, 30]]
TASKS = 3
N = 5
G = randn(TASKS, N, seed=1)
ONES = torch.ones(TASKS, 1, dtype=torch.float64)


def minimise(operator, g, radius, tol, steps, **options):
    """m(s) = gᵀs + ½ sᵀHs over ‖s‖ ≤ Δ."""
    return truncated_cg(operator.matvec, -g, tol=tol, max_steps=steps, radius=radius, **options)


def reduction_of(h, g, s):
    return -(g * s).sum(1) - 0.5 * torch.einsum("ti,tij,tj->t", s, h, s)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("spectra", [SPECTRA, INDEFINITE])
@pytest.mark.parametrize("scale", [0.05, 0.6, 2.0, 50.0])
@pytest.mark.parametrize("tol", [1e-12, 0.8])
def test_a_step_is_that_of_steihaugs_algorithm(spectra, scale, steps, tol):
    h = symmetric(spectra)
    radius = scale * torch.tensor([[1.0], [0.3], [2.0]], dtype=torch.float64)
    result = minimise(Matrix(h), G, radius, tol * ONES, steps)
    reduction = reduction_of(h, G, result.step)
    for i in range(TASKS):
        expected, at_boundary = steihaug(G[i], h[i], float(radius[i]), tol, steps)
        assert relative_error(result.step[i], expected) < 1e-11
        assert abs(float(result.reduction[i] - reduction[i])) < 1e-11 * float(reduction[i])
        assert float(reduction[i]) > 0
        assert bool(result.at_boundary[i]) == at_boundary
        if at_boundary:
            assert abs(float(result.step[i].norm() / radius[i]) - 1) < 1e-13


def test_one_step_is_cauchys_and_n_steps_in_a_wide_region_are_newtons():
    h = symmetric(SPECTRA)
    small = 1e-3 * ONES
    cauchy = minimise(Matrix(h), G, small, 0 * ONES, steps=1).step
    assert relative_error(cauchy, -small * F.normalize(G, dim=1)) < 1e-14
    newton = minimise(Matrix(h), G, 1e3 * ONES, 0 * ONES, steps=N).step
    assert relative_error(newton, -torch.linalg.solve(h, G)) < 1e-10


def test_negative_curvature_leads_to_the_boundary():
    h = -symmetric(SPECTRA)
    operator = Matrix(h)
    result = minimise(operator, G, 7 * ONES, 0 * ONES, steps=N)
    assert operator.products == 1
    assert relative_error(result.step, -7 * F.normalize(G, dim=1)) < 1e-14
    assert bool(result.at_boundary.all())
    assert relative_error(result.reduction[:, 0], reduction_of(h, G, result.step)) < 1e-13


@pytest.mark.parametrize("spectra", [SPECTRA, INDEFINITE])
def test_without_a_radius_a_task_stays_before_negative_curvature(spectra):
    h = symmetric(spectra)
    free = minimise(Matrix(h), G, None, 0 * ONES, steps=N)
    bounded = minimise(Matrix(h), G, 1e6 * ONES, 0 * ONES, steps=N)
    assert not free.at_boundary.any()
    for i in range(TASKS):
        ended_early = bool(bounded.at_boundary[i])
        assert ended_early == bool(free.curvature[i] <= 0)
        if not ended_early:
            assert relative_error(free.step[i], bounded.step[i]) < 1e-12
        descent = float(G[i] @ free.step[i])
        assert descent < 0 or not free.step[i].any()
    assert bool((free.curvature <= 0).any()) == (spectra is INDEFINITE)


def test_a_task_that_is_not_active_stays_and_products_end_with_the_last_active_task():
    operator = Matrix(symmetric([[2.0] * N, [2.0] * N, [1, 2, 3, 4, 5]]))
    active = torch.tensor([[True], [True], [False]])
    s = minimise(operator, G, 1e3 * ONES, 1e-10 * ONES, steps=N, active=active).step
    assert operator.products == 1
    assert relative_error(s[:2], -G[:2] / 2) < 1e-15
    assert torch.equal(s[2], torch.zeros(N, dtype=torch.float64))


def test_steps_past_convergence_do_no_harm():
    """A residual of round-off meets negative curvature sooner or later."""
    h = symmetric(SPECTRA)
    result = minimise(Matrix(h), G, 1e3 * ONES, 0 * ONES, steps=100)
    assert relative_error(result.step, -torch.linalg.solve(h, G)) < 1e-12
    assert not result.at_boundary.any()


@pytest.mark.parametrize(
    ("before", "after", "predicted", "expected"),
    [
        (3.0, 2.0, 2.0, 0.5),
        (3.0, 4.0, 2.0, -0.5),
        (3.0, 4.0, -2.0, -math.inf),  # the model does not fall
        (3.0, math.nan, 2.0, -math.inf),
        (3.0, -math.inf, 2.0, -math.inf),
        (3.0, 2.0, math.nan, -math.inf),
        (0.0, 0.0, 0.0, 1.0),  # nothing was predicted, and nothing happened
        (0.0, 1.0, 0.0, -math.inf),
    ],
)
def test_the_ratio_is_that_of_the_reductions(before, after, predicted, expected):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (before, after, predicted)]
    ratio = float(reduction_ratio(*numbers, eps=1e-16))
    assert ratio == expected or ratio == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("after", "predicted", "expected"),
    [
        (1.0, 1e-9, 0.5),  # round-off hides the fall
        (1.0, 1e-7, 0.0),  # it would have been seen
        (1.0, -1e-9, -math.inf),
        (2.0, 1e-9, -1e9),
    ],
)
def test_the_ratio_of_a_fall_that_round_off_hides_is_a_half(after, predicted, expected):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (1.0, after, predicted)]
    ratio = float(reduction_ratio(*numbers, eps=0.0, roundoff=1e-8))
    assert ratio == expected or ratio == pytest.approx(expected, rel=1e-6)


def test_at_round_off_the_ratio_tends_to_one():
    eps = torch.finfo(torch.float64).eps
    before = torch.tensor(1e8).double()
    predicted = torch.tensor(1e-12).double()
    for rounding in (-1, 0, 1):
        after = before * (1 + rounding * eps)
        assert 0.8 < float(reduction_ratio(before, after, predicted, eps=eps)) < 1.2
