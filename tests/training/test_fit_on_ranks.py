"""`fit` in several processes: the steps of one process, one writer, and one end for all."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from rank_group import results, run_on_ranks, start
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
    """The end of a run in one process: its step, its time and its weights."""
    learner, optimizer, sampler = make_parts(noisy=False)
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
    bits = {name: x.tolist() for name, x in weights(learner).items()}
    return {"step": progress.step, "seconds": progress.seconds, "weights": bits}


def train_on_rank(rank, out, *settings):
    """Several runs or sittings, one after another."""
    return [train_share(out / name, Ranks.of_group(), **options) for name, options in settings]


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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train_share(out, Ranks())
    return out


def test_two_and_three_processes_have_the_curve_of_one_and_resume_each_other(tmp_path, alone):
    # Three processes share four tasks.
    firsts = run_on_ranks(train_on_rank, 3, tmp_path, ("whole", {}), ("parts", {"steps": 2}))
    train_share(tmp_path / "parts", Ranks(), steps=4, resume=True)
    lasts = run_on_ranks(train_on_rank, 2, tmp_path, ("parts", {"resume": True}))
    for ends in (firsts, lasts):
        for end in ends:
            assert end == ends[0]  # the same weights to the bit, the same step and time
    assert_same_curve(tmp_path / "whole", alone)
    assert_same_curve(tmp_path / "parts", alone)
    assert lasts[0][0]["step"] == 6
    sittings = read_sealed_json(tmp_path / "parts" / "config.json")["sittings"]
    assert [sitting.get("processes") for sitting in sittings] == [3, None, 2]


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, alone):
    ends = run_on_ranks(stop_on_rank, 2, tmp_path)
    assert ends[0] == ends[1] == 3
    train_share(tmp_path, Ranks(), resume=True)
    assert_same_curve(tmp_path, alone)


def stop_on_rank(rank, out):
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))

    def disturb(position, episodes):
        if position == 3 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return episodes

    end = train_share(out, Ranks.of_group(), disturb, checkpoint_every=100)
    assert stopped == [signal.SIGTERM]
    return end["step"]


def test_a_killed_process_ends_the_run_which_resumes(tmp_path, alone):
    assert results(start(kill_last, 2, tmp_path)) == ["LostRanksError", None]
    train_share(tmp_path, Ranks(), resume=True)
    assert_same_curve(tmp_path, alone)


def kill_last(rank, out):
    def disturb(position, episodes):
        if position == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return episodes

    try:
        train_share(out, Ranks.of_group(), disturb, checkpoint_every=3)
    except LostRanksError as error:
        return type(error).__name__


def test_all_processes_refuse_the_data_of_one_of_them(tmp_path):
    assert (
        run_on_ranks(spoil_last, 2, tmp_path) == ["step 2: the query targets hold NaN or Inf"] * 2
    )


def spoil_last(rank, out):
    def disturb(position, episodes):
        inputs, targets = episodes.query
        if position == 2:
            targets = targets.clone()
            targets[-1] = math.nan  # of the last task, which the last process has
        return replace(episodes, query=(inputs, targets))

    try:
        train_share(out, Ranks.of_group(), disturb)
    except NonFiniteError as error:
        return str(error).partition(";")[0]
