"""`evaluate.py --ways --shots --queries`: other tasks than those of the run's own test."""

import json

import command_line.testing as testing
import pytest
from scripts.running import SMALL, draw_nothing, error_line, load_main

train = load_main("train")
evaluate = load_main("evaluate")

OPTIONS = ["--filters=4", "--steps=1", "--meta-batch=2", "--vectorize=vmap"]
OPTIONS += ["--validation-episodes=4", "--test-episodes=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of tasks with 5 classes, 1 support example and 5 queries of each."""
    out = tmp_path_factory.mktemp("runs") / "ridge"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train(["--head=ridge", *OPTIONS, "--out", str(out)])
    return out


@pytest.fixture
def tests(monkeypatch):
    """The batches and the result of each test that is made."""
    made = []

    def record(learner, batches, **options):
        drawn = list(batches)
        made.append((drawn, original(learner, drawn, **options)))
        return made[-1][1]

    original = testing.evaluate
    monkeypatch.setattr(testing, "evaluate", record)
    return made


def test_the_tasks_are_those_that_are_asked_for(run, tests):
    evaluate([str(run), "--ways=7", "--shots=3", "--queries=2", "--episodes=6"])
    (((batch, *_), result),) = tests
    assert batch.support[1].shape[1] == 7 * 3
    assert batch.query[1].shape[1] == 7 * 2
    assert batch.query[1].max() == 6
    stored = json.loads((run / "evaluation.json").read_text())
    assert (stored["ways"], stored["shots"], stored["queries"]) == (7, 3, 2)
    assert stored["mean"] == pytest.approx(result.accuracies[-1].mean().item(), rel=1e-12)


def test_what_is_not_asked_for_is_that_of_the_run(run, tests):
    evaluate([str(run), "--shots=2", "--episodes=6"])
    (((batch, *_), _),) = tests
    assert batch.support[1].shape[1] == 5 * 2
    assert batch.query[1].shape[1] == 5 * 5


def test_runs_of_other_tasks_are_compared_on_the_ones_that_are_asked_for(run, tests, tmp_path):
    other = tmp_path / "other"
    train(["--head=prototypes", "--ways=6", "--shots=2", *OPTIONS, "--out", str(other)])
    tests.clear()
    evaluate([str(run), "--against", str(other), "--ways=4", "--shots=1", "--episodes=6"])
    ((batch, *_), _), ((same, *_), _) = tests
    assert batch.query[0].equal(same.query[0])
    assert batch.query[1].shape[1] == 4 * 5


def test_a_linear_layer_has_one_number_of_classes(run, tmp_path, capsys):
    linear = tmp_path / "linear"
    steps = ["--inner-steps=1", "--test-steps=1"]
    train(["--method=first-order", *steps, *OPTIONS, "--out", str(linear)])
    capsys.readouterr()
    line = error_line(evaluate, [linear, "--ways=7"], capsys)
    assert line.startswith(f"error: --ways: got 7, but {linear} has --head linear and 5 ways")


def test_regression_has_no_classes(tmp_path, capsys):
    one, other = (tmp_path / name for name in ("one", "other"))
    for option in ("--ways=7", "--train-ways=7"):
        line = error_line(train, [*SMALL, "--head=ridge", option, f"--out={one}"], capsys)
        name = option.split("=")[0]
        assert line.startswith(f"error: {name}: got 7 for sinusoid, which is regression and has no")
    small = [*SMALL, "--steps=1", "--test-episodes=2", "--validation-episodes=2"]
    train([*small, "--head=ridge", f"--out={one}"])
    train([*small, f"--out={other}"])
    capsys.readouterr()
    for run in (one, other):
        line = error_line(evaluate, [run, "--ways=7"], capsys)
        assert line.startswith("error: --ways: got 7 for sinusoid, which is regression and has no")
    evaluate([str(one), "--against", str(other), "--shots=6", "--episodes=4"])
    stored = json.loads((one / "evaluation.json").read_text())
    assert "ways" not in stored
    assert (stored["shots"], stored["queries"]) == (6, 5)


def test_more_classes_than_the_data_have_are_refused(run, capsys):
    line = error_line(evaluate, [run, "--ways=5000"], capsys)
    assert "ways: got 5000, but glyphs/" in line
