"""A run's folder: its checkpoints, and what must not have changed when it is resumed."""

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training.sinusoid_run import (
    assert_same_weights,
    make_parts,
    make_sampler,
    no_decay,
    train,
    weights,
)

from metaimplicit.training import (
    DamagedFileError,
    NonFiniteError,
    load_checkpoint,
    load_learner,
    read_metrics,
    read_sealed_json,
    write_sealed_json,
)

IDENTITY = {"inner_lr": 0.01, "train data": "1f"}
VERSIONS = ["checkpoint.pt", "checkpoint-previous.pt", "checkpoint-best.pt"]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run of three steps, with a checkpoint of each. Tests change a copy of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("three-steps")
    train_further(folder, steps=3)
    return folder


@pytest.fixture
def out(three_steps, tmp_path):
    """A copy of `three_steps`."""
    return Path(shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def after_five_steps(tmp_path_factory):
    """The weights after five steps without a break."""
    unbroken, _ = train_further(tmp_path_factory.mktemp("five-steps"), steps=5)
    return weights(unbroken.learner)


def train_further(out, steps, **options):
    parts = make_parts()
    defaults = {
        "resume": True,
        "checkpoint_every": 1,
        "identity": IDENTITY,
        "schedule": no_decay,
    }
    progress = train(out, parts, steps=steps, **(defaults | options))
    return parts, progress


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def step_of(path):
    return load_learner(path, make_parts().learner).step


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    factors = iter([2.0, 0.1, 4.0, 3.0])
    batch = make_sampler(tasks_per_batch=2, seed=0)[0]

    def validation():
        inputs, targets = batch.query
        return [replace(batch, query=(inputs, targets * next(factors)))]

    parts = make_parts()
    train(tmp_path, parts, steps=4, validation=validation, validate_every=1, checkpoint_every=1)
    logged = [line["loss"] for line in read_metrics(tmp_path) if line["split"] == "validation"]
    assert logged.index(min(logged)) == 1
    assert [step_of(tmp_path / name) for name in VERSIONS] == [4, 3, 2]


def train_with_metrics(out, **options):
    """Train for four steps, at which the loss is lowest after 2, and the metric is 5, 7, 9, 6."""
    batch = make_sampler(tasks_per_batch=4, seed=1)[0]
    factors = iter([3.0, 0.0, 2.0, 4.0])
    metrics = iter([5.0, 7.0, 9.0, 6.0])
    present = {"metric": 0.0}

    def validation():
        present["metric"] = next(metrics)
        inputs, targets = batch.query
        return [replace(batch, query=(inputs, targets * next(factors)))]

    parts = make_parts(metric=lambda outputs, targets: present["metric"])
    every = {"validate_every": 1, "checkpoint_every": 1}
    train(out, parts, steps=4, validation=validation, **every, **options)
    lines = [line for line in read_metrics(out) if line["split"] == "validation"]
    assert [line["metric"] for line in lines] == [5.0, 7.0, 9.0, 6.0]
    losses = [line["loss"] for line in lines]
    assert losses.index(min(losses)) == 1


@pytest.mark.parametrize(
    ("best", "step"),
    [(None, 2), ("lowest metric", 1)],
)
def test_the_best_checkpoint_is_that_of_the_loss_unless_the_caller_selects_by_the_metric(
    tmp_path, best, step
):
    train_with_metrics(tmp_path, **({} if best is None else {"best": best}))
    assert step_of(tmp_path / "checkpoint-best.pt") == step


def test_a_resumed_run_with_another_rule_selects_among_its_further_validations(tmp_path):
    train_with_metrics(tmp_path, best="highest metric")
    assert step_of(tmp_path / "checkpoint-best.pt") == 3
    resumed = make_parts(metric=lambda outputs, targets: 8.0)
    options = {"validation": lambda: [resumed.sampler[0]], "best": "lowest metric"}
    train(tmp_path, resumed, steps=5, resume=True, **options)
    assert step_of(tmp_path / "checkpoint-best.pt") == 5


def test_a_selection_by_what_is_not_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="best: got 'accuracy', expected 'lowest loss', 'highest"):
        train(tmp_path / "unknown", make_parts(), best="accuracy")
    assert not (tmp_path / "unknown").exists()
    parts = make_parts()
    options = {"validation": lambda: [parts.sampler[0]], "best": "highest metric"}
    with pytest.raises(ValueError, match="neither a metric nor an accuracy, expected 'lowest l"):
        train(tmp_path / "run", parts, steps=1, **options)


def test_a_best_validation_is_remembered_over_sittings(tmp_path):
    parts = make_parts()
    train(tmp_path, parts, steps=2, validation=lambda: [parts.sampler[0]], checkpoint_every=1)
    best = load_checkpoint(tmp_path / "checkpoint.pt", *make_parts()).best_score
    assert best == -read_metrics(tmp_path)[-1]["loss"]


@pytest.mark.parametrize("names", [VERSIONS[:1], VERSIONS[:2]])
def test_damaged_checkpoints_are_set_aside_and_the_next_is_used(out, names, after_five_steps):
    shutil.copy(out / "checkpoint-previous.pt", out / "checkpoint-best.pt")
    for name in names:
        damage(out / name)
    before = {name: (out / name).read_bytes() for name in names}
    used = VERSIONS[len(names)]
    message = rf"checkpoint\.pt: got other bytes than were written.*{used}, of step 2, is used"
    with pytest.warns(UserWarning, match=message):
        resumed, progress = train_further(out, steps=5)
    assert progress.step == 5
    assert_same_weights(resumed.learner, after_five_steps)
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5]
    assert {name: (out / f"{name}.damaged").read_bytes() for name in names} == before


def test_a_missing_checkpoint_is_said(out):
    (out / "checkpoint.pt").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is missing; .*previous\.pt, of step 2"):
        train_further(out, steps=3)


def test_reading_a_learner_changes_no_file(out):
    damage(out / "checkpoint.pt")
    before = sorted(path.name for path in out.iterdir())
    with pytest.warns(UserWarning, match="checkpoint-previous.pt, of step 2, is used instead"):
        assert load_learner(out / "checkpoint.pt", make_parts().learner).step == 2
    assert sorted(path.name for path in out.iterdir()) == before


def test_if_no_checkpoint_is_whole_nothing_is_changed(out):
    for name in VERSIONS[:2]:
        damage(out / name)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(DamagedFileError, match=r"^checkpoint\.pt: got other bytes than were writ"):
        train_further(out, steps=4)
    assert sorted(path.name for path in out.iterdir()) == before


def test_the_checkpoint_of_another_run_is_noticed(out, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    train_further(other, steps=3)  # with the same options
    shutil.copy(other / "checkpoint.pt", out / "checkpoint.pt")
    message = r"is of another run, .*: run is .*step 2, is used instead"
    with pytest.warns(UserWarning, match=message):
        train_further(out, steps=3)
    shutil.copy(other / "config.json", out / "config.json")
    with pytest.raises(ValueError, match="is of another run, or this run was changed: run is"):
        train_further(out, steps=4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inner_lr": 0.02}, "this run was changed: inner_lr is 0.01 there, 0.02 here$"),
        ({"train data": "2e"}, "this run was changed: train data is 1f there, 2e here$"),
    ],
)
def test_what_a_resumed_run_may_not_change_is_named(out, changed, message):
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match=message):
        train_further(out, steps=4, identity=IDENTITY | changed)
    assert sorted(path.name for path in out.iterdir()) == before


def test_config_and_identity_take_numbers_of_numpy_and_torch(tmp_path):
    numbers = {
        "seed": np.int64(3),
        "lr": np.float64(0.1),
        "rows": np.arange(2),
        "t": torch.ones(()),
    }
    train_further(tmp_path, steps=1, config=numbers, identity=numbers)
    plain = {"seed": 3, "lr": 0.1, "rows": [0, 1], "t": 1.0}
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in plain} == plain
    _, progress = train_further(tmp_path, steps=2, identity=plain)
    assert progress.step == 2
    with pytest.raises(ValueError, match="identity: got a PosixPath, expected types that JSON has"):
        train_further(tmp_path, steps=3, identity={"data": tmp_path})


@pytest.mark.parametrize("config", [{"noise": float("nan")}, {"noise": {"bounds": [0, np.inf]}}])
def test_numbers_that_json_has_not_are_named_before_anything_is_written(config, tmp_path):
    with pytest.raises(ValueError, match="config: got NaN or Inf in 'noise', expected numbers"):
        train_further(tmp_path, steps=1, config=config)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_config_is_noticed(tmp_path):
    train_further(tmp_path, steps=1, config={"seed": 1})
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(DamagedFileError, match=r"config\.json: got a file that was changed"):
        train_further(tmp_path, steps=2)
    (tmp_path / "config-previous.json").replace(path)
    _, progress = train_further(tmp_path, steps=2)
    assert progress.step == 2


def test_the_config_lists_the_sittings(out, monkeypatch):
    train_further(out, steps=3)  # takes no step
    train_further(out, steps=5, config={"note": "longer"})
    config = json.loads((out / "config.json").read_text())
    assert config["note"] == "longer"
    sittings = config["sittings"]
    assert [(s["from_step"], s["to_step"]) for s in sittings] == [(0, 3), (3, 5)]
    assert sittings[0]["versions"]["torch"] == torch.__version__
    assert sittings[0]["threads"] == torch.get_num_threads()
    assert sittings[0]["device"] == "cpu"
    assert set(sittings[0]) == {"commit", "versions", "threads", "device", "from_step", "to_step"}


def test_of_a_sitting_that_was_killed_the_steps_of_its_checkpoint_remain(out):
    config = read_sealed_json(out / "config.json")
    config["sittings"][-1]["to_step"] = None
    write_sealed_json(out / "config.json", config)
    (out / "checkpoint-previous.pt").replace(out / "checkpoint.pt")
    train_further(out, steps=4)
    sittings = read_sealed_json(out / "config.json")["sittings"]
    assert [(s["from_step"], s["to_step"]) for s in sittings] == [(0, 2), (2, 4)]


def test_a_resume_under_other_versions_warns(out):
    config = read_sealed_json(out / "config.json")
    config["sittings"][-1]["versions"]["torch"] = "1.0"
    write_sealed_json(out / "config.json", config)
    message = rf"continues under other versions \(torch 1.0 → {torch.__version__.split('+')[0]}"
    with pytest.warns(UserWarning, match=message):
        train_further(out, steps=4)


def test_a_folder_that_is_removed_meanwhile_is_not_made_again(tmp_path):
    out = tmp_path / "run"
    learner, optimizer, sampler = make_parts()
    backward = learner.backward

    def remove_folder(episodes):
        if sampler.position == 3:
            shutil.rmtree(out)
        return backward(episodes)

    learner.backward = remove_folder
    with pytest.raises(FileNotFoundError):
        train(out, (learner, optimizer, sampler), checkpoint_every=2)
    assert not out.exists()


def test_a_full_disk_ends_the_run_and_leaves_its_last_checkpoint(out, after_five_steps):
    size = (out / "checkpoint.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/checkpoint\.pt'"):
            train_further(out, steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob(".*.partial"))
    assert step_of(out / "checkpoint.pt") == 3
    resumed, _ = train_further(out, steps=5)
    assert_same_weights(resumed.learner, after_five_steps)


@pytest.mark.parametrize(
    "name", ["config.json", "config-previous.json", "checkpoint.pt", "metrics.jsonl"]
)
def test_a_folder_in_the_place_of_a_file_is_named(out, name):
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is a folder, expected a file or nothing"):
        train_further(out, steps=5)


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_its_lines(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace

    def record_fsync(descriptor):
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        fsync(descriptor)
        done.append("log" if name == "metrics.jsonl" else "file")

    def record_rename(source, target):
        rename(source, target)
        if Path(target).name == "checkpoint.pt":
            done.append("checkpoint")

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_rename)
    train(tmp_path, make_parts(), steps=2, checkpoint_every=1)
    config, first, *steps, end = done
    assert (config, first, end) == ("file", "file", "file")
    assert steps[0] == "checkpoint"
    for step in (steps[1:4], steps[4:]):
        assert set(step[:2]) == {"log", "file"}
        assert step[2] == "checkpoint"


def test_a_run_that_saved_no_step_gives_its_place_to_a_new_one(tmp_path):
    parts = make_parts()
    with torch.no_grad():
        next(parts.learner.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        train(tmp_path, parts, steps=2, identity=IDENTITY)
    assert (tmp_path / "checkpoint.pt").exists()

    other = IDENTITY | {"inner_lr": 0.02}
    train(tmp_path, make_parts(), steps=2, identity=other)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tmp_path, make_parts(), steps=2, identity=IDENTITY)


@pytest.mark.parametrize("name", ["summary.json", "report.html"])
def test_the_result_of_an_experiment_without_checkpoints_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=rf"holds a run already \({name}\)"):
        train(tmp_path, make_parts(), steps=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_damaged_checkpoint_of_no_step_is_not_overwritten(tmp_path):
    parts = make_parts()
    train(tmp_path, parts, steps=1)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tmp_path, make_parts(), steps=1)


def test_a_run_without_its_config_is_refused_by_name(out):
    """Another run's parameters may lie in its checkpoint."""
    (out / "config.json").unlink()
    with pytest.raises(DamagedFileError, match=r"found a checkpoint in .*, but no config.json"):
        train_further(out, steps=4)
