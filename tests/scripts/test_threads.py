"""The number of CPU threads of a run."""

import time

import pytest
import torch
import train
from command_line import build_learner, choose_threads

from metaimplicit.learner import Ranks


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step_of(seconds):
    """A step that takes a time for each number of threads, and lists these numbers."""
    threads = []

    def step():
        threads.append(torch.get_num_threads())
        time.sleep(seconds[threads[-1]])

    return step, threads


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [({1: 0.04, 2: 0.01}, 2), ({1: 0.01, 2: 0.04}, 1), ({1: 0.04, 2: 0.04}, 1)],
    ids=["faster", "slower", "equal"],
)
def test_several_threads_are_kept_where_they_are_faster(two_threads, seconds, expected, capsys):
    step, threads = step_of(seconds)
    assert choose_threads(step) == expected == torch.get_num_threads()
    assert threads == [1, 1, 1, 2, 2, 2]
    assert f"threads: {expected} (a meta-step takes " in capsys.readouterr().out


def test_one_thread_is_not_timed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert choose_threads(lambda: pytest.fail("a step was taken")) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [["--method=kfac"], []])
def test_timing_leaves_the_run_as_it_is(options, two_threads, tmp_path):
    args = ["--steps=1", "--filters=4", "--meta-batch=2", f"--out={tmp_path}", *options]
    timed = train.set_up(train.parse(args), Ranks())
    torch.manual_seed(1)  # `set_up` seeds
    given = train.set_up(train.parse([*args, f"--threads={timed.options.threads}"]), Ranks())
    assert timed.options.threads in (1, 2)
    torch.manual_seed(0)
    untouched = build_learner(given.options, given.sampler.family).state_dict()
    for run in (timed, given):  # the rehearsal of both leaves the run as it is, too
        for name, x in run.learner.state_dict().items():
            assert torch.equal(x, untouched[name]), name
    assert all(p.grad is None for p in timed.learner.parameters())


def test_timing_leaves_the_random_state_as_it_is(two_threads, tmp_path):
    args = ["--steps=1", "--filters=4", "--meta-batch=2", f"--out={tmp_path}"]
    states = []
    for threads in ([], ["--threads=1"]):
        train.set_up(train.parse([*args, *threads]), Ranks())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
