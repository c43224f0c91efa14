"""Checkpoints and other files of a run: they are whole, and what does not fit is explained."""

import errno
import json
import math
import os
from collections import deque

import numpy as np
import pytest
import torch
from training.sinusoid_run import assert_same_weights, make_parts, no_decay, train

from metaimplicit.training import (
    DamagedFileError,
    Progress,
    load_checkpoint,
    load_learner,
    save_checkpoint,
    write_atomically,
    write_json,
)
from metaimplicit.training.files import previous, read_json
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


@pytest.mark.parametrize("has_links", [True, False])
def test_the_name_of_a_checkpoint_is_never_free(path, monkeypatch, has_links):
    parts = make_parts()
    save_checkpoint(path, *parts, Progress(1))
    rename = os.replace

    def look(source, target):
        assert path.exists()
        rename(source, target)

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if has_links:
        monkeypatch.setattr(os, "replace", look)
    else:
        monkeypatch.setattr(os, "link", refuse)
    for step in (2, 3):
        save_checkpoint(path, *parts, Progress(step))
    assert load_learner(path, parts.learner).step == 3
    assert load_learner(previous(path), parts.learner).step == 2


def test_a_missing_checkpoint_is_named(path):
    parts = make_parts()
    with pytest.raises(FileNotFoundError, match="checkpoint: found no"):
        load_learner(path, parts.learner)
    with pytest.raises(DamagedFileError, match="got a folder, expected the file that a run wrote"):
        load_learner(path.parent, parts.learner)


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


class CountingSampler:
    """A sampler whose state has an entry more."""

    def __init__(self, sampler, entry):
        self.batches = sampler.batches
        self.load_state_dict = sampler.load_state_dict
        self._sampler = sampler
        self._entry = entry

    def state_dict(self):
        return self._sampler.state_dict() | {"entry": self._entry}


def numpy_parts():
    """The parts of a run whose states hold numbers and arrays of NumPy."""
    learner, _, sampler = make_parts()
    rate, momentum = np.logspace(-3, -1, 3), np.float32(0.5)
    optimizer = torch.optim.SGD(learner.parameters(), lr=rate[1], momentum=momentum)
    entry = {"number": np.int64(3), "state": np.random.RandomState(0).get_state()}
    return learner, optimizer, CountingSampler(sampler, entry)


def test_numbers_and_arrays_of_numpy_are_resumed(tmp_path):
    unbroken = numpy_parts()
    train(tmp_path / "unbroken", unbroken, steps=4, schedule=no_decay)
    train(tmp_path / "stopped", numpy_parts(), steps=2, schedule=no_decay)
    resumed = numpy_parts()
    train(tmp_path / "stopped", resumed, steps=4, schedule=no_decay, resume=True)
    assert_same_weights(resumed[0], unbroken[0])
    other = make_parts().learner
    assert load_learner(tmp_path / "stopped" / "checkpoint.pt", other).step == 4


def test_a_state_that_could_not_be_read_again_is_refused_before_the_first_step(tmp_path):
    learner, optimizer, sampler = make_parts()
    sampler = CountingSampler(sampler, deque([1]))
    with pytest.raises(ValueError, match=r"could not be read again \(it holds a collections.deque"):
        train(tmp_path, (learner, optimizer, sampler))
    assert not (tmp_path / "checkpoint.pt").exists()


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


@pytest.mark.parametrize("text", ['{"x": NaN}', "[-Infinity]", "[" * 100_000, "{"])
def test_what_is_no_json_is_refused_by_its_path(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a.json: got damaged JSON \(.+\), expected what a run"):
        read_json(path)


def test_json_is_strict_and_files_appear_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    write_atomically(tmp_path / "b", lambda file: file.write(b"b"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b"]
