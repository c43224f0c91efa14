"""What a meter writes where standard error is no terminal, and how it estimates the end."""

from metaimplicit.training import Progress, metered, write_sealed_json
from metaimplicit.training.log import RunLog
from metaimplicit.training.meter import Meter


def test_a_line_comes_every_thirty_seconds(capsys):
    meter = Meter("step", total=200)
    for step in range(1, 201):
        meter.update(step, seconds=float(step), notes=f"loss {step}")
    meter.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 30 of 200, 30 s, about 2 min 50 s left: loss 30"
    assert [line.split()[1] for line in lines] == ["30", "60", "90", "120", "150", "180"]


def test_long_computations_have_a_line_every_fiftieth_of_their_time(capsys):
    meter = Meter("step", total=10_000)
    for step in range(1, 10_001):
        meter.update(step, seconds=10.0 * step)
    lines = capsys.readouterr().err.splitlines()
    assert 45 <= len(lines) <= 51
    assert lines[0] == "step 3 of 10000, 30 s, about 27 h 46 min left"


def test_the_pace_is_that_of_this_sitting_and_the_first_limit_counts():
    meter = Meter("step", count=100, seconds=1000.0, total=200, minutes=20, is_shown=False)
    assert meter.seconds_left(count=150, seconds=1050.0) == 50.0
    assert meter.seconds_left(count=101, seconds=1100.0) == 100.0
    assert Meter("step", is_shown=False).seconds_left(5, 5.0) is None
    assert Meter("step", minutes=1, is_shown=False).seconds_left(5, 70.0) == 0.0


def test_a_run_that_is_limited_in_minutes_says_how_long_it_takes(tmp_path, capsys):
    write_sealed_json(tmp_path / "config.json", {"run": "a"})
    progress = Progress()
    with RunLog(tmp_path, progress, "a", total=None, minutes=2, bar=True) as log:
        for step in range(1, 5):
            progress.step = step
            progress.seconds = 20.0 * step
            log.advance({"loss": 0.5, "accuracy": None})
    assert capsys.readouterr().err.splitlines() == [
        "step 2, 40 s, about 1 min 20 s left: loss 0.500",
        "step 4, 1 min 20 s, about 40 s left: loss 0.500",
    ]


def test_a_hidden_meter_and_a_quick_one_write_nothing(capsys):
    Meter("step", total=2, is_shown=False).update(1, seconds=100.0)
    assert list(metered("ab", "letter")) == ["a", "b"]
    assert capsys.readouterr().err == ""
