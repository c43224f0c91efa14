"""What the experiments of tune.py share: cases kept one by one, a table, a plot."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from command_line.device import find_device
from matplotlib.figure import Figure

from metaimplicit.methods import METHODS
from metaimplicit.training import CONFIG, read_json, write_atomically, write_json

Case = dict[str, Any]  # what tells one run from another: {"method": "cg", "seed": 0}
Row = dict[str, Any]  # what a run found, for JSON


@dataclass(frozen=True)
class Experiment(ABC):
    """Options of every experiment."""

    method: tuple[str, ...] = ()
    """Methods to compare, baselines included; by default all of the experiment's."""
    seeds: int = 3
    """Runs of each, from seed 0 on."""
    data_root: Path | None = None
    """Where the data is; downloaded if not given."""
    out: Path | None = None
    """Folder for what the runs leave; by default runs/tune/EXPERIMENT. Runs found there are not repeated."""
    device: str = "auto"
    """auto takes CUDA where there is any; else cpu, cuda, cuda:1 …"""
    threads: int | None = None
    """CPU threads of torch; by default torch's choice."""
    quick: bool = False
    """A rehearsal: the smallest sizes, one seed."""

    name: ClassVar[str]
    baselines: ClassVar[tuple[str, ...]] = ()  # `method`s that are none of METHODS
    compared: ClassVar[tuple[str, ...]]  # what `method` is by default, baselines included
    listed: ClassVar[
        tuple[str, ...]
    ] = ()  # options that say which cases there are, and nothing of any one

    @abstractmethod
    def quickened(self) -> Experiment:
        """The same at the smallest size."""

    @abstractmethod
    def run(self, case: Case, out: Path) -> Row:
        """One run, whose files may go to `out`."""

    @abstractmethod
    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        """What was found, in Markdown."""

    @abstractmethod
    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        """Draw it."""

    def cases(self) -> list[Case]:
        """The runs to make, in order."""
        return [
            {"method": method, "seed": seed}
            for seed in range(self.seeds)
            for method in self.methods
        ]

    @property
    def methods(self) -> tuple[str, ...]:
        """Those asked for; ValueError for an unknown one."""
        known = [*self.baselines, *METHODS]
        if unknown := [m for m in self.method if m not in known]:
            raise ValueError(
                f"--method: got {', '.join(unknown)}, expected some of {', '.join(known)}"
            )
        return self.method or self.compared

    @property
    def folder(self) -> Path:
        return self.out or Path("runs", "tune", f"{self.name}-quick" if self.quick else self.name)

    @property
    def torch_device(self) -> torch.device:
        return find_device(self.device)


def execute(experiment: Experiment) -> str:
    """Make the runs that are not there yet; leave their table, plot and rows in the experiment's folder.

    Raises:
        FileExistsError: a run there had other options.
        ValueError: an option out of range.
    """
    if experiment.seeds < 1:
        raise ValueError(f"--seeds: got {experiment.seeds}, expected at least 1")
    if experiment.quick:
        experiment = experiment.quickened()
    if experiment.threads is not None:
        if experiment.threads < 1:
            raise ValueError(f"--threads: got {experiment.threads}, expected at least 1")
        torch.set_num_threads(experiment.threads)
    free = (*_FREE, *experiment.listed)
    options = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in asdict(experiment).items()
        if k not in free
    }
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    cases, rows = experiment.cases(), []
    find_device(experiment.device)
    for case in cases:
        out = experiment.folder / "-".join(str(part) for part in case.values())
        config, summary = (
            {"experiment": experiment.name, "options": options, "case": case},
            out / "summary.json",
        )
        if (out / CONFIG).exists() and (found := read_json(out / CONFIG)) != config:
            raise FileExistsError(
                f"--out: {out} holds a run with other options ({found}), expected those given now; name another folder"
            )
        if not summary.exists():
            write_json(out / CONFIG, config)
            torch.manual_seed(case["seed"])  # of sketches, whatever ran before
            write_json(summary, experiment.run(case, out))
            print(f"{experiment.name} {case}: {summary}", flush=True)
        rows.append((case, read_json(summary)))
    table = experiment.table(rows)
    write_json(experiment.folder / "rows.json", [{"case": case, "row": row} for case, row in rows])
    write_atomically(experiment.folder / "table.md", lambda file: file.write(f"{table}\n".encode()))
    figure = Figure(figsize=(8, 4), layout="constrained")
    experiment.plot(rows, figure)
    write_atomically(experiment.folder / "plot.png", lambda file: figure.savefig(file, dpi=120))
    return table


def select(rows: Iterable[tuple[Case, Row]], key: str, **case: Any) -> list[Any]:
    """`key` of the rows whose case has these values."""
    return [
        row[key] for found, row in rows if all(found[name] == value for name, value in case.items())
    ]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean ± standard deviation (of the sample; none of one value)."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join(
        f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *lines]
    )


_FREE = ("method", "seeds", "out", "device", "threads", "data_root", "quick")
