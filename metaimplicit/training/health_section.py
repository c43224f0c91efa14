"""The section of a page that shows how far the hypergradients of runs can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from metaimplicit.training.page import Html, chart, charts, join, note, number, table
from metaimplicit.training.panels import Line, draw_alone, draw_running_mean, set_log_scale
from metaimplicit.training.unsettled import describe_unsettled

# What is measured at each outer step, by its name in metrics.jsonl: a title, and what it says.
QUANTITIES = {
    "residual": (
        "residual of the solve",
        "‖v − Au‖/‖v‖: 0 where the linear system of an implicit method is solved exactly",
    ),
    "inner_gradient_norm": (
        "stationarity",
        "‖∂f/∂θ‖ where the inner loop ends: implicit methods are exact where it is 0",
    ),
    "leftover": (
        "what the inner loop leaves",
        "|uᵀ ∂f/∂θ|/g: to first order, the share by which the outer loss g would still change if "
        "the inner loop went on to its minimum",
    ),
    "hessian_residual": (
        "error of the curvature",
        "‖v − Hu‖/‖v‖ with the Hessian H: what a stand-in for it, such as Gauss–Newton, leaves out",
    ),
    "negative_curvature": (
        "negative curvature",
        "the share of tasks whose matrix A was seen not to be positive definite",
    ),
    "gradient_norm": (
        "norm of the hypergradient",
        "of all meta-parameters together, before it is clipped",
    ),
    "applied": (
        "applied steps",
        "the share of hypergradients that were finite, so that the step was taken",
    ),
}
SHARES = ("negative_curvature", "applied")  # from 0 to 1
MOST_COLORS = 10


def health_section(runs: Mapping[str, Sequence[Line]]) -> Html:
    """Charts over the outer steps, and a table.

    Args:
        runs: The lines of metrics.jsonl of each run, by what the run is called. Those of training
            count.
    """
    trained = {
        run: [line for line in lines if line["split"] == "train"] for run, lines in runs.items()
    }
    present = {name: _series(trained, name) for name in QUANTITIES}
    measured = {name: series for name, series in present.items() if series}
    if not measured:
        return note("No step of training was logged.")
    words = []
    if "residual" not in measured:
        words.append(note("The method solves no linear system, so there is no residual."))
    for run, lines in runs.items():
        unsettled = describe_unsettled(lines)
        if unsettled:
            words.append(note(f"{run}: {unsettled}."))
    # A constant needs no chart: the table has it.
    moving = {name: s for name, s in measured.items() if _varies(s)}
    drawn = (_chart(name, series) for name, series in moving.items())
    of_runs = _table_of_one if len(runs) == 1 else _table_of_several
    return join([*words, charts(drawn), of_runs(measured)])


Series = dict[str, tuple[list[float], list[float]]]  # steps and values of each run


def _series(runs: Mapping[str, Sequence[Line]], name: str) -> Series:
    series = {}
    for run, lines in runs.items():
        rows = [line for line in lines if line.get(name) is not None]
        if rows:
            series[run] = ([row["step"] for row in rows], [row[name] for row in rows])
    return series


def _varies(series: Series) -> bool:
    return any(len(set(values)) > 1 for _, values in series.values())


def _chart(name: str, series: Series) -> Html:
    is_one = len(series) == 1

    def draw(ax: Any) -> None:
        for position, (run, (steps, values)) in enumerate(series.items()):
            color = f"C{position % MOST_COLORS}"
            has_label = not is_one and len(series) <= MOST_COLORS
            label = run.encode(errors="backslashreplace").decode() if has_label else ""
            draw_running_mean(ax, steps, values, color=color, label=label)
        if name not in SHARES and any(max(values) > 0 for _, values in series.values()):
            set_log_scale(ax)
        ax.set_xlabel("outer steps")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(which="both", alpha=0.3)

    title, meaning = QUANTITIES[name]
    return chart(draw_alone(draw), f"{title[0].upper()}{title[1:]}: {meaning}.")


def _table_of_one(measured: Mapping[str, Series]) -> Html:
    rows = []
    for name, series in measured.items():
        ((_, values),) = series.values()
        rows.append([QUANTITIES[name][0], *_summary(values), QUANTITIES[name][1]])
    head = ["", "first tenth", "last tenth", "largest", ""]
    words = note("The first two columns of numbers are medians over a tenth of the steps.")
    return join([table(head, rows), words])


def _table_of_several(measured: Mapping[str, Series]) -> Html:
    runs = dict.fromkeys(run for series in measured.values() for run in series)
    rows = []
    for run in runs:
        cells: list[Any] = [run]
        for series in measured.values():
            cells.append(_summary(series[run][1])[1] if run in series else "–")
        rows.append(cells)
    titles = [QUANTITIES[name][0] for name in measured]
    words = note("Medians over the last tenth of the steps.")
    return join([table(["run", *titles], rows), words])


def _summary(values: Sequence[float]) -> list[str]:
    tenth = max(len(values) // 10, 1)
    first = median(values[:tenth])
    last = median(values[-tenth:])
    return [number(first), number(last), number(max(values))]
