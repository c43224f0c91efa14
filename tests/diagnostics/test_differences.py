"""Finite differences of functions whose derivatives are known."""

import pytest
import torch
from oracles import randn

from metaimplicit.diagnostics.differences import (
    dot,
    extrapolated_differences,
    random_directions,
    relative_error,
)

META = {"a": randn(3, seed=1), "b": randn(2, 2, seed=2)}
DIRECTIONS = random_directions(META, count=2, seed=0)


def power(exponent):
    """F(φ) = Σ φᵖ."""
    return lambda meta: torch.stack([m.pow(exponent).sum() for m in meta.values()]).sum()


def test_directions_have_norm_one_and_the_shapes_of_the_entries():
    for direction in DIRECTIONS:
        assert direction["b"].shape == (2, 2)
        norm = torch.cat([d.flatten() for d in direction.values()]).norm()
        assert float(norm) == pytest.approx(1.0)
    assert not torch.equal(DIRECTIONS[0]["a"], DIRECTIONS[1]["a"])


def test_extrapolation_is_exact_for_a_cubic_function_at_any_step():
    differences = extrapolated_differences(power(3), META, DIRECTIONS, step=0.5)
    gradient = {name: 3 * m.square() for name, m in META.items()}
    expected = torch.stack([dot(gradient, direction) for direction in DIRECTIONS])
    assert relative_error(differences.extrapolated, expected) < 1e-12


def test_the_half_step_has_the_error_of_half_the_step():
    """For F = Σ φ³, a central difference of step h is off by h² Σ d³."""
    differences = extrapolated_differences(power(3), META, DIRECTIONS, step=0.5)
    cubes = torch.stack([power(3)(direction) for direction in DIRECTIONS])
    error = differences.half_step - differences.extrapolated
    assert relative_error(error, 0.25**2 * cubes) < 1e-10
