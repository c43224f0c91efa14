"""The runs of an experiment, and tables of them in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Case = dict[str, Any]  # what distinguishes a run from the others: {"method": "cg", "seed": 0}
Row = dict[str, Any]  # what a run measured, in types that JSON has


class Run(NamedTuple):
    """A case, and the row that its run left."""

    case: Case
    row: Row


class Runs(list[Run]):
    """Runs in the order of their cases.

    Example:
        >>> runs = Runs([
        ...     Run({"method": "cg", "seed": 0}, {"loss": 1.0}),
        ...     Run({"method": "cg", "seed": 1}, {"loss": 3.0}),
        ...     Run({"method": "none", "seed": 0}, {}),
        ... ])
        >>> runs.where(method="cg", seed=1).values("loss")
        [3.0]
        >>> [(case, group.values("loss")) for case, group in runs.groups("method")]
        [({'method': 'cg'}, [1.0, 3.0]), ({'method': 'none'}, [])]
    """

    def where(self, **case: Any) -> Runs:
        """The runs whose case has all of these values."""
        return Runs(run for run in self if case.items() <= run.case.items())

    def values(self, key: str) -> list[Any]:
        """The value of `key` in each row that has it."""
        return [run.row[key] for run in self if key in run.row]

    def groups(self, *names: str) -> list[tuple[Case, Runs]]:
        """The runs whose cases share their values of `names`, each group with these values.

        Groups stand in the order of their first runs.
        """
        groups: dict[tuple[Any, ...], Runs] = {}
        for run in self:
            values = tuple(run.case.get(name) for name in names)
            groups.setdefault(values, Runs()).append(run)
        return [(dict(zip(names, values, strict=True)), runs) for values, runs in groups.items()]


Cell = Callable[[Runs], str]  # the text of a cell, given the runs of its line


def markdown_table(columns: Mapping[str, Cell], groups: Iterable[tuple[Case, Runs]]) -> str:
    """A Markdown table with a column for each title and a line for each group of `Runs.groups`.

    Example:
        >>> runs = Runs([Run({"method": "cg", "seed": 0}, {"loss": 0.5})])
        >>> columns = {"method": METHOD, "loss": mean("loss")}
        >>> print(markdown_table(columns, runs.groups("method")))
        | method | loss |
        | --- | --- |
        | `cg` | 0.50 |
    """
    lines = [[cell(runs) for cell in columns.values()] for _, runs in groups]
    return markdown(list(columns), lines)


def case_value(name: str, pattern: str = "{}") -> Cell:
    """A cell with the value of `name` that all cases of the group share, formatted."""
    return lambda runs: pattern.format(runs[0].case[name])


METHOD = case_value("method", "`{}`")


def mean(key: str, digits: int = 2, scale: float = 1) -> Cell:
    """A cell with the mean of `scale` · row[key] and its deviation over the rows that have the key.

    A value of None marks a run that diverged: the cell counts these runs, and the mean is that of
    the others.
    """

    def cell(runs: Runs) -> str:
        values = runs.values(key)
        finished = [scale * value for value in values if value is not None]
        if values and not finished:
            return "diverged"
        diverged = len(values) - len(finished)
        note = f" ({diverged} of {len(values)} diverged)" if diverged else ""
        return spread(finished, digits) + note

    return cell


def median(key: str, digits: int = 0) -> Cell:
    """A cell with the median of row[key] over the rows that have the key, or a dash."""

    def cell(runs: Runs) -> str:
        values = runs.values(key)
        return f"{statistics.median(values):.{digits}f}" if values else "–"

    return cell


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean ± the standard deviation of the sample. One value has no deviation.

    Example:
        >>> spread([1.0, 3.0]), spread([1.0], digits=3), spread([])
        ('2.00 ± 1.41', '1.000', '–')
    """
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table of a header and lines, all of one length."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, rule, *lines])
