"""The table and the plot of the race."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import legend_below
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from metaimplicit.training import write_atomically
from racing.contenders import PEERS

LEVELS = (90, 95, 97, 98)  # accuracies on validation classes, in %
LEAST_ERROR = 0.1  # that a plot shows, in %
Row = Mapping[str, Any]
Curve = Sequence[Mapping[str, float]]


def minutes_to(curve: Curve, level: float) -> float | None:
    """The minutes of training at the first validation with an accuracy of at least `level` %.

    None if there is none. Nothing is interpolated.

    Example:
        >>> curve = [{"seconds": 30.0, "accuracy": 0.5}, {"seconds": 60.0, "accuracy": 0.9}]
        >>> minutes_to(curve, 90), minutes_to(curve, 95)
        (1.0, None)
    """
    for point in curve:
        if 100 * point["accuracy"] >= level:
            return point["seconds"] / 60
    return None


def minutes_text(curve: Curve, level: float, limit: float) -> str:
    """The minutes to a level, or that they are more than the limit.

    Example:
        >>> minutes_text([{"seconds": 90.0, "accuracy": 0.96}], 97, limit=25)
        '> 25'
    """
    minutes = minutes_to(curve, level)
    return f"> {limit:g}" if minutes is None else f"{minutes:.2f}"


def race_table(rows: Sequence[Row], limit: float) -> str:
    """A line for each contender, in Markdown."""
    heads = ["contender", "threads", "meta-steps", *(f"min to {level} %" for level in LEVELS)]
    heads += ["best validation, %", "last validation, %", "test, %", "normalised by"]
    lines = [heads, ["---"] * len(heads), *(describe_row(row, limit) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_row(row: Row, limit: float) -> list[str]:
    """The cells of a contender."""
    curve, test = row["curve"], row["test"]
    best = max(point["accuracy"] for point in curve)
    return [
        row["contender"],
        str(row["chosen_threads"]),
        str(curve[-1]["steps"]),
        *(minutes_text(curve, level, limit) for level in LEVELS),
        f"{100 * best:.2f}",
        f"{100 * curve[-1]['accuracy']:.2f}",
        f"{100 * test['mean']:.2f} ± {100 * test['interval_95']:.2f}",
        row["normalization"],
    ]


def fastest_line(rows: Sequence[Row], level: float, limit: float) -> str:
    """The fastest of ours and the fastest peer to a level, and the ratio of their minutes."""
    sides: dict[str, list[tuple[float, str]]] = {"ours": [], "peers": []}
    for row in rows:
        side = sides["peers" if row["contender"] in PEERS else "ours"]
        minutes = minutes_to(row["curve"], level)
        side.append((float("inf") if minutes is None else minutes, row["contender"]))
    if not (sides["ours"] and sides["peers"]):
        return f"To {level} %: there is nothing to compare."
    (ours, our_name), (peer, peer_name) = min(sides["ours"]), min(sides["peers"])
    if ours == float("inf"):
        return f"To {level} %: none of ours gets there in {limit:g} minutes."
    if peer == float("inf"):
        return (
            f"To {level} %: {our_name} in {ours:.2f} min, no peer in {limit:g} min, "
            f"a ratio below {ours / limit:.3f}."
        )
    return (
        f"To {level} %: {our_name} in {ours:.2f} min, {peer_name} in {peer:.2f} min, "
        f"a ratio of {ours / peer:.3f}."
    )


def draw_race(path: Path, rows: Sequence[Row]) -> None:
    """Leave a plot of the accuracies on validation classes against minutes, in logarithms.

    The height is the error, so that the upper levels are apart. Lines of peers are dashed.
    """
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    ax = figure.subplots()
    for i, row in enumerate(rows):
        name = row["contender"]
        minutes = [point["seconds"] / 60 for point in row["curve"]]
        errors = [max(100 * (1 - point["accuracy"]), LEAST_ERROR) for point in row["curve"]]
        style = "--" if name in PEERS else "-"
        ax.plot(
            minutes,
            errors,
            style,
            color=f"C{i % 10}",
            marker="o",
            markersize=2,
            label=name,
        )
    ax.set(xscale="log", yscale="log", xlabel="minutes of training")
    ax.set(ylabel="accuracy on validation classes, %")
    ax.set_yticks([100 - level for level in (50, 80, *LEVELS, 99)])
    ax.set_yticklabels([f"{level}" for level in (50, 80, *LEVELS, 99)])
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.invert_yaxis()
    ax.grid(alpha=0.3)
    legend_below(ax, columns=3)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120))
