"""How long a run lasts, and the schedules of its learning rate."""

import math

import pytest

from metaimplicit.training import Budget, Progress, constant, cosine
from metaimplicit.training.progress import Stopwatch


def test_the_share_of_a_budget_is_the_larger_one_of_steps_and_minutes():
    both = Budget(steps=100, minutes=2)
    assert both.spent(Progress(10, 60.0)) == 0.5
    assert both.spent(Progress(80, 60.0)) == 0.8
    assert Budget(minutes=2).spent(Progress(10**9, 240.0)) == 1.0
    assert Budget(steps=4).spent(Progress(1, 1e9)) == 0.25


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "budget: got neither steps nor minutes"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"steps": math.nan}, "steps: got nan, expected a whole number, at least 1 meta-step"),
        ({"steps": "3"}, "steps: got '3', expected a whole number, at least 1 meta-step"),
        ({"minutes": 0.0}, "minutes: got 0.0, expected a time > 0"),
        ({"minutes": "1"}, "minutes: got '1', expected a time > 0"),
    ],
)
def test_a_budget_needs_a_positive_limit(limits, message):
    with pytest.raises(ValueError, match=message):
        Budget(**limits)


def test_the_cosine_schedule_falls_from_one_to_zero_and_the_constant_one_stays():
    assert [cosine(share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert [constant(share) for share in (0, 0.5, 1)] == [1, 1, 1]


def test_a_stopwatch_adds_to_the_time_of_earlier_sittings(monkeypatch):
    clock = iter([100.0, 103.0, 104.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress(seconds=50.0)
    stopwatch = Stopwatch(progress)
    stopwatch.update()
    assert progress.seconds == 53.0
    stopwatch.update()
    assert progress.seconds == 54.5
