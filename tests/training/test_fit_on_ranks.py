"""`fit` in several processes: the steps of one process, one writer, and one end for all."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from rank_group import run_on_ranks
from training.sinusoid_run import make_parts, make_sampler, no_decay, train, weights

from metaimplicit.learner import LostRanksError, Ranks
from metaimplicit.training import NonFiniteError, read_metrics, read_sealed_json

pytestmark = pytest.mark.slow
TOLERANCE = 1e-6  # float32


class DisturbedSampler:
    """A sampler that calls a function with each batch, and gives what that returns."""

    def __init__(self, sampler, disturb):
        self.sampler = sampler
        self.disturb = disturb
        self.state_dict = sampler.state_dict
        self.load_state_dict = sampler.load_state_dict

    def batches(self, count, workers=0, pin_memory=False):
        for episodes in self.sampler.batches(count, workers, pin_memory):
            yield self.disturb(self.sampler.position, episodes)


def train_share(out, ranks, disturb=None, **options):
    """Train in one process, and return the number of steps."""
    learner, optimizer, _ = make_parts(noisy=False)
    sampler = make_sampler(3, seed=3, split="train")  # unequal shares of two processes
    if disturb is not None:
        sampler = DisturbedSampler(sampler, disturb)
    if ranks.rank > 0:
        with torch.no_grad():
            for p in learner.parameters():
                p.fill_(math.nan)  # it takes those of the first process
    of_validation = make_sampler(3, seed=1, split="validation")
    settings = {
        "validation": lambda: [of_validation[i] for i in range(2)],
        "validate_every": 2,
        "schedule": no_decay,
        "ranks": ranks,
        **options,
    }
    progress = train(out, (learner, optimizer, sampler), **settings)
    end = {name: x.tolist() for name, x in weights(learner).items()}
    end["seconds"] = progress.seconds
    assert end == ranks.from_first(lambda: end)  # to the bit
    return progress.step


def curve(out):
    """The numbers of each line of a run. Those that it does not have are NaN."""
    return {
        (line["split"], line["step"]): [
            math.nan if line[name] is None else line[name]
            for name in line
            if name not in ("split", "step", "seconds")
        ]
        for line in read_metrics(out)
    }


def assert_same_curve(out, expected):
    one = curve(expected)
    several = curve(out)
    assert list(several) == list(one)
    for key, values in several.items():
        expected = pytest.approx(one[key], rel=TOLERANCE, abs=TOLERANCE, nan_ok=True)
        assert values == expected, key


def begin(rank, out):
    """A whole run, a part of one, and one whose data are spoilt."""
    ranks = Ranks.of_group()
    assert train_share(out / "whole", ranks) == 6
    assert train_share(out / "parts", ranks, steps=2) == 2

    def spoil(position, episodes):
        inputs, targets = episodes.query
        if position == 2:
            targets = targets.clone()
            targets[-1] = math.nan  # of the last task, which the last process has
        return replace(episodes, query=(inputs, targets))

    with pytest.raises(NonFiniteError, match="step 2: the query targets hold NaN or Inf"):
        train_share(out / "spoilt", ranks, spoil)


def end(rank, out):
    """The end of a run, one that is stopped, and one whose last process is killed."""
    ranks = Ranks.of_group()
    assert train_share(out / "parts", ranks, resume=True) == 6

    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))

    def stop(position, episodes):
        if position == 3 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return episodes

    assert train_share(out / "stopped", ranks, stop, checkpoint_every=100) == 3
    assert received == [signal.SIGTERM]

    def kill(position, episodes):
        if position == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return episodes

    with pytest.raises(LostRanksError):
        train_share(out / "killed", ranks, kill, checkpoint_every=3)
    return "the first process ends"


def test_processes_take_the_steps_of_one_and_end_together(tmp_path):
    train_share(tmp_path / "alone", Ranks())
    run_on_ranks(begin, 2, tmp_path)
    train_share(tmp_path / "parts", Ranks(), steps=4, resume=True)
    assert run_on_ranks(end, 2, tmp_path) == ["the first process ends", None]
    for name in ("stopped", "killed"):
        train_share(tmp_path / name, Ranks(), resume=True)
    for name in ("whole", "parts", "stopped", "killed"):
        assert_same_curve(tmp_path / name, tmp_path / "alone")
    sittings = read_sealed_json(tmp_path / "parts" / "config.json")["sittings"]
    assert [sitting.get("processes") for sitting in sittings] == [2, None, 2]
