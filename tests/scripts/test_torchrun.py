"""train.py in the processes that torchrun starts: one of them writes, and the curve is the same."""

import io
import signal
import sys
from contextlib import redirect_stderr

import pytest
import torch
import tune
from command_line import RunOptions, join_ranks
from command_line import ranks as ranks_module
from rank_group import run_on_ranks
from scripts.running import SMALL, error_line, load_main

from metaimplicit.training import STOP_SIGNALS, read_metrics

ARGS = [*SMALL, "--vectorize=vmap", "--device=cpu", "--validate-every=2", "--schedule=constant"]


@pytest.fixture
def two_processes(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    for number, handler in handlers.items():  # a process that fails ignores signals from then on
        signal.signal(number, handler)


def train_untested(args):
    """Run train.py, but not its test."""
    main = load_main("train")
    tested = []
    sys.modules[main.__module__].test = lambda run, progress: tested.append(progress.step)
    main(args)
    return tested


def train_on_rank(rank, args):
    said = io.StringIO()
    with redirect_stderr(said):
        tested = train_untested(args)
    return tested, said.getvalue()


def test_two_processes_have_the_curve_of_one_and_the_first_one_writes(tmp_path):
    train_untested([*ARGS, "--meta-batch=3", f"--out={tmp_path / 'one'}"])
    args = [*ARGS, "--meta-batch=3", f"--out={tmp_path / 'two'}"]
    assert run_on_ranks(train_on_rank, 2, args, join=False) == [([3], ""), ([], "")]
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [(line["split"], line["step"]) for line in two] == [
        (line["split"], line["step"]) for line in one
    ]
    for expected, line in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_every_process_needs_a_task(two_processes, tmp_path, capsys):
    args = [*SMALL, "--meta-batch=1", f"--out={tmp_path / 'run'}"]
    assert error_line(load_main("train"), args, capsys) == (
        "rank 1: error: --meta-batch: got 1 for 2 processes, expected at least one task for each; "
        "raise it, or lower --nproc-per-node"
    )


def test_other_scripts_are_one_process(two_processes, capsys):
    for main in (tune.main, load_main("evaluate")):
        assert "torchrun: got 2 processes, expected one" in error_line(main, ["x"], capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda:1", "got cuda:1 for 2 processes"), ("cuda", "got process 1 of this machine for 1 GPU")],
)
def test_every_process_needs_a_gpu_of_its_own(two_processes, monkeypatch, name, message):
    monkeypatch.setattr(ranks_module, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"--device: {message}"):
        join_ranks(RunOptions(device=name))
