"""Sine waves as MAML defines them."""

import numpy as np
import pytest
import torch

import tasks
from tasks.sinusoid import Sinusoid


def test_targets_are_the_labelled_wave_at_the_inputs():
    family = Sinusoid(shots=10, queries=7, split="train")
    episodes = family.sample(20, np.random.default_rng(0))
    amplitude = episodes.labels["amplitude"][:, None, None]
    phase = episodes.labels["phase"][:, None, None]
    for (x, y), points in ((episodes.support, 10), (episodes.query, 7)):
        assert x.shape == y.shape == (20, points, 1)
        assert x.dtype == y.dtype == torch.float32
        wave = amplitude * torch.sin(x.double() - phase)
        torch.testing.assert_close(y.double(), wave, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("amplitude", 0.1, 5.0), ("phase", 0.0, np.pi), ("x", -5.0, 5.0)]
)
def test_amplitudes_phases_and_inputs_are_uniform_on_the_ranges_of_the_paper(name, low, high):
    family = Sinusoid(shots=5, queries=5, split="train")
    episodes = family.sample(4000, np.random.default_rng(0))
    drawn = episodes.support[0].flatten() if name == "x" else episodes.labels[name]
    share = (drawn.double() - low) / (high - low)
    assert 0 <= share.min() < 0.005
    assert 0.995 < share.max() <= 1
    # Kolmogorov and Smirnov: beyond 1.95/√n at one seed in a thousand.
    uniform = torch.linspace(0, 1, len(share), dtype=torch.float64)
    distance = (share.sort().values - uniform).abs().max()
    assert distance < 1.95 / len(share) ** 0.5


def test_points_of_support_query_and_splits_differ():
    splits = tasks.load("sinusoid", shots=5, queries=5)
    points = []
    for family in (splits.train, splits.validation, splits.test):
        episodes = tasks.EpisodeSampler(family, tasks=2)[0]
        points += [episodes.support[0], episodes.query[0]]
    assert not any(torch.equal(points[i], points[j]) for i in range(6) for j in range(i))


@pytest.mark.parametrize("number", ["shots", "queries"])
def test_a_task_without_points_is_refused(number):
    with pytest.raises(ValueError, match=f"{number}: got 0, expected at least 1"):
        tasks.load("sinusoid", **{number: 0})
