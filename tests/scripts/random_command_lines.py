"""Random command lines over all scripts. Each runs, or ends in one line on standard error.

PYTHONPATH=.:scripts:tests python tests/scripts/random_command_lines.py --lines 1000
PYTHONPATH=.:scripts:tests python tests/scripts/random_command_lines.py --processes 120

Lines are parsed and checked in this process. Processes run small commands with a few options drawn
at random, every other one aimed at blow-ups: numbers at the end of their range, or beyond it. One
that lasts longer than --timeout is interrupted, and must then end within 30 seconds, or at once at
a second signal.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import benchmark
import compare
import evaluate
import train
import tune
import tyro
from command_line import RowFile, RunOptions, parse, parse_options
from command_line.errors import FAILED, REFUSED, one_line
from command_line.flags import inner_flags, method_flags
from command_line.ranges import ranges_of
from experiments import EXPERIMENTS
from experiments.base import Experiment
from experiments.runner import require_same_options

from metaimplicit import METHODS
from metaimplicit.inner import INNER_LOOPS

MAINS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "tune": tune.main,
    "compare": compare.run_command,
    "benchmark": benchmark.run_command,
}
NUMBERS = ["0", "1", "2", "-1", "3.5", "1e-3", "1e9", "1e30", "1e400", "nan", "-inf", "9" * 5000]
WORDS = ["", " ", "cg", "none", "None", "x", "é", "\udcff", "٣", "0x10", "1_0", "a=b", "(" * 300]
DEVICES = ["cpu", "auto", "gpu", "cuda:99", "cuda:" + "9" * 30, "meta", "mps", "xla", "cpu:7"]
PLACES = ["/dev/full", "/dev/null", "/proc/x", "/etc/passwd/x", "no-such-folder", "x" * 300]
ODD = [["--"], ["-"], ["--colour=3"], ["--seed"], ["--no-resume"], ["positional"], ["--debug"]]


class Subject(NamedTuple):
    """A script: the types of its options, a command that runs, and what checks a command."""

    script: str
    hints: dict[str, Any]
    highest: dict[str, float]
    base: list[str]
    check: Callable[[list[str]], object]


def train_subject(draw: random.Random) -> Subject:
    """train.py with the options of a random method and a random inner optimiser."""
    method = draw.choice(list(METHODS))
    inner = draw.choice(list(INNER_LOOPS))
    flags = {**method_flags(method).options, **inner_flags(inner).options}
    hints = get_type_hints(RunOptions) | {name: option.type for name, option in flags.items()}
    chosen = [f"--method={method}", f"--inner-optimizer={inner}"] if draw.random() < 0.7 else []
    small = ["--task=sinusoid", "--steps=2", "--meta-batch=2", "--queries=2", "--hidden", "8"]
    small += ["--test-episodes=4", "--validation-episodes=4", "--test-steps=1", *chosen]
    return Subject("train", hints, highest_of(RunOptions), small, parse)


def evaluate_subject(run: Path) -> Subject:
    """evaluate.py on a run."""
    base = [str(run), "--episodes=4", "--steps=1"]

    def check(args: list[str]) -> object:
        command = parse_options(evaluate.Evaluate, args)
        return evaluate.load_options(command, command.run)

    return Subject(
        "evaluate", get_type_hints(evaluate.Evaluate), highest_of(evaluate.Evaluate), base, check
    )


def tune_subject(name: str) -> Subject:
    """tune.py with one experiment."""
    kind: Any = EXPERIMENTS[name]

    def check(args: list[str]) -> list[Any]:
        experiment: Experiment = tune.parse_experiment(args)
        if experiment.quick:
            experiment = experiment.smoke_test_version()
        experiment.check_options()
        cases = experiment.cases()
        for case in cases:
            require_same_options(experiment, case)
        return cases

    base = [name, "--quick", "--seeds=1"]
    return Subject("tune", get_type_hints(kind), highest_of(kind), base, check)


def compare_subject() -> Subject:
    """compare.py on its smallest problem."""
    base = ["--problems", "logistic", "--products", "3", "--seeds=1"]

    def check(args: list[str]) -> object:
        settings = parse_options(compare.Settings, args)
        return compare.choose_study(settings), RowFile(settings.out / "rows.json")

    hints = get_type_hints(compare.Settings)
    return Subject("compare", hints, highest_of(compare.Settings), base, check)


def benchmark_subject() -> Subject:
    """benchmark.py on a tiny network."""
    base = ["--methods", "cg", "--inner-steps", "1", "--tasks=1", "--filters=2", "--repeats=0"]

    def check(args: list[str]) -> object:
        settings = parse_options(benchmark.Benchmark, args)
        benchmark.check_settings(settings)
        return RowFile(settings.out)

    kind = benchmark.Benchmark
    return Subject("benchmark", get_type_hints(kind), highest_of(kind), base, check)


def highest_of(kind: Any) -> dict[str, float]:
    """The end of the range of each numeric option."""
    return {name: allowed.high for name, allowed in ranges_of(kind).items()}


def draw_subject(draw: random.Random, run: Path, experiments: list[str]) -> Subject:
    """A script at random."""
    kind = draw.choice(["train", "train", "evaluate", "tune", "tune", "compare", "benchmark"])
    if kind == "train":
        return train_subject(draw)
    if kind == "evaluate":
        return evaluate_subject(run)
    if kind == "tune":
        return tune_subject(draw.choice(experiments))
    return compare_subject() if kind == "compare" else benchmark_subject()


def draw_options(draw: random.Random, subject: Subject) -> list[str]:
    """Up to four options with values that may be anything."""
    args: list[str] = []
    for name in draw.sample(list(subject.hints), k=draw.randint(0, 4)):
        args += draw_option(draw, name, subject.hints[name])
    if draw.random() < 0.1:
        args += draw.choice(ODD)
    return args


def draw_option(draw: random.Random, name: str, hint: Any) -> list[str]:
    """An option with a value that fits its type, or does not."""
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        return [flag]
    parts = str(hint)
    if name == "device":
        values = DEVICES
    elif "Path" in parts:
        values = PLACES
    elif "int" in parts or "float" in parts:
        values = NUMBERS
    elif get_origin(hint) is Literal:
        values = [*get_args(hint), "x"]
    else:
        values = WORDS
    count = draw.randint(0, 3) if "tuple" in parts else 1
    drawn = [draw.choice(values if draw.random() < 0.8 else WORDS) for _ in range(count)]
    return [f"{flag}={drawn[0]}"] if count == 1 else [flag, *drawn]


def draw_blow_up(draw: random.Random, subject: Subject) -> list[str]:
    """One or two numbers at the end of their range, or a thousand times beyond it."""
    args: list[str] = []
    for name in draw.sample(list(subject.highest), k=draw.randint(1, 2)):
        high = subject.highest[name]
        value = draw.choice([high, high, high / 10, 1000 * high])
        value = int(value) if isinstance(high, int) else value
        args += [f"--{name.replace('_', '-')}={value}"]
    return args


def describe_check(subject: Subject, args: list[str]) -> str:
    """How a command line ends that is parsed and checked: `runs`, `line` or `trace`."""
    try:
        subject.check(args)
    except (*REFUSED, *FAILED) as error:
        return "line" if "\n" not in one_line(error) else "trace"
    except SystemExit as stop:
        return "runs" if stop.code in (None, 0) else "trace"
    except Exception:
        traceback.print_exc()
        return "trace"
    return "runs"


def start_process(script: str, args: list[str], folder: Path, bytes_of_data: int) -> int:
    """Run a script in a copy of this process, which has imported what takes seconds to import."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        resource.setrlimit(resource.RLIMIT_DATA, (bytes_of_data, bytes_of_data))
        MAINS[script](args)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for(pid: int, seconds: float) -> int | None:
    """The exit code of a process, or None if it still runs after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def describe_process(pid: int, folder: Path, timeout: float) -> tuple[str, str]:
    """How a process ends, and what it wrote on standard error.

    The ends are `runs`, `line`, `stopped` after the timeout, `trace`, `hang` and `silent`.
    """
    code = wait_for(pid, timeout)
    interrupted = code is None
    if interrupted:
        os.kill(pid, signal.SIGINT)
        code = wait_for(pid, 30)
        if code is None:  # a step that lasts, which a second signal ends at once
            os.kill(pid, signal.SIGINT)
            code = wait_for(pid, 5)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    text = (folder / "stderr.txt").read_text(errors="backslashreplace")
    lines = text.strip().splitlines()
    if code is None:
        return "hang", text
    if "Traceback" in text:
        return "trace", text
    if code == 0:
        return "runs", text
    if interrupted and code == 130:
        return "stopped", text
    ended = bool(lines) and lines[-1].startswith("error: ") and code in (1, 2)
    return ("line" if ended else "silent"), text


def check_lines(seed: int, count: int, run: Path) -> Counter[str]:
    """Parse and check command lines; those that end in a trace are printed."""
    draw = random.Random(seed)
    ends: Counter[str] = Counter()
    for _ in range(count):
        subject = draw_subject(draw, run, list(EXPERIMENTS))
        first = subject.base[:1] if subject.script in ("tune", "evaluate") else []
        args = [*first, *draw_options(draw, subject)]
        end = describe_check(subject, args)
        ends[end] += 1
        if end == "trace":
            print(f"trace: {subject.script} {args}")
    return ends


# Those that need no data set.
OFFLINE = ["group-lasso", "regularization", "char-tower", "digits-autoencoder"]


def run_processes(options: Options, run: Path, folder: Path) -> Counter[str]:
    """Run processes. A next try in the folder of one that failed must be possible."""
    draw = random.Random(options.seed)
    ends: Counter[str] = Counter()
    for i in range(options.processes):
        subject = draw_subject(draw, run, OFFLINE)
        drawn = draw_blow_up(draw, subject) if i % 2 else draw_options(draw, subject)
        out = [] if subject.script == "evaluate" else [f"--out={folder / f'{i:03d}' / 'out'}"]
        args = [*subject.base, *out, *drawn]
        pid = start_process(subject.script, args, folder, options.gibibytes * 2**30)
        end, text = describe_process(pid, folder, options.timeout)
        ends[end] += 1
        last = text.strip().splitlines()[-1:] or [""]
        print(f"{i:3d} {end:<8}{subject.script} {' '.join(drawn)[:100]!a}: {last[0][:150]!a}")
        if end in ("trace", "hang", "silent"):
            print(ascii(text[-3000:]).replace("\\n", "\n"))
        if end == "line" and describe_check(subject, [*subject.base, *out]) != "runs":
            ends["blocked"] += 1
            print(f"    blocked: {[*subject.base, *out]}")
        sys.stdout.flush()
    return ends


@dataclass(frozen=True)
class Options:
    """How many command lines to draw."""

    lines: int = 0
    """Command lines to parse and check."""
    processes: int = 0
    """Command lines to run."""
    seed: int = 0
    """Seed of the draws."""
    timeout: float = 60.0
    """Seconds after which a process is interrupted."""
    gibibytes: int = 4
    """Memory of a process."""


def make_run(folder: Path) -> Path:
    """A tiny run of train.py to evaluate."""
    run = folder / "run"
    args = [*train_subject(random.Random(0)).base[:9], f"--out={run}"]
    MAINS["train"](args)
    return run


def main(options: Options) -> None:
    """Draw, run and count."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder)
        print(dict(check_lines(options.seed, options.lines, run)))
        print(dict(run_processes(options, run, folder)))


if __name__ == "__main__":
    main(tyro.cli(Options))
