"""Run an experiment: its missing runs, then its table and its plot."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from command_line.device import set_up_cpu
from matplotlib.figure import Figure

from experiments.base import Experiment
from experiments.page import make_experiment_page
from experiments.runs import Case, Row, Run, Runs
from metaimplicit.training import (
    CHECKPOINT,
    CONFIG,
    describe_sitting,
    has_taken_steps,
    leave_page,
    metered,
    only_writer,
    read_metrics,
    read_sealed_json,
    remove_unsaved_run,
    write_atomically,
    write_json,
    write_sealed_json,
)
from metaimplicit.training.log import METRICS

# Options of every experiment that do not change what a run computes.
RUN_OPTIONS = ("method", "seeds", "out", "device", "threads", "data_root", "quick")


def execute(experiment: Experiment) -> str:
    """Make the runs whose results are missing; write rows.json, table.md, plot.png, report.html.

    Every run has a folder of its own in the experiment's folder. Its row is stored there, in
    summary.json, when the run is done. If that file exists, the run is not repeated. Another
    process may make other runs of the experiment at the same time.

    Returns:
        The table, in Markdown.

    Raises:
        FileExistsError: The folder of a run holds a run with other options.
        ValueError: An option is out of range.
    """
    if experiment.quick:
        experiment = experiment.smoke_test_version()
    experiment.check_options()
    set_up_cpu(experiment.threads)

    cases = once(experiment.cases())
    if not cases:
        raise ValueError("got options that ask for no run, expected a value for each of them")
    for case in cases:
        require_same_options(experiment, case)
    runs = Runs(Run(case, read_or_run(experiment, case)) for case in metered(cases, "run"))

    table = experiment.table(runs)
    figure = Figure(figsize=(8, 4), layout="constrained")
    experiment.plot(runs, figure)
    folder = experiment.folder
    write_json(folder / "rows.json", [run._asdict() for run in runs])
    write_atomically(folder / "table.md", lambda file: file.write(f"{table}\n".encode()))
    write_atomically(folder / "plot.png", lambda file: figure.savefig(file, dpi=120))
    leave_page(
        folder / "report.html",
        lambda: make_experiment_page(experiment, runs, text=table, figure=figure),
    )
    return table


def once(cases: list[Case]) -> list[Case]:
    """The cases without those that an option such as `--method cg cg` asks for again.

    A run that counted twice would make deviations smaller than they are.
    """
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def read_or_run(experiment: Experiment, case: Case) -> Row:
    """The row of a case, from its summary.json if there is one.

    The row has the seconds that the run took, unless the experiment measured its `seconds` itself.
    """
    out = experiment.case_folder(case)
    summary = out / "summary.json"
    require_same_options(experiment, case)
    if not summary.exists():
        with only_writer(out):
            # Meanwhile, another process may have made the run.
            is_new = require_same_options(experiment, case)
            if not summary.exists():
                make_row(experiment, case, out, is_new=is_new)
    return read_sealed_json(summary)


def make_row(experiment: Experiment, case: Case, out: Path, *, is_new: bool) -> None:
    """Run a case, and leave its row in summary.json."""
    summary = out / "summary.json"
    if is_new:
        remove_unsaved_run(out)
        start = describe_sitting(experiment.torch_device) | {"from_step": 0, "to_step": None}
        config = case_config(experiment, case) | {"data": experiment.data_of(case)}
        config |= {"sittings": [start]}
        write_sealed_json(out / CONFIG, config)
    # Sketches draw from torch's global generator. What ran before must not change them.
    torch.manual_seed(case["seed"])
    began = time.perf_counter() - recorded_seconds(out)
    row = experiment.run(case, out)
    write_sealed_json(summary, {"seconds": time.perf_counter() - began} | row)
    print(f"{experiment.name} {case}: {summary}", flush=True)


def recorded_seconds(out: Path) -> float:
    """The seconds of earlier sittings of the runs in a folder, as far as their metrics say."""
    total = 0.0
    for path in out.rglob(METRICS):
        lines = read_metrics(path.parent, complete=False)
        total += max((line.get("seconds", 0.0) for line in lines), default=0.0)
    return total


def require_same_options(experiment: Experiment, case: Case) -> bool:
    """Check that the folder of a case holds no run with other options.

    A run that ended before it saved a step is none.

    Returns:
        Whether the folder holds no run of the case.

    Raises:
        FileExistsError: It holds a run with other options.
        DamagedFileError: Its config.json is not what was written.
    """
    out = experiment.case_folder(case)
    if not (out / CONFIG).exists():
        return True
    stored = read_sealed_json(out / CONFIG)
    config = case_config(experiment, case)
    if "data" in stored:
        config["data"] = stored["data"]
        with suppress(FileNotFoundError):  # what is done can be shown without its data
            config["data"] = experiment.data_of(case)
    if {name: stored.get(name) for name in config} == config:
        return False
    if (out / "summary.json").exists() or has_taken_steps(out / CHECKPOINT):
        raise FileExistsError(
            f"--out: got {out}, which holds a run with other options "
            f"({describe_changes(stored, config)}), expected a run with the options given now; "
            "name another folder"
        )
    return True


def describe_changes(stored: dict[str, Any], config: dict[str, Any]) -> str:
    """What of a config.json differs from what is expected there, option by option."""
    before, now = (
        {name: entry.get(name) for name in ("experiment", "case", "data")}
        | (entry.get("options") or {})
        for entry in (stored, config)
    )
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{n} is {before.get(n)} there, {now.get(n)} here" for n in names)


def case_config(experiment: Experiment, case: Case) -> dict[str, Any]:
    """What a run is, for its config.json, beside its data."""
    return {"experiment": experiment.name, "options": stored_options(experiment), "case": case}


def stored_options(experiment: Experiment) -> dict[str, Any]:
    """The options that every run of an experiment shares, in types that JSON has."""
    excluded = (*RUN_OPTIONS, *experiment.case_options)
    options = {name: v for name, v in asdict(experiment).items() if name not in excluded}
    for name, value in options.items():
        if isinstance(value, Path):
            options[name] = str(value)
        elif isinstance(value, tuple):
            options[name] = list(value)
    return options
