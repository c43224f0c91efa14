"""Distortion of written characters, against a loop over pixels that interpolates by hand."""

import math

import numpy as np
import pytest
import torch
from image_family import few_shot

import tasks
from tasks import Distorted, EpisodeSampler
from tasks.distortion import distort, draw_maps


def pixel(image, row, column):
    """The value between pixels, by bilinear interpolation, with the edge going on outside."""
    height, width = image.shape
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    top, left = math.floor(row), math.floor(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = row - top, column - left
    upper = (1 - across) * image[top, left] + across * image[top, right]
    lower = (1 - across) * image[bottom, left] + across * image[bottom, right]
    return (1 - down) * upper + down * lower


def distort_by_hand(image, matrix, shift):
    height, width = image.shape
    result = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = j - (width - 1) / 2, i - (height - 1) / 2
            right = matrix[0, 0] * x + matrix[0, 1] * y + width * shift[0]
            down = matrix[1, 0] * x + matrix[1, 1] * y + height * shift[1]
            result[i, j] = pixel(image, down + (height - 1) / 2, right + (width - 1) / 2)
    return result


def test_distortion_equals_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 7, 5, generator=generator, dtype=torch.float64)
    matrices, shifts = draw_maps(6, np.random.default_rng(2))
    got = distort(images, matrices, shifts)
    for image, matrix, shift, result in zip(images, matrices, shifts, got, strict=True):
        assert (distort_by_hand(image[0], matrix, shift) - result[0]).abs().max() <= 1e-12


def test_a_quarter_turn_is_exact():
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)
    got = distort(image, turn, torch.zeros(1, 2, dtype=torch.float64))
    assert (got - image.rot90(1, (2, 3))).abs().max() <= 1e-12


def test_the_maps_are_drawn_as_the_formula_says():
    matrices, shifts = draw_maps(4000, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    is_drawn = rng.integers(0, 2, size=(7, 4000))
    draws = is_drawn * rng.uniform(-1, 1, size=(7, 4000))
    for i in range(0, 4000, 37):
        angle, rho_1, rho_2, s_1, s_2, *move = draws[:, i]
        angle = angle * 10 * math.pi / 180
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shear = np.array([[1, 0.3 * rho_1], [0.3 * rho_2, 1]])
        expected = turn @ shear @ np.diag([1 + 0.2 * s_1, 1 + 0.2 * s_2])
        assert np.abs(matrices[i].numpy() - expected).max() <= 1e-12
        assert np.abs(shifts[i].numpy() - np.array(move) * 2 / 28).max() <= 1e-12
    is_unmoved = (shifts == 0).double().mean(0)
    assert ((is_unmoved - 0.5).abs() < 0.05).all()


def test_an_image_that_nothing_is_drawn_for_stays_as_it_is():
    images = torch.rand(3, 1, 9, 8)
    got = distort(images, torch.eye(2).expand(3, 2, 2), torch.zeros(3, 2))
    assert (got - images).abs().max() <= 1e-6


def test_the_tasks_are_those_without_distortion():
    family = few_shot(channels=1)
    plain = EpisodeSampler(family, tasks=3, seed=7)[2]
    changed = EpisodeSampler(Distorted(family), tasks=3, seed=7)[2]
    assert torch.equal(changed.labels["classes"], plain.labels["classes"])
    assert torch.equal(changed.query[1], plain.query[1])
    again = EpisodeSampler(Distorted(family), tasks=3, seed=7)[2]
    assert torch.equal(changed.query[0], again.query[0])
    assert not torch.equal(changed.query[0], plain.query[0])
    assert changed.query[0].min() >= 0
    assert changed.query[0].max() <= 1


@pytest.mark.parametrize("family", [few_shot(), tasks.load("sinusoid").train])
def test_what_has_not_one_channel_is_refused(family):
    with pytest.raises(ValueError, match="expected images with one channel"):
        Distorted(family)
