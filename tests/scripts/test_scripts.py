"""The command lines, run as a user runs them, but in this process."""

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from metaimplicit import METHODS
from metaimplicit.training import Options

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = [
    "--task=sinusoid",
    "--steps=3",
    "--test-episodes=10",
    "--validation-episodes=10",
    "--test-steps=2",
]
OPTIONS = [f.name for f in fields(Options)]


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module.main


train, evaluate = script("train"), script("evaluate")


def refused(run, args, capsys):
    """The one line on standard error of a command that ends with code 2."""
    with pytest.raises(SystemExit) as exit_:
        run([str(a) for a in args])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train([*SMALL, "--out", str(out)])
    return out


def test_a_run_leaves_every_file(run):
    files = (
        "config.json metrics.jsonl tensorboard checkpoint.pt summary.json curves.png adaptation.png"
    )
    assert {p.name for p in run.iterdir()} == set(files.split())
    assert list((run / "tensorboard").iterdir())
    for picture in ("curves.png", "adaptation.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert set(config["options"]) == {f.name for f in fields(Options)}
    assert config["options"]["inner_lr"] == 0.01  # the task's own, not glyphs'
    assert config["chosen"]["vectorize"] in ("vmap", "loop")
    assert config["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [
        *(("train", k) for k in (1, 2, 3)),
        ("validation", 3),
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["metric"], summary["episodes"], summary["meta_steps"]) == ("mse", 10, 3)
    assert summary["transductive"] is False
    assert summary["peak_memory_mib"] > 50
    assert [row["steps"] for row in summary["after_steps"]] == [0, 1, 2]


def test_what_auto_chose_is_in_the_config(tmp_path):
    train([*SMALL, "--method", "auto", "--steps", "1", "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["chosen"]["solver"] == "Lanczos: n = 1761 > 256"


def test_evaluation_repeats_the_summary_and_another_seed_does_not(run, capsys):
    evaluate([str(run), "--episodes", "10"])
    table = capsys.readouterr().out
    summary, found = (
        json.loads((run / f"{name}.json").read_text()) for name in ("summary", "evaluation")
    )
    assert found["after_steps"] == summary["after_steps"]
    assert f"{summary['mean']:.4f} ± {summary['interval_95']:.4f}" in table
    evaluate([str(run), "--episodes", "10", "--seed", "5", "--steps", "1", "--split", "validation"])
    other = json.loads((run / "evaluation.json").read_text())
    assert other["inner_steps"] == 1
    assert other["after_steps"][0] != summary["after_steps"][0]
    (run / "evaluation.json").unlink()


def test_resuming_ends_where_an_unbroken_run_does(run, tmp_path):
    common = [*SMALL, "--vectorize=vmap", "--checkpoint-every=1", "--schedule=constant", "--out"]
    train([*common, str(tmp_path / "run"), "--steps", "2"])
    train(["--out", str(tmp_path / "run"), "--resume", "--steps", "4"])
    train([*common, str(tmp_path / "whole"), "--steps", "4"])
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("run", "whole")
    )
    assert one["progress"]["step"] == other["progress"]["step"] == 4
    assert all(torch.equal(value, other["learner"][name]) for name, value in one["learner"].items())
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["options"]["task"] == "sinusoid"
    )


def test_a_run_is_neither_overwritten_nor_resumed_as_another(run, tmp_path, capsys):
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert "holds a run already" in refused(train, [*SMALL, "--out", run], capsys)
    assert "--resume: rank, inner_lr differ" in refused(
        train, ["--out", run, "--resume", "--inner-lr", "1.0", "--rank", "3"], capsys
    )
    assert before == {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert "--resume: found no" in refused(train, ["--out", tmp_path / "none", "--resume"], capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "sines"], "task: got 'sines', expected one of glyphs, sinusoid"),
        (["--method", "newton"], f"method: got 'newton', expected one of {', '.join(METHODS)}"),
        (["--task-options", "split"], "--task-options: got 'split', expected name=value"),
        (["--task-options", "split=vinyals"], "sinusoid: got option split"),
        (
            ["--learn", "lr", "--method", "first-order"],
            "learn 'lr': first-order cannot give its gradient",
        ),
        (["--learn", "momentum"], "learn: got ['momentum']"),
        (["--inner-lr", "-1"], "learning rate: -1"),
        (["--inner-steps", "0"], "steps: got 0, expected at least 1 inner step"),
        (
            ["--method", "truncated", "--solver-steps", "9"],
            "Truncated steps: got 9, expected at most",
        ),
        (["--outer-lr", "-1"], "learning rate: -1"),
        (["--meta-batch", "0"], "tasks: got 0"),
        (["--steps", "0"], "steps: got 0, expected at least 1 meta-step"),
        (["--validate-every", "0"], "--validate-every: got 0, expected at least 1"),
        (["--test-episodes", "1"], "--test-episodes: got 1, expected at least 2"),
        (["--clip", "0"], "--clip: got 0.0"),
        (["--device", "gpu"], "--device: got 'gpu', expected auto, cpu or a CUDA device"),
        (["--shots", "0"], "shots: got 0"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(args, message, tmp_path, capsys):
    assert message in refused(train, [*SMALL, *args, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_not_evaluated(tmp_path, capsys):
    assert "run: found no config.json in" in refused(evaluate, [tmp_path], capsys)


def test_divergence_is_one_line_and_keeps_the_last_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    args = [*SMALL, "--inner-lr", "1e20", "--inner-steps", "5", "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        train(args)
    assert exit_.value.code == 1
    assert re.search(
        r"error: step 1: the query loss is (nan|inf); no parameter has moved",
        capsys.readouterr().err,
    )
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] == 0


@pytest.mark.parametrize(("main", "names"), [(train, OPTIONS), (evaluate, ["episodes", "seed"])])
def test_help_explains_every_option(main, names, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in names:
        # an option, its type, and words of explanation before the default
        assert re.search(rf"--{name.replace('_', '-')}\b[^-]*?[A-Za-zλ]{{3,}}", text), name


def test_defaults_are_the_tasks_and_the_methods():
    assert Options.of("glyphs") == Options()
    assert Options.of("glyphs", "unrolled").proximal == 0.0
    assert (Options.of("sinusoid").method, Options.of("sinusoid", "cg").inner_steps) == (
        "unrolled",
        32,
    )
    assert [Options.of("omniglot", m).proximal for m in ("nystrom", "unrolled")] == [0.5, 0.0]
    assert Options.of("folder").queries == 15
    steps = [Options.of("glyphs", method).test_steps for method in ("cg", "unrolled")]
    assert (steps, Options.of("sinusoid").test_steps) == ([16, 4], 10)
    assert Options.of("glyphs", "truncated").solver_steps == 2
    assert Options.of("sinusoid", "truncated").solver_steps == 1
    assert Options.of("glyphs").resolved().minutes == 3.5
    assert Options(steps=5).resolved().minutes is None
    stored = json.loads(json.dumps(Options(out=Path("x"), learn=("lr",)).dump()))
    assert Options.load(stored) == Options(out=Path("x"), learn=("lr",))
    del stored["activation"]  # a run of before there was a choice
    assert Options.load(stored).activation == "relu"
    with pytest.raises(ValueError, match="options: got colour, which this version does not know"):
        Options.load({"colour": 1})


def images(root, classes):
    from PIL import Image

    for c in range(classes):
        (root / f"c{c:02d}").mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (10 * c, i, 0)).save(root / f"c{c:02d}" / f"{i}.png")
    return root


def test_a_run_is_neither_resumed_nor_tested_on_other_classes(tmp_path, capsys):
    """One class more shuffles all of them."""
    data = images(tmp_path / "data", 20)
    args = ["--task=folder", f"--data-root={data}", "--ways=2", "--queries=2", "--filters=4", "--steps=1",
            "--test-episodes=2", "--validation-episodes=2", "--task-options", "size=8", "--out", tmp_path / "run",
    ]  # fmt: skip
    train([str(a) for a in args])
    evaluate([str(tmp_path / "run"), "--episodes", "2"])
    capsys.readouterr()
    images(data, 21)
    message = r"error: task: the train classes are not those that .*run was started with, so it may have been trained on"
    assert re.match(message, refused(evaluate, [tmp_path / "run"], capsys))
    assert re.match(message, refused(train, [*args, "--resume", "--steps=2"], capsys))


def test_what_is_out_of_range_or_no_run_is_one_line(tmp_path, run, capsys):
    assert (
        refused(evaluate, [run, "--episodes=1"], capsys)
        == "error: --episodes: got 1, expected at least 2"
    )
    assert (
        refused(evaluate, [run, "--steps=-1"], capsys)
        == "error: --steps: got -1, expected at least 0"
    )
    (tmp_path / "config.json").write_text('{"experiment": "reweighting"}')
    assert "is no run of scripts/train.py" in refused(evaluate, [tmp_path], capsys)
    (tmp_path / "file").write_text("")
    assert "cannot be made a folder" in refused(
        train, [*SMALL, f"--out={tmp_path / 'file' / 'run'}"], capsys
    )
    for option in ("--minutes", "--proximal", "--inner-lr"):
        for value in ("inf", "nan"):
            line = refused(
                train, [*SMALL, f"{option}={value}", f"--out={tmp_path / 'new'}"], capsys
            )
            assert line == f"error: {option}: got {value}, expected a finite number"
    line = refused(
        train, [*SMALL, "--task-options", "name=glyphs", f"--out={tmp_path / 'new'}"], capsys
    )
    assert line.endswith("expected an option of its own; use --task")
    assert not (tmp_path / "new").exists()


def test_a_run_whose_budget_is_spent_says_so(tmp_path, capsys):
    train([*SMALL, "--minutes=10", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    train(["--task=sinusoid", "--resume", "--out", str(tmp_path / "run")])
    assert (
        "have spent the run's budget (steps 3, minutes 10.0): it is only tested"
        in capsys.readouterr().err
    )
