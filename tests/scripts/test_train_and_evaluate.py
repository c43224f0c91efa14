"""Runs of train.py and evaluate.py: their files, how they are resumed, and what they refuse."""

import json
import math
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
import tune
from command_line import RunOptions
from command_line.ranges import check_ranges
from pages import read_page
from scripts.running import SMALL, draw_nothing, error_line, load_main

from metaimplicit.training import write_sealed_json

RUN_SECTIONS = ["Error", "Curves", "Adaptation"]
RUN_SECTIONS += ["Hypergradient", "Memory and time", "Options", "Provenance"]

train = load_main("train")
evaluate = load_main("evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, pages=True)
        train([*SMALL, "--out", str(out)])
    return out


def read_json(path):
    return json.loads(path.read_text())


def read_checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_every_file(run):
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "config-previous.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoint.pt",
        "checkpoint-previous.pt",
        "checkpoint-best.pt",
        ".lock",
        "summary.json",
        "curves.png",
        "adaptation.png",
        "report.html",
    }
    page = read_page((run / "report.html").read_text())
    assert [title for title, _ in page.sections] == [*RUN_SECTIONS[:3], "Fits", *RUN_SECTIONS[3:]]
    assert list((run / "tensorboard").iterdir())
    for plot in ("curves.png", "adaptation.png"):
        assert (run / plot).read_bytes().startswith(b"\x89PNG")
    config = read_json(run / "config.json")
    assert set(config["options"]) == {f.name for f in fields(RunOptions)}
    assert config["options"]["inner_lr"] == 0.01  # the default of the task, not of glyphs
    assert config["chosen"]["vectorize"] == "vmap"
    (sitting,) = config["sittings"]
    assert sitting["versions"]["torch"] == torch.__version__
    assert (sitting["from_step"], sitting["to_step"]) == (0, 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("validation", 3),
    ]
    summary = read_json(run / "summary.json")
    assert (summary["metric"], summary["episodes"], summary["meta_steps"]) == ("mse", 10, 3)
    assert summary["transductive"] is False
    assert summary["peak_memory_mib"] > 50
    assert [row["steps"] for row in summary["after_steps"]] == [0, 1, 2]


def test_the_test_is_of_the_checkpoint_with_the_best_validation_or_of_the_last_one(tmp_path):
    out = tmp_path / "run"
    options = ["--validate-every=1", "--steps=4", "--schedule=constant", "--outer-lr=0.1"]
    train([*SMALL, *options, "--out", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "validation"}
    best = min(losses, key=losses.get)
    assert best < 4
    assert read_json(out / "summary.json")["tested_meta_step"] == best

    evaluate([str(out), "--episodes=10"])
    of_best = read_json(out / "evaluation.json")
    assert of_best["tested_meta_step"] == best
    assert of_best["mean"] == read_json(out / "summary.json")["mean"]
    evaluate([str(out), "--episodes=10", "--select=last"])
    of_last = read_json(out / "evaluation.json")
    assert of_last["tested_meta_step"] == 4
    assert of_last["mean"] != of_best["mean"]


@pytest.mark.slow
def test_the_config_says_what_the_solver_auto_chose(tmp_path):
    small = ["--hidden", "20", "20", "--steps=1", "--meta-batch=2", "--test-episodes=2"]
    train(
        [
            *SMALL,
            "--method=auto",
            "--inner-steps=2",
            *small,
            "--validation-episodes=2",
            f"--out={tmp_path}",
        ]
    )
    config = read_json(tmp_path / "config.json")
    assert config["chosen"]["solver"] == "Lanczos: n = 481 > 256"
    assert config["options"]["method_options"] == {"solver_steps": 10}


@pytest.mark.pages
@pytest.mark.slow
def test_a_run_with_a_head_trains_on_other_tasks_than_it_is_tested_on(tmp_path):
    out = tmp_path / "run"
    options = ["--head=ridge", "--norm=running", "--train-ways=7", "--filters=2", "--queries=2"]
    limits = ["--steps=2", "--meta-batch=2", "--validation-episodes=2", "--test-episodes=4"]
    train([*options, *limits, "--out", str(out)])
    config = read_json(out / "config.json")
    assert config["chosen"]["vectorize"] in ("vmap", "loop")
    assert config["chosen"]["features"] == "once"
    assert config["chosen"]["solver"] == "Factored: the inner loop left its inverse"
    summary = read_json(out / "summary.json")
    assert summary["transductive"] is False
    assert summary["normalization"] == "running statistics of the training images"
    assert [row["steps"] for row in summary["after_steps"]] == [0, 1]
    evaluate([str(out), "--episodes", "4"])
    assert read_json(out / "evaluation.json")["mean"] == summary["mean"]
    for name in ("report.html", "evaluation.html"):
        page = read_page((out / name).read_text())
        assert {"Accuracy", "Episodes", "Confusion"} <= {title for title, _ in page.sections}


@pytest.mark.slow
def test_evaluate_repeats_the_test_of_the_run_unless_the_seed_is_another(run, capsys):
    evaluate([str(run), "--episodes", "10"])
    table = capsys.readouterr().out
    summary = read_json(run / "summary.json")
    assert read_json(run / "evaluation.json")["after_steps"] == summary["after_steps"]
    assert f"{summary['mean']:.4f} ± {summary['interval_95']:.4f}" in table
    evaluate([str(run), "--episodes", "10", "--seed", "5", "--steps", "1", "--split", "validation"])
    other = read_json(run / "evaluation.json")
    assert other["inner_steps"] == 1
    assert other["after_steps"][0] != summary["after_steps"][0]
    (run / "evaluation.json").unlink()


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    common = [*SMALL, "--method=cg", "--solver-steps=3", "--damping=0.5", "--inner-steps=2"]
    common += ["--checkpoint-every=1", "--schedule=constant", "--meta-batch=2"]
    common += ["--validation-episodes=2", "--test-episodes=2", "--out"]
    resumed = tmp_path / "resumed"
    train([*common, str(resumed), "--steps", "1"])
    train(["--out", str(resumed), "--resume", "--steps", "2"])
    unbroken = tmp_path / "unbroken"
    train([*common, str(unbroken), "--steps", "2"])
    state = read_checkpoint(resumed)
    expected = read_checkpoint(unbroken)
    assert state["progress"]["step"] == expected["progress"]["step"] == 2
    assert all(torch.equal(x, expected["learner"][name]) for name, x in state["learner"].items())
    options = read_json(resumed / "config.json")["options"]
    assert (options["task"], options["method"]) == ("sinusoid", "cg")
    assert options["method_options"] == {"solver_steps": 3, "damping": 0.5}


def test_a_run_is_neither_overwritten_nor_resumed_with_other_options(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def message(*args):
        return error_line(train, ["--out", run, *args], capsys)

    assert "holds a run already" in message(*SMALL)
    assert "--resume: got another inner_lr, another momentum than the run's" in message(
        "--resume", "--inner-lr", "1.0", "--inner-momentum", "0.5"
    )
    line = message("--resume", "--method=nystrom", "--rank=3")
    assert "--resume: got another method, another rank than the run's; leave that out" in line
    assert "--rank: got it with --method unrolled" in message("--resume", "--rank", "3")
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    missing = ["--out", tmp_path / "none", "--resume"]
    assert "--resume: found no" in error_line(train, missing, capsys)


BAD_OPTIONS = [
    (["--task", "sines"], "task: got 'sines', expected one of glyphs, sinusoid"),
    (["--task-options", "split"], "--task-options: got 'split', expected name=value"),
    (["--task-options", "split=vinyals"], "sinusoid: got option split"),
    (
        ["--task-options", "name=glyphs"],
        "--task-options: got 'name=glyphs', expected a further option; use --task",
    ),
    (
        ["--learn", "lr", "--method", "first-order"],
        "learn 'lr': first-order cannot give its gradient",
    ),
    (["--learn", "momentum"], "learn: got ['momentum']"),
    (["--learn", "lr", "lr=per-tensor"], "--learn: got lr 2 times, expected it once"),
    (
        ["--task-options", "seed=1", "seed=2"],
        "--task-options: got seed 2 times, expected it once",
    ),
    (["--method", "cg", "--rank", "20"], "--rank: got it with --method cg"),
    (["--inner-lr", "-1"], "--inner-lr: got -1.0, expected from 0 to 1e+30"),
    (
        ["--method", "truncated", "--solver-steps", "9"],
        "Truncated steps: got 9, expected at most",
    ),
    (["--clip", "0"], "--clip: got 0.0"),
    (["--augment"], "augment: got sinusoid/train, regression of inputs of shape (1,)"),
    (
        ["--multi-step-loss=0.1", "--method=first-order"],
        "--multi-step-loss: got 0.1 with --method first-order and 1 inner steps, expected --method",
    ),
    (["--device", "gpu"], "--device: got 'gpu', expected auto, cpu or a CUDA device"),
    (["--minutes=inf"], "error: --minutes: got inf, expected from 1e-06 to 1000000"),
]


@pytest.mark.parametrize(("args", "message"), BAD_OPTIONS)
def test_bad_options_are_one_line_and_leave_nothing(args, message, tmp_path, capsys):
    assert message in error_line(train, [*SMALL, *args, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "limits"),
    [
        ("inner_steps", 0, "from 1 to 100000"),
        ("outer_lr", -1.0, "from 0 to 1e+30"),
        ("meta_batch", 0, "from 1 to 10000"),
        ("steps", 0, "from 1 to 1000000000"),
        ("validate_every", 0, "from 1 to 1000000"),
        ("test_episodes", 1, "from 2 to 1000000"),
        ("shots", 0, "from 1 to 10000"),
        ("proximal", math.nan, "from 0 to 1e+30"),
        ("inner_lr", math.inf, "from 0 to 1e+30"),
    ],
)
def test_a_number_out_of_its_range_is_refused(option, value, limits):
    name = option.replace("_", "-")
    with pytest.raises(ValueError, match=re.escape(f"--{name}: got {value}, expected {limits}")):
        check_ranges(RunOptions(**{option: value}))


@pytest.mark.parametrize("args", [["--out", ""], ["--out="]])
def test_an_empty_name_is_no_folder(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = "--out: got an empty name, expected that of a folder for the results"
    assert message in error_line(train, [*SMALL, *args], capsys)
    assert message in error_line(tune.main, ["step-size", "--quick", *args], capsys)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_known_after_an_equals_sign(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(run.parent))
    monkeypatch.chdir(tmp_path)
    message = f"out: {run} holds a run already"
    assert message in error_line(train, [*SMALL, f"--out=~/{run.name}"], capsys)
    assert not list(tmp_path.iterdir())


def test_an_edited_config_is_one_line(run, tmp_path, capsys):
    edited = shutil.copytree(run, tmp_path / "run")
    config = edited / "config.json"
    config.write_text(config.read_text().replace('"inner_lr": 0.01', '"inner_lr": 0.02'))
    message = "config.json: got a file that was changed or damaged after it was written"
    assert message in error_line(evaluate, [edited], capsys)
    assert message in error_line(train, ["--resume", f"--out={edited}"], capsys)
    # An editor that knows the digest is still noticed by the checkpoint.
    options = read_json(run / "config.json")
    del options["sha256"]
    options["options"]["inner_lr"] = 0.02
    write_sealed_json(config, options)
    message = "this run was changed: inner_lr is 0.01 there, 0.02 here"
    assert message in error_line(evaluate, [edited], capsys)
    assert message in error_line(train, ["--resume", f"--out={edited}"], capsys)
    shutil.copy(edited / "config-previous.json", config)
    evaluate([str(edited), "--episodes=2"])


@pytest.mark.parametrize(
    ("select", "file", "used", "step"),
    [
        ("last", "checkpoint.pt", "checkpoint-previous.pt", 0),
        ("best", "checkpoint-best.pt", "checkpoint.pt", 3),
    ],
)
def test_where_a_checkpoint_is_damaged_the_evaluation_is_of_another(
    select, file, used, step, run, tmp_path
):
    damaged = shutil.copytree(run, tmp_path / "run")
    checkpoint = damaged / file
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=f"{used}, of step {step}, is used instead"):
        evaluate([str(damaged), "--episodes=2", "--select", select])
    assert read_json(damaged / "evaluation.json")["tested_meta_step"] == step


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert "cannot be made a folder" in error_line(train, [*SMALL, f"--out={out}"], capsys)


def test_evaluate_refuses_folders_without_a_run_and_numbers_out_of_range(tmp_path, run, capsys):
    assert "run: found no config.json in" in error_line(evaluate, [tmp_path], capsys)
    write_sealed_json(tmp_path / "config.json", {"experiment": "reweighting"})
    assert "is no run of scripts/train.py" in error_line(evaluate, [tmp_path], capsys)
    line = error_line(evaluate, [run, "--episodes=1"], capsys)
    assert line == "error: --episodes: got 1, expected from 2 to 1000000"
    line = error_line(evaluate, [run, "--steps=-1"], capsys)
    assert line == "error: --steps: got -1, expected from 0 to 100000"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
def test_divergence_is_one_line_and_keeps_the_last_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    args = [*SMALL, "--inner-lr", "1e20", "--inner-steps", "5", "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        train(args)
    assert exit_.value.code == 1
    message = r"error: step 1: the query loss is (nan|inf); no parameter has moved"
    assert re.search(message, capsys.readouterr().err)
    assert read_checkpoint(out)["progress"]["step"] == 0


def write_images(root, classes, blue=0):
    from PIL import Image

    for c in range(classes):
        (root / f"c{c:02d}").mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (10 * c, i, blue)).save(root / f"c{c:02d}" / f"{i}.png")


@pytest.mark.slow
def test_a_run_may_stand_among_its_data(tmp_path, monkeypatch):
    write_images(tmp_path, 20)
    monkeypatch.chdir(tmp_path)
    args = ["--task=folder", "--data-root=.", "--ways=2", "--queries=2", "--filters=4"]
    args += ["--steps=1", "--test-episodes=2", "--validation-episodes=2", "--meta-batch=2"]
    args += ["--task-options=size=8"]
    train(args)
    run = tmp_path / "runs" / "folder-ridge-0"
    assert (run / "report.html").exists()
    evaluate([str(run), "--episodes", "2"])
    train(["--resume", f"--out={run}", "--steps=2"])
    train([*args, "--seed=1"])


@pytest.mark.slow
def test_a_test_split_may_have_more_classes_than_the_validation_split(tmp_path, capsys):
    from PIL import Image

    names = iter(range(100))
    for split, classes in {"train": 6, "val": 2, "test": 4}.items():
        for _ in range(classes):
            folder = tmp_path / "data" / split / f"c{next(names):02d}"
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (next(names), i, 7)).save(folder / f"{i}.png")
    run = tmp_path / "run"
    args = ["--task=folder", f"--data-root={tmp_path / 'data'}", "--ways=2", "--queries=1"]
    args += ["--filters=4", "--steps=1", "--test-episodes=2", "--validation-episodes=2"]
    train([*args, "--task-options=size=8", "--out", str(run)])
    evaluate([str(run), "--episodes=2", "--ways=4", "--queries=2"])
    assert json.loads((run / "evaluation.json").read_text())["ways"] == 4
    capsys.readouterr()
    line = error_line(evaluate, [run, "--ways=3", "--split=validation"], capsys)
    assert "ways: got 3, but folder/validation has 2 classes" in line


@pytest.mark.slow
def test_a_run_is_neither_resumed_nor_tested_on_other_images_or_classes(tmp_path, capsys):
    """One more class changes how all of them are shuffled."""
    data = tmp_path / "data"
    run = tmp_path / "run"
    write_images(data, 20)
    args = ["--task=folder", f"--data-root={data}", "--ways=2", "--queries=2", "--filters=4"]
    args += ["--steps=1", "--test-episodes=2", "--validation-episodes=2"]
    args += ["--task-options", "size=8", "--out", str(run)]
    train(args)
    evaluate([str(run), "--episodes", "2"])
    capsys.readouterr()
    # other images under the same names
    write_images(data, 20, blue=1)
    message = r"error: checkpoint: .* this run was changed: train data is \w{16} there, \w{16} here"
    assert re.match(message, error_line(evaluate, [run], capsys))
    assert re.match(message, error_line(train, [*args, "--resume", "--steps=2"], capsys))
    write_images(data, 21)
    message = (
        r"error: task: the train classes are not those that .*run was started with, "
        "so it may have been trained on"
    )
    assert re.match(message, error_line(evaluate, [run], capsys))
    assert re.match(message, error_line(train, [*args, "--resume", "--steps=2"], capsys))


def test_a_run_that_has_lost_lines_of_its_metrics_is_resumed_and_tested(run, tmp_path):
    resumed = shutil.copytree(run, tmp_path / "run")
    (resumed / "metrics.jsonl").unlink()
    (resumed / "report.html").unlink()
    with pytest.warns(UserWarning, match="lacks 4 lines .* of 4.*; the run continues"):
        train(["--resume", "--steps=4", f"--out={resumed}"])
    assert (resumed / "report.html").exists()
    assert read_json(resumed / "summary.json")["meta_steps"] == 4


@pytest.mark.pages
@pytest.mark.filterwarnings("ignore:the meta-gradient has the norm:RuntimeWarning")
def test_a_test_that_diverges_leaves_its_files_and_says_so(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train([*SMALL, "--inner-lr=30", "--test-steps=20", f"--out={out}"])
    message = "warning: the query loss of 10 of 10 tasks is not finite after 20 inner steps"
    assert message in capsys.readouterr().err
    rows = read_json(out / "summary.json")["after_steps"]
    assert rows[-1] == {"steps": 20, "mean": None, "interval_95": None}
    assert rows[0]["mean"] > 0
    assert "nan ± nan" in read_page((out / "report.html").read_text()).text
    draw_nothing(monkeypatch)
    evaluate([str(out), f"--against={run}", "--episodes=4"])
    captured = capsys.readouterr()
    assert "of 4 of 4 tasks is not finite" in captured.err
    assert "difference +nan ± nan (paired)" in captured.out
    difference = {"mean": None, "interval_95": None}
    assert read_json(out / "evaluation.json")["against"]["difference"] == difference


@pytest.mark.slow
def test_a_resumed_run_without_budget_says_that_it_is_only_tested(tmp_path, capsys):
    train([*SMALL, "--minutes=10", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    train(["--task=sinusoid", "--resume", "--out", str(tmp_path / "run")])
    message = "have spent the run's budget (steps 3, minutes 10.0): it is only tested"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("step_size", "warned"), [("0.3", True), ("0.003", False)])
def test_a_run_says_that_its_inner_loops_end_far_from_a_minimum(
    step_size, warned, tmp_path, capsys
):
    small = [*SMALL, "--steps=2", "--inner-steps=2", "--validation-episodes=2"]
    train([*small, "--method=cg", f"--inner-lr={step_size}", f"--out={tmp_path}"])
    message = "warning: the inner loop ended far from a minimum"
    assert (message in capsys.readouterr().err) == warned


def test_features_that_are_not_finite_end_a_run_before_it_starts(tmp_path, capsys):
    inputs = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    inputs[-1, 0] = np.nan
    np.savez(tmp_path / "features.npz", inputs=inputs, labels=np.repeat(np.arange(15), 4))
    options = ["--task=folder", f"--data-root={tmp_path}/features.npz", "--ways=2", "--queries=2"]
    out = tmp_path / "run"
    line = error_line(train, [*options, "--train-ways=2", "--steps=1", f"--out={out}"], capsys)
    assert "got NaN or Inf in input 3 of class '14', expected finite numbers" in line
    assert not out.exists()
