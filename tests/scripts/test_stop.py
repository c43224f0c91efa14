"""A signal ends a script in one line, with what it has saved, in every phase."""

import _thread
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tune
from command_line import handle_errors
from experiments import EXPERIMENTS
from scripts.running import SCRIPTS, SMALL, draw_nothing, load_main

from metaimplicit import MetaLearner, Tuner
from metaimplicit.training import read_metrics

train = load_main("train")
evaluate = load_main("evaluate")
GROUPS = ["group-lasso", "--quick", "--method=cg", "--outer-steps=2", "--starts=1"]
GROUPS += ["--smoothing=0.2", "--ridge=0.1"]
STEPS = [*SMALL, "--checkpoint-every=100"]


@contextmanager
def signal_at(owner, name, call, number=signal.SIGTERM):
    """Let a signal arrive in the call of a method that has this number."""
    calls = []
    method = getattr(owner, name)

    def signalling(*args, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return method(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, signalling)
        yield


def stop(main, args, capsys):
    """The exit code and the last line of a script that is stopped."""
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    *bars, line = capsys.readouterr().err.splitlines()
    assert all(not bar.strip() or "%|" in bar or "step [" in bar for bar in bars), bars
    return exit_.value.code, line


def summary_of(run):
    summary = json.loads((run / "summary.json").read_text())
    return {name: summary[name] for name in ("mean", "interval_95", "meta_steps", "after_steps")}


def metrics_of(run):
    return [line | {"seconds": 0} for line in read_metrics(run)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        train([*STEPS, f"--out={out}"])
    return out


@pytest.mark.slow
def test_training_finishes_its_step_and_resumes_to_the_same_numbers(unbroken, tmp_path, capsys):
    out = tmp_path / "stopped"
    # One call is the rehearsal, and three belong to the plan.
    with signal_at(MetaLearner, "backward", 6):
        code, line = stop(train, [*STEPS, f"--out={out}"], capsys)
    advice = f"the same command with --resume continues the run in {out}"
    assert (code, line) == (143, f"stopped by SIGTERM; {advice}")
    assert [entry["step"] for entry in read_metrics(out)] == [1, 2]

    with signal_at(MetaLearner, "evaluate", 2):  # the first call is the validation
        assert stop(train, [f"--out={out}", "--task=sinusoid", "--resume"], capsys) == (code, line)
    assert not (out / "summary.json").exists()
    train([f"--out={out}", "--task=sinusoid", "--resume"])
    assert summary_of(out) == summary_of(unbroken)
    assert metrics_of(out) == metrics_of(unbroken)


def test_before_training_nothing_is_left(tmp_path, capsys):
    with signal_at(MetaLearner, "backward", 1):
        code, line = stop(train, [*SMALL, f"--out={tmp_path / 'run'}"], capsys)
    assert (code, line) == (143, "stopped by SIGTERM; run the same command again")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluation_stops_at_once(unbroken, capsys):
    with signal_at(MetaLearner, "evaluate", 1, signal.SIGHUP):
        code, line = stop(evaluate, [unbroken], capsys)
    assert (code, line) == (129, "stopped by SIGHUP; run the same command again")
    assert not (unbroken / "evaluation.json").exists()


@pytest.mark.slow
def test_tuning_finishes_its_step_and_resumes_to_the_same_row(tmp_path, capsys):
    unbroken, out = tmp_path / "unbroken", tmp_path / "stopped"
    tune.main([*GROUPS, f"--out={unbroken}"])
    with signal_at(Tuner, "step", 1):
        code, line = stop(tune.main, [*GROUPS, f"--out={out}"], capsys)
    assert (code, line) == (143, "stopped by SIGTERM; run the same command again")
    start = out / "cg-0" / "start-0"
    assert [entry["step"] for entry in read_metrics(start)] == [1]
    tune.main([*GROUPS, f"--out={out}"])
    rows = [json.loads((folder / "rows.json").read_text()) for folder in (unbroken, out)]
    in_metrics = sum(read_metrics(f)[-1]["seconds"] for f in (out / "cg-0").glob("start-*"))
    assert rows[1][0]["row"]["seconds"] > in_metrics  # those of both sittings
    for (run,) in rows:
        del run["row"]["seconds"]
    assert rows[0] == rows[1]
    assert metrics_of(start) == metrics_of(unbroken / "cg-0" / "start-0")


@pytest.mark.slow
def test_an_experiment_without_checkpoints_stops_at_once(tmp_path, capsys):
    with signal_at(EXPERIMENTS["weight-decay"], "run", 1, signal.SIGINT):
        code, line = stop(tune.main, ["weight-decay", "--quick", f"--out={tmp_path}"], capsys)
    assert (code, line) == (130, "stopped by SIGINT; run the same command again")


class Interrupted:
    """A signal arrives while this is finalised."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_arrives_in_a_finaliser_stops_the_script(capsys):
    @handle_errors
    def main(args):
        Interrupted()
        time.sleep(30)

    start = time.monotonic()
    assert stop(main, [], capsys) == (130, "stopped by SIGINT; run the same command again")
    assert time.monotonic() - start < 10


def test_a_signal_that_is_sent_again_too_soon_stops_the_script(monkeypatch, capsys):
    start_thread = _thread.start_new_thread
    calls = []

    def start(send, args):
        calls.append(send)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)  # before the finaliser ends
        else:
            start_thread(send, args)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    test_a_signal_that_arrives_in_a_finaliser_stops_the_script(capsys)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_script_that_is_still_importing_stops_in_one_line():
    with subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py")], stderr=subprocess.PIPE, text=True
    ) as script:
        while "libtorch" not in Path(f"/proc/{script.pid}/maps").read_text():
            time.sleep(0.01)
        script.send_signal(signal.SIGINT)
        assert script.stderr.read() == "stopped by SIGINT; run the same command again\n"
    assert script.returncode == 130
