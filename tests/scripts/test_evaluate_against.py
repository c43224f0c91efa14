"""`evaluate.py --against`: two runs on identical tasks, and the interval of their difference."""

import json
import shutil

import command_line.testing as testing
import pytest
import torch
from scripts.running import SMALL, draw_nothing, error_line, load_main

from metaimplicit.training import read_sealed_json, write_sealed_json

train = load_main("train")
evaluate = load_main("evaluate")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that draw 25 and 4 tasks at a time."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--steps=2", "--inner-lr=0.02", "--seed=3"]
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train([*SMALL, "--steps=1", "--meta-batch=25", "--out", str(folder / "first")])
        train([*SMALL, *options, "--out", str(folder / "second")])
    return folder / "first", folder / "second"


def read_evaluation(run):
    return json.loads((run / "evaluation.json").read_text())


def test_both_runs_meet_the_same_tasks_and_the_difference_is_paired(runs, monkeypatch, capsys):
    tests = []

    def record(learner, batches, **options):
        drawn = list(batches)
        result = evaluate_learner(learner, drawn, **options)
        tests.append((drawn, result))
        return result

    evaluate_learner = testing.evaluate
    monkeypatch.setattr(testing, "evaluate", record)
    first, second = runs
    evaluate([str(first), "--against", str(second), "--episodes=30"])
    (batches, result), (other_batches, other) = tests
    assert [len(batch) for batch in batches] == [len(batch) for batch in other_batches] == [25, 25]
    for batch, other_batch in zip(batches, other_batches, strict=True):
        parts = batch.support + batch.query
        other_parts = other_batch.support + other_batch.query
        assert all(torch.equal(x, y) for x, y in zip(parts, other_parts, strict=True))

    d = result.losses[-1].double() - other.losses[-1].double()
    mean = d.sum() / 30
    interval = 1.96 * ((d - mean).square().sum() / 29 / 30) ** 0.5
    stored = read_evaluation(first)["against"]
    assert stored["difference"]["mean"] == pytest.approx(mean.item(), rel=1e-12)
    assert stored["difference"]["interval_95"] == pytest.approx(interval.item(), rel=1e-12)
    assert stored["mean"] == pytest.approx(other.losses[-1].mean().item(), rel=1e-6)
    assert (stored["run"], stored["tested_meta_step"]) == (str(second), 2)
    line = f"difference {mean:+.4f} ± {interval:.4f} (paired)"
    assert line in capsys.readouterr().out


def test_a_run_does_not_differ_from_its_copy(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    evaluate([str(runs[0]), "--against", str(copy), "--episodes=10"])
    assert read_evaluation(runs[0])["against"]["difference"] == {"mean": 0.0, "interval_95": 0.0}


def test_a_run_with_other_tasks_is_refused(runs, tmp_path, capsys):
    def message(other):
        return error_line(evaluate, [runs[0], "--against", other], capsys)

    assert "the run itself, expected another run" in message(runs[0])
    assert "--against: found no config.json" in message(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    config = read_sealed_json(other / "config.json")
    config["options"]["shots"] = 5
    write_sealed_json(other / "config.json", config)
    assert "has shots 5, but" in message(other)
