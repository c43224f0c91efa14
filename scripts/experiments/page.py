"""The page of an experiment: report.html."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from experiments.base import Experiment
from experiments.runs import Runs
from metaimplicit.training import CONFIG, peak_memory, read_metrics, read_sealed_json
from metaimplicit.training.health_section import health_section
from metaimplicit.training.page import (
    Html,
    chart,
    element,
    join,
    make_page,
    note,
    plain,
    table,
    tiles,
)
from metaimplicit.training.progress import duration
from metaimplicit.training.provenance_sections import options_section, sittings_table

NUMBERS = (int, float, str, type(None))  # what of a row stands in a cell


def make_experiment_page(experiment: Experiment, runs: Runs, *, text: str, figure: Figure) -> str:
    """The page of the runs, with their table in Markdown and their plot."""
    seconds = sum(run.row.get("seconds") or 0 for run in runs)
    about = _inline(" ".join((type(experiment).__doc__ or "").split()))
    numbers = tiles({"runs": len(runs), "time of all runs": duration(seconds)})
    sections = {
        "Results": from_markdown(text),
        "Plot": chart(figure, f"{experiment.name}: the results of all runs.", is_wide=True),
        "Hypergradient": _health(experiment, runs),
        "Runs": _runs_table(runs),
        "Memory and time": _costs(experiment, runs),
        "Options": options_section(_options(experiment)),
        "Provenance": _provenance(experiment, runs),
    }
    return make_page(f"Tuning: {experiment.name}", join([element("p", about), numbers]), sections)


def from_markdown(text: str) -> Html:
    """Paragraphs and tables of Markdown, as `markdown_table` writes them.

    Example:
        >>> from_markdown("At `cg`:")
        '<p>At <code>cg</code>:</p>'
    """
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    return join(element_of for block in blocks for element_of in _block(block.splitlines()))


def _block(lines: Sequence[str]) -> Iterator[Html]:
    for is_table, group in groupby(lines, key=lambda line: line.startswith("|")):
        if not is_table:
            yield element("p", _inline(" ".join(group)))
            continue
        head, _, *rows = ([_inline(cell) for cell in line[2:-2].split(" | ")] for line in group)
        yield table(head, rows)


def _inline(text: str) -> Html:
    """Text in which what stands between backticks is code."""
    parts = text.strip().split("`")
    return element("span", *(element("code", p) if i % 2 else p for i, p in enumerate(parts)))


def _health(experiment: Experiment, runs: Runs) -> Html:
    lines = {}
    for run in runs:
        # A run may consist of several, each with a folder of its own.
        for path in sorted(experiment.case_folder(run.case).rglob("metrics.jsonl")):
            name = str(path.parent.relative_to(experiment.folder))
            lines[name] = read_metrics(path.parent, complete=False)
    if not lines:
        return note("The runs of this experiment log no single hypergradients.")
    return health_section(lines)


def _runs_table(runs: Runs) -> Html:
    """A line for each run, with the numbers of its row. Series are left out."""
    names = dict.fromkeys(
        name for run in runs for name, value in run.row.items() if isinstance(value, NUMBERS)
    )
    cases = list(runs[0].case) if runs else []
    rows = [[*map(plain, run.case.values()), *(_cell(run.row, n) for n in names)] for run in runs]
    return table([*_words(cases), *_words(names)], rows)


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return plain(value) if isinstance(value, NUMBERS) else "–"


def _words(names: Sequence[str] | dict[str, None]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _costs(experiment: Experiment, runs: Runs) -> Html:
    rows = []
    for case, group in runs.groups("method"):
        seconds = [value for value in group.values("seconds") if value is not None]
        mean = duration(sum(seconds) / len(seconds)) if seconds else "–"
        rows.append([plain(case["method"]), len(group), mean])
    memory = peak_memory(experiment.torch_device)
    words = (
        f"The process that wrote this page held {memory:,.0f} MiB at most. Runs that were done "
        "before it began do not count in that."
    )
    return join([table(["method", "runs", "mean time of a run"], rows), note(words)])


def _options(experiment: Experiment) -> dict[str, Any]:
    options = asdict(experiment)
    return {
        name: value if isinstance(value, (int, float, tuple, type(None))) else str(value)
        for name, value in options.items()
    }


def _provenance(experiment: Experiment, runs: Runs) -> Html:
    """What the runs ran on: a line for each sitting that differs from the others."""
    sittings: list[dict[str, Any]] = []
    for run in runs:
        path = experiment.case_folder(run.case) / CONFIG
        stored = read_sealed_json(path).get("sittings", []) if path.exists() else []
        sittings += [sitting for sitting in stored if sitting not in sittings]
    if not sittings:
        return note("No config.json of a run says what it ran on.")
    return sittings_table(sittings)
