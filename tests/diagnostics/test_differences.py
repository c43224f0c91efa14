"""Finite differences of functions whose derivatives are known."""

import pytest
import torch
from oracles import randn

from metaimplicit.diagnostics.differences import (
    cosine,
    dot,
    extrapolated_differences,
    random_directions,
    relative_error,
    settled_differences,
)

META = {"a": randn(3, seed=1), "b": randn(2, 2, seed=2)}
DIRECTIONS = random_directions(META, count=2, seed=0)


def each(step, directions):
    return torch.full((len(directions),), step, dtype=torch.float64)


def power(exponent):
    """F(φ) = Σ φᵖ."""
    return lambda meta: torch.stack([m.pow(exponent).sum() for m in meta.values()]).sum()


def test_directions_have_norm_one_and_the_shapes_of_the_entries():
    for direction in DIRECTIONS:
        assert direction["b"].shape == (2, 2)
        norm = torch.cat([d.flatten() for d in direction.values()]).norm()
        assert float(norm) == pytest.approx(1.0)
    assert not torch.equal(DIRECTIONS[0]["a"], DIRECTIONS[1]["a"])


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 10.0), (torch.float64, 1e9)])
def test_the_round_off_of_a_large_value_is_noise(dtype, offset):
    """Differences of one step size may agree with those of another by chance."""
    meta = {name: m.to(dtype) for name, m in META.items()}
    directions = random_directions(meta, count=5, seed=1)
    differences = extrapolated_differences(
        lambda meta: offset + power(2)(meta), meta, directions, steps=each(1e-4, directions)
    )
    expected = torch.stack([dot({n: 2 * m for n, m in meta.items()}, d) for d in directions])
    agreement = differences.compare(expected)
    assert 0 < agreement.error <= agreement.noise < 2


def test_a_kink_at_the_point_itself_is_told_from_curvature():
    directions = [{"a": torch.tensor(1.0).double()}]

    def kink(slope):
        here = {"a": torch.zeros(()).double()}

        def curve(m):
            return slope * m["a"].abs() + 2 * m["a"] + 5 * m["a"].square()

        differences = extrapolated_differences(curve, here, directions, steps=each(0.1, directions))
        return differences.compare(torch.tensor([2.0]).double()).kink

    assert kink(0.0) < 1e-13
    assert kink(0.3) == pytest.approx(2 * 0.3 / 2)  # relative to the slope of 2


@pytest.mark.parametrize(("slope", "error"), [(0.0, 0.0), (1e-20, 0.0), (1e-3, 1.0)])
def test_where_the_value_does_not_move_slopes_above_its_round_off_are_wrong(slope, error):
    directions = [{"a": torch.tensor(1.0).double()}]
    here = {"a": torch.zeros(()).double()}
    differences = extrapolated_differences(
        lambda m: torch.ones(()).double(), here, directions, steps=each(1e-5, directions)
    )
    assert differences.compare(torch.tensor([slope]).double()).error == error


def test_the_cosine_is_that_of_vectors_of_any_size():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    for size in (1e-30, 1.0, 1e30):
        assert cosine(size * a, b) == pytest.approx(0.5**0.5)
    assert cosine(0 * a, b) == 0


def test_extrapolation_is_exact_for_a_cubic_function_at_any_step():
    differences = extrapolated_differences(power(3), META, DIRECTIONS, steps=each(0.5, DIRECTIONS))
    gradient = {name: 3 * m.square() for name, m in META.items()}
    expected = torch.stack([dot(gradient, direction) for direction in DIRECTIONS])
    assert relative_error(differences.extrapolated, expected) < 1e-12


def test_the_half_step_has_the_error_of_half_the_step():
    """For F = Σ φ³, a central difference of step h is off by h² Σ d³."""
    differences = extrapolated_differences(power(3), META, DIRECTIONS, steps=each(0.5, DIRECTIONS))
    cubes = torch.stack([power(3)(direction) for direction in DIRECTIONS])
    error = differences.half_step - differences.extrapolated
    assert relative_error(error, 0.25**2 * cubes) < 1e-10


@pytest.mark.parametrize("distance", [2e-6, 2e-8])
def test_a_kink_nearby_is_avoided_by_a_shorter_step(distance):
    here = {"a": torch.zeros(()).double()}
    directions = [{"a": torch.tensor(1.0).double()}]

    def bent(m):
        return 2 * m["a"] + (m["a"] - distance).relu()

    differences = settled_differences(
        bent, here, directions, steps=each(1e-5, directions), tolerance=1e-3
    )
    assert differences.steps < distance
    assert differences.extrapolated.item() == pytest.approx(2, rel=1e-5)
    longest = settled_differences(
        bent, here, directions, steps=each(1e-5, directions), tolerance=10.0
    )
    assert longest.steps == 1e-5
