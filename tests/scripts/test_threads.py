"""The number of CPU threads of a run."""

import time

import pytest
import torch
from command_line import choose_threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
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
    [({1: 0.04, 3: 0.01}, 3), ({1: 0.01, 3: 0.04}, 1), ({1: 0.04, 3: 0.04}, 1)],
    ids=["faster", "slower", "equal"],
)
def test_several_threads_are_kept_where_they_are_faster(three_threads, seconds, expected, capsys):
    step, threads = step_of(seconds)
    assert choose_threads(step) == expected == torch.get_num_threads()
    assert threads == [1, 1, 1, 3, 3, 3]
    assert f"threads: {expected} (a meta-step takes " in capsys.readouterr().out


def test_one_thread_is_not_timed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert choose_threads(lambda: pytest.fail("a step was taken")) == 1
    finally:
        torch.set_num_threads(before)
