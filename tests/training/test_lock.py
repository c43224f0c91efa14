"""A folder has one writer, and a run that left nothing to lose does not block its name."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from training.sinusoid_run import make_parts, train

from metaimplicit.training import only_writer
from metaimplicit.training.lock import LOCK


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_another_process_is_refused_by_the_name_of_the_writer_until_it_is_killed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "a run"])
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            with only_writer(tmp_path):
                os.write(writer, b"held")
                signal.pause()
        finally:
            os._exit(1)
    os.close(writer)  # so that the end of the other process ends a read
    try:
        assert os.read(reader, 4) == b"held"
        message = rf"is being written to by process {holder} on .* \(train.py --out 'a run'\); wait"
        with pytest.raises(FileExistsError, match=message):
            train(tmp_path, make_parts(), steps=1)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(reader)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK}
    train(tmp_path, make_parts(), steps=1)


def test_another_thread_is_refused_and_the_same_one_is_not(tmp_path):
    errors = []

    def enter():
        try:
            with only_writer(tmp_path):
                pass
        except FileExistsError as error:
            errors.append(str(error))

    with only_writer(tmp_path):
        with only_writer(tmp_path / "." / ""):
            pass
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    (message,) = errors
    assert f"process {os.getpid()} on" in message
    enter()
    assert len(errors) == 1


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    def inherited_locks():
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return links.count(str(tmp_path / LOCK))

    with only_writer(tmp_path):
        assert inherited_locks() == 1
        child = os.fork()
        if not child:
            os._exit(inherited_locks())
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_run_that_died_before_its_first_checkpoint_does_not_block_its_name(tmp_path, monkeypatch):
    def die(*args, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("metaimplicit.training.run_record.save_checkpoint", die)
        with pytest.raises(MemoryError):
            train(tmp_path, make_parts(), config={"a": 1})
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, "config.json"}
    assert train(tmp_path, make_parts(), config={"a": 2}).step == 6


def test_files_that_a_killed_process_left_half_written_go(tmp_path):
    train(tmp_path, make_parts(), steps=1)
    partial = tmp_path / ".checkpoint.pt-a1b2.partial"
    partial.write_bytes(b"half")
    train(tmp_path, make_parts(), steps=2, resume=True)
    assert not partial.exists()
