"""Checkpoints and other files of a run: they are whole, and what does not fit is explained."""

import json
import math

import pytest
import torch
from training.sinusoid_run import make_parts, train

from metaimplicit.training import (
    DamagedFileError,
    Progress,
    load_checkpoint,
    load_learner,
    save_checkpoint,
    write_atomically,
    write_json,
)
from metaimplicit.training.rotation import write_checkpoint
from metaimplicit.training.sealed import write_sealed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def test_the_choice_between_vmap_and_the_loop_is_loaded(tmp_path, path):
    parts = make_parts()
    parts.learner.vectorize = "loop"
    train(tmp_path, parts, steps=1)
    other = make_parts(vectorize="auto").learner
    assert load_learner(path, other).step == 1
    assert other.vectorize == "loop"


def test_a_crash_while_saving_leaves_the_last_checkpoint_and_nothing_else(path, monkeypatch):
    parts = make_parts()
    save_checkpoint(path, *parts, Progress(1, 1.0))

    def write_half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(path, *parts, Progress(2, 2.0))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(path, *parts) == Progress(1, 1.0)


def test_a_missing_checkpoint_is_named(path):
    parts = make_parts()
    with pytest.raises(FileNotFoundError, match="checkpoint: found no"):
        load_learner(path, parts.learner)


def test_damaged_checkpoints_are_refused(path):
    parts = make_parts()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(DamagedFileError, match="got no checksum at the end"):
        load_learner(path, parts.learner)
    write_sealed(path, b"not a checkpoint")
    with pytest.raises(DamagedFileError, match="is no checkpoint"):
        load_learner(path, parts.learner)
    path.unlink()
    save_checkpoint(path, *parts, Progress())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match="got no checksum at the end"):
        load_learner(path, parts.learner)


def test_checkpoints_of_another_format_or_learner_or_of_a_tuner_are_refused(path, monkeypatch):
    parts = make_parts()
    torch.save({"format": 1}, path)
    with pytest.raises(ValueError, match="is of an earlier version"):
        load_learner(path, parts.learner)
    state = {"tuner": {}, "progress": {}, "identity": {}, "rng": {}}
    with monkeypatch.context() as patch:
        patch.setattr("metaimplicit.training.rotation.FORMAT", 4)
        write_checkpoint(path, state)
    with pytest.raises(ValueError, match="has format 4, expected 3; use the version that wrote"):
        load_learner(path, parts.learner)
    path.unlink()
    write_checkpoint(path, state)
    with pytest.raises(ValueError, match="holds no learner, but a tuner; use load_tuner"):
        load_learner(path, parts.learner)
    save_checkpoint(path, *parts, Progress())
    other = make_parts(learn=()).learner
    with pytest.raises(ValueError, match="does not fit the learner"):
        load_learner(path, other)


def test_json_is_strict_and_files_appear_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    write_atomically(tmp_path / "b", lambda file: file.write(b"b"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b"]
