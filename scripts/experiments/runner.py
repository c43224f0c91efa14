"""Run an experiment: its missing runs, then its table and its plot."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from experiments.base import Experiment
from experiments.runs import Case, Row, Run, Runs
from metaimplicit.training import CHECKPOINT, CONFIG, read_json, write_atomically, write_json

# Options of every experiment that do not change what a run computes.
RUN_OPTIONS = ("method", "seeds", "out", "device", "threads", "data_root", "quick")


def execute(experiment: Experiment) -> str:
    """Make the runs whose results are missing; write rows.json, table.md and plot.png.

    Every run has a folder of its own in the experiment's folder. Its row is stored there, in
    summary.json, when the run is done. If that file exists, the run is not repeated.

    Returns:
        The table, in Markdown.

    Raises:
        FileExistsError: The folder of a run holds a run with other options.
        ValueError: An option is out of range.
    """
    if experiment.quick:
        experiment = experiment.smoke_test_version()
    experiment.check_options()
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)

    cases = experiment.cases()
    for case in cases:
        require_same_options(experiment, case)
    runs = Runs(Run(case, read_or_run(experiment, case)) for case in cases)

    table = experiment.table(runs)
    figure = Figure(figsize=(8, 4), layout="constrained")
    experiment.plot(runs, figure)
    folder = experiment.folder
    write_json(folder / "rows.json", [run._asdict() for run in runs])
    write_atomically(folder / "table.md", lambda file: file.write(f"{table}\n".encode()))
    write_atomically(folder / "plot.png", lambda file: figure.savefig(file, dpi=120))
    return table


def read_or_run(experiment: Experiment, case: Case) -> Row:
    """The row of a case, from its summary.json if there is one.

    The row has the seconds that the run took, unless the experiment measured its `seconds` itself.
    """
    out = experiment.case_folder(case)
    summary = out / "summary.json"
    if not summary.exists():
        write_json(out / CONFIG, run_config(experiment, case))
        # Sketches draw from torch's global generator. What ran before must not change them.
        torch.manual_seed(case["seed"])
        began = time.perf_counter()
        row = experiment.run(case, out)
        write_json(summary, {"seconds": time.perf_counter() - began} | row)
        print(f"{experiment.name} {case}: {summary}", flush=True)
    stored_row: Row = read_json(summary)
    return stored_row


def require_same_options(experiment: Experiment, case: Case) -> None:
    """Check that the folder of a run holds none, or one with the options given now.

    A run that ended before its first checkpoint left nothing to lose, and does not count.

    Raises:
        FileExistsError: The folder holds a run with other options.
    """
    out = experiment.case_folder(case)
    results = [name for name in ("summary.json", CHECKPOINT) if (out / name).exists()]
    if not results or not (out / CONFIG).exists():
        return
    stored = read_json(out / CONFIG)
    if stored != run_config(experiment, case):
        raise FileExistsError(
            f"--out: got {out}, which holds a run with other options ({stored}), expected a run "
            "with the options given now; name another folder"
        )


def run_config(experiment: Experiment, case: Case) -> dict[str, Any]:
    """What the config.json of a run holds."""
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
