"""Whatever goes wrong, a script ends in one line on standard error and an exit code."""

import errno
import gc
import io
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import benchmark
import pytest
import torch
from command_line import handle_errors, require_package, require_writable
from command_line.memory import limit_memory, physical_memory
from scripts.running import SMALL, error_line, load_main
from torch.utils.data import DataLoader

from metaimplicit.training import loop

SCRIPTS = Path(__file__).parents[2] / "scripts"
FULL = Path("/dev/full")


def outcome(main, args, capsys):
    """The exit code of a `main` function, and what it wrote on standard error."""
    with pytest.raises(SystemExit) as stop:
        handle_errors(main)(args)
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--rank: got 0"), 2, "error: --rank: got 0\n"),
        (FileNotFoundError("found no x"), 2, "error: found no x\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: [Errno 28] No space left\n"),
        (OverflowError("int too large"), 2, "error: int too large\n"),
        (ImportError("found no package x"), 2, "error: found no package x\n"),
        (RuntimeError("a kernel failed\n  frame 1\n"), 1, "error: a kernel failed frame 1\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (FloatingPointError("step 3: nan"), 1, "error: step 3: nan\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    assert outcome(raising(error), [], capsys) == (code, line)


def test_a_full_disk_is_named_where_torch_hides_it(capsys):
    class FullFile(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left")

    def main(args):
        torch.save({"x": torch.zeros(9)}, FullFile())

    assert outcome(main, [], capsys) == (2, "error: [Errno 28] No space left\n")


@pytest.mark.parametrize("code", [129, 143])
def test_an_exit_code_of_the_script_itself_is_kept(code, capsys):
    assert outcome(raising(SystemExit(code)), [], capsys) == (code, "")


def test_a_mistake_of_the_program_keeps_its_trace():
    with pytest.raises(KeyError):
        handle_errors(raising(KeyError("x")))([])


def test_the_trace_is_shown_with_debug(capsys):
    seen = []

    def main(args):
        seen.extend(args)
        raise ValueError("--x: got 1")

    _, text = outcome(main, ["--debug", "--x=1"], capsys)
    assert seen == ["--x=1"]
    assert text.startswith("Traceback")
    assert text.endswith("error: --x: got 1\n")


class _Unreadable(torch.utils.data.Dataset):
    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.read()


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _raise():
    raise ValueError("image 3: got no image")


@pytest.mark.parametrize(
    ("read", "code", "message"),
    [
        (_raise, 2, "error: ValueError: image 3: got no image\n"),
        (_die, 1, "error: DataLoader worker (pid"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_what_happens_in_a_worker_process_is_one_line(read, code, message, capsys, monkeypatch):
    seconds = 0.1  # until a worker that does not end is killed
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", seconds)

    def main(args):
        list(DataLoader(_Unreadable(read), num_workers=1))

    got, text = outcome(main, [], capsys)
    assert got == code
    assert message in text
    assert text.count("\n") == 1
    gc.collect()  # torch reports a dead worker again as long as its loader lives


def test_a_measurement_whose_process_is_killed_ends(tmp_path, capsys, monkeypatch):
    def kill_the_child():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    settings = benchmark.Benchmark(methods=("cg",), inner_steps=(1,), out=tmp_path / "rows.json")
    killer = threading.Thread(target=kill_the_child)
    killer.start()
    code, text = outcome(lambda args: benchmark.main(settings), [], capsys)
    killer.join()
    assert code == 1
    assert text.startswith("error: cg, 1 inner steps: the process that measured was killed")
    assert not list(tmp_path.iterdir())


def test_closed_streams_discard_what_they_get(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stop:
        handle_errors(raising(ValueError("unheard")))([])
    assert stop.value.code == 2
    print("unheard as well")
    sys.stdout.close()
    sys.stderr.close()


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="latin-1"))
    handle_errors(lambda args: print("0.5 ± 0.1, φ, \udcff"))([])
    assert terminal.getvalue() == b"0.5 \xb1 0.1, \\u03c6, \\udcff\n"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_ends_a_script_in_one_line(monkeypatch, capsys):
    script = str(SCRIPTS / "evaluate.py")
    with FULL.open("w", buffering=1) as full:  # each line is written at once
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_output_that_is_written_at_the_end_and_cannot_be_is_discarded(monkeypatch, capsys):
    """Python writes what is left at its exit, and would fail there again."""
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        ended = outcome(lambda args: print("a line that waits in the buffer"), [], capsys)
        full.flush()
    assert ended == (2, "error: [Errno 28] No space left on device\n")


def test_a_process_whose_stream_of_errors_is_closed_ends_in_silence():
    line = f"exec {sys.executable} {SCRIPTS}/evaluate.py no-such-run 2>&-"
    ended = subprocess.run(["sh", "-c", line], stdout=subprocess.PIPE, check=False)
    assert (ended.stdout, ended.returncode) == (b"", 2)


def test_a_missing_package_is_named_with_its_extra():
    require_package("torch", purpose="--x", extra="tune")
    message = r'^--x: found no package no_such; pip install -e "\.\[tune\]"$'
    with pytest.raises(ImportError, match=message):
        require_package("no_such", purpose="--x", extra="tune")


@pytest.mark.parametrize(
    "args",
    [
        ("tune", "regularization", "--method", "tpe"),
        ("tune", "group-lasso"),
        ("tune", "digits-autoencoder"),
        ("benchmark", "--towers"),
    ],
)
def test_missing_packages_are_noticed_before_any_work(args, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("command_line.requirements.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    name, *options = args
    main = benchmark.run_command if name == "benchmark" else load_main(name)
    assert "; pip install -e" in error_line(main, options, capsys)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_noticed_before_any_work(tmp_path, monkeypatch):
    require_writable(tmp_path / "a" / "b" / "rows.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError, match="got a folder, expected the name of a file"):
        require_writable(tmp_path)
    with pytest.raises(OSError, match="got a device, expected the name of a file"):
        require_writable(Path(os.devnull))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        require_writable(tmp_path / "file" / "b" / "rows.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written to, expected a folder that can"):
        require_writable(tmp_path / "rows.json")


def test_a_config_that_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").mkdir()
    line = error_line(load_main("evaluate"), [tmp_path], capsys)
    config = tmp_path / "config.json"
    assert line == f"error: {config}: got a folder, expected the file that a run wrote"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the limits of Linux")
def test_memory_is_limited_to_what_there_is(monkeypatch):
    import resource

    limits = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, 2**60))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    limit_memory()
    assert limits == {resource.RLIMIT_DATA: (physical_memory(), 2**60)}
    assert 2**28 < physical_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits.clear()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**20, 2**60))
    limit_memory()
    assert not limits


def test_a_full_disk_ends_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    args = [*SMALL, "--out", str(tmp_path / "run")]
    line = error_line(load_main("train"), args, capsys)
    config = tmp_path / "run" / "config.json"
    assert line == f"error: [Errno 28] No space left on device: {str(config)!r}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_folder_that_is_removed_during_a_run_ends_it_in_one_line(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    take_step = loop.take_step

    def remove_and_take_step(*args, **options):
        shutil.rmtree(run)
        return take_step(*args, **options)

    monkeypatch.setattr(loop, "take_step", remove_and_take_step)
    with pytest.raises(SystemExit) as stop:
        load_main("train")([*SMALL, "--checkpoint-every=1", "--out", str(run)])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: .*metrics.jsonl: the file was removed during the run", last)
    assert not run.exists()
