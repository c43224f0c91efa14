"""Sine waves as MAML defines them."""

import numpy as np
import pytest
import torch

import tasks
from tasks.sinusoid import Sinusoid


def test_targets_are_the_labelled_wave_at_the_inputs():
    episodes = Sinusoid(shots=10, queries=7, split="train").sample(20, np.random.default_rng(0))
    amplitude, phase = (episodes.labels[k][:, None, None] for k in ("amplitude", "phase"))
    for (x, y), points in ((episodes.support, 10), (episodes.query, 7)):
        assert x.shape == y.shape == (20, points, 1)
        assert x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(
            y.double(), amplitude * torch.sin(x.double() - phase), rtol=0, atol=5e-6
        )


def test_amplitudes_phases_and_inputs_are_uniform_on_the_ranges_of_the_paper():
    episodes = Sinusoid(shots=5, queries=5, split="train").sample(4000, np.random.default_rng(0))
    drawn = {**episodes.labels, "x": episodes.support[0].flatten()}
    for name, (low, high) in {
        "amplitude": (0.1, 5.0),
        "phase": (0.0, np.pi),
        "x": (-5.0, 5.0),
    }.items():
        share = (drawn[name].double() - low) / (high - low)
        assert 0 <= share.min() < 0.005
        assert 0.995 < share.max() <= 1
        # Kolmogorov-Smirnov: beyond 1.95/√n at one seed in a thousand
        gap = (
            (share.sort().values - torch.linspace(0, 1, len(share), dtype=torch.float64))
            .abs()
            .max()
        )
        assert gap < 1.95 / len(share) ** 0.5


def test_support_and_query_points_and_splits_differ():
    splits = tasks.load("sinusoid", shots=5, queries=5)
    drawn = [
        tasks.EpisodeSampler(family, tasks=2)[0]
        for family in (splits.train, splits.validation, splits.test)
    ]
    points = [e.support[0] for e in drawn] + [e.query[0] for e in drawn]
    assert not any(torch.equal(points[i], points[j]) for i in range(6) for j in range(i))
    assert splits.train.name == "sinusoid/train"
    assert (splits.test.kind, splits.test.input_shape, splits.test.outputs) == (
        "regression",
        (1,),
        1,
    )


@pytest.mark.parametrize("number", ["shots", "queries"])
def test_no_points_are_refused(number):
    with pytest.raises(ValueError, match=f"{number}: got 0, expected at least 1"):
        tasks.load("sinusoid", **{number: 0})
