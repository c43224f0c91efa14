"""The page of a run: report.html."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from metaimplicit.training.episode_sections import confusion_section, episodes_section
from metaimplicit.training.fits import Fits
from metaimplicit.training.health_section import health_section
from metaimplicit.training.log import CONFIG, METRICS, read_metrics
from metaimplicit.training.metrics import Estimate, Evaluation
from metaimplicit.training.page import (
    Html,
    chart,
    charts,
    definitions,
    element,
    folded,
    join,
    make_page,
    note,
    number,
    plain,
    table,
    tiles,
)
from metaimplicit.training.panels import (
    Line,
    draw_alone,
    draw_fit,
    draw_histogram,
    draw_measure,
    draw_progress,
    metric_of,
)
from metaimplicit.training.predictions import Predictions
from metaimplicit.training.progress import duration
from metaimplicit.training.provenance_sections import options_section, provenance_section
from metaimplicit.training.sealed import read_sealed_json

HEADINGS = {"accuracy": "Accuracy", "metric": "Metric", "mse": "Error", "loss": "Loss"}
# What was measured beside the accuracy, by its name in summary.json: a label, and how it reads.
COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "train_seconds": ("training, validation included", duration),
    "test_seconds": ("test", duration),
    "peak_memory_mib": ("peak memory", lambda mebibytes: f"{mebibytes:,.0f} MiB"),
}


def make_run_page(
    out: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    predictions: Predictions | None = None,
    fits: Fits | None = None,
) -> str:
    """The page of a run of `fit` or `fit_tuner`, in HTML. Pass it to `leave_page`.

    What is not given, and what the folder does not hold, is left out, or is said to be missing.

    Args:
        out: The run's folder, with its config.json and metrics.jsonl.
        title: What the run is called.
        summary: What else was measured: `train_seconds`, `test_seconds`, `peak_memory_mib`, and
            anything else that is to stand beside the accuracy, by name.
        evaluation: The test of a learner.
        predictions: What a learner said of some tasks of classification.
        fits: What it predicted for some tasks of one input and one output.

    Example:
        >>> import tempfile
        >>> from metaimplicit.training import leave_page
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "report.html")
        ...     leave_page(path, lambda: make_run_page(path.parent, title="sinusoid"))
        ...     "This run has not been tested." in path.read_text()
        True
    """
    out = Path(out)
    config = read_sealed_json(out / CONFIG) if (out / CONFIG).exists() else {}
    lines = read_metrics(out, complete=False) if (out / METRICS).exists() else []
    facts = dict(summary or {})
    measure = "Accuracy" if evaluation is None else HEADINGS[evaluation.metric]
    sections = {measure: _measure_section(evaluation, facts), "Curves": _curves_section(lines)}
    if evaluation is not None:
        sections["Adaptation"] = _adaptation_section(evaluation)
    if fits is not None:
        sections["Fits"] = _fits_section(fits)
    if predictions is not None:
        sections["Episodes"] = episodes_section(predictions)
        sections["Confusion"] = confusion_section(predictions)
    sections |= {
        "Hypergradient": join([_chosen(config), health_section({"": lines})]),
        "Memory and time": _costs_section(facts, lines),
        "Options": options_section(config),
        "Provenance": provenance_section(config),
    }
    return make_page(title, _lead(evaluation, facts, config, lines), sections)


def estimate_text(estimate: Estimate, metric: str) -> str:
    """An estimate with its interval, an accuracy in percent.

    Example:
        >>> estimate_text(Estimate(0.95, 0.004, tasks=600), "accuracy")
        '95.00 ± 0.40 %'
    """
    if metric == "accuracy":
        return f"{100 * estimate.mean:.2f} ± {100 * estimate.interval:.2f} %"
    return str(estimate)


def _lead(
    evaluation: Evaluation | None,
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    lines: list[Line],
) -> Html:
    values: dict[str, object] = {}
    if evaluation is not None:
        last = evaluation.curve()[-1]
        tested_on = facts.get("split", "test")
        label = f"{tested_on} {evaluation.metric}, 95 % interval over {last.tasks} tasks"
        values[label] = estimate_text(last, evaluation.metric)
    if lines:
        values["outer steps"] = f"{lines[-1]['step']:,}"
        facts = {"train_seconds": lines[-1]["seconds"], **facts}
    for name in ("train_seconds", "peak_memory_mib"):
        if name in facts:
            label, show = COSTS[name]
            values[label] = show(facts[name])
    if "parameters" in config:
        count = config["parameters"]
        values["meta-parameters"] = f"{count:,}" if isinstance(count, int) else plain(count)
    return tiles(values) if values else note("Nothing was measured yet.")


def _measure_section(evaluation: Evaluation | None, facts: Mapping[str, Any]) -> Html:
    if evaluation is None:
        return note("This run has not been tested.")
    metric = evaluation.metric
    last = evaluation.curve()[-1]
    words = (
        f"{estimate_text(last, metric)} after {_count(evaluation.steps[-1], 'inner step')}: the "
        f"mean of {last.tasks} tasks that training has not seen, and its 95 % interval."
    )
    histogram = chart(
        draw_alone(lambda ax: draw_histogram(ax, evaluation)),
        f"How many tasks have which {metric} after the last inner step.",
    )
    left_out = COSTS.keys() | evaluation.summary().keys() | {"meta_steps"}
    others = {name: value for name, value in facts.items() if name not in left_out}
    return join([element("p", words), charts([histogram]), _values(others)])


def _curves_section(lines: list[Line]) -> Html:
    if not lines:
        return note("No step of training was logged.")
    metric = metric_of(lines)
    wanted = [("step", metric), ("seconds", metric)]
    if metric != "loss":
        wanted.append(("step", "loss"))
    drawn = [_curve(lines, x=x, y=y) for x, y in wanted]
    rows = [row for row in lines if row["split"] == "validation"]
    scores = [row[metric] for row in rows if row.get(metric) is not None]
    if not scores:
        return join([charts(drawn), note("This run was not validated.")])
    words = f"Validated {_count(len(scores), 'time')}. The last {metric} is {number(scores[-1])}."
    if metric == "accuracy":
        words += f" The best one is {number(max(scores))}."
    return join([charts(drawn), note(words)])


def _curve(lines: list[Line], *, x: str, y: str) -> Html:
    def draw(ax: Any) -> None:
        draw_progress(ax, lines, x=x, y=y)
        ax.set(xlabel="outer steps" if x == "step" else "seconds", ylabel=y)

    against = "outer steps" if x == "step" else "seconds"
    return chart(draw_alone(draw), f"{y[0].upper()}{y[1:]} against {against}.")


def _adaptation_section(evaluation: Evaluation) -> Html:
    drawn = chart(
        draw_alone(lambda ax: draw_measure(ax, evaluation)),
        f"Query {evaluation.metric} after each number of inner steps, with its 95 % interval.",
    )
    pairs = zip(evaluation.steps, evaluation.curve(), strict=True)
    rows = [[steps, estimate_text(estimate, evaluation.metric)] for steps, estimate in pairs]
    numbers = table(["inner steps", f"query {evaluation.metric}"], rows)
    return join([charts([drawn]), folded("Numbers", numbers)])


def _fits_section(fits: Fits) -> Html:
    drawn = (
        chart(draw_alone(partial(draw_fit, fits=fits, task=task)), f"Task {task + 1}.")
        for task in range(len(fits.before))
    )
    words = "Some tasks: the truth, what is predicted before and after adaptation, the support."
    return join([note(words), charts(drawn)])


def _chosen(config: Mapping[str, Any]) -> Html:
    """What was chosen when the run began: the solver, the way to batch tasks."""
    chosen = config.get("chosen", {})
    named = chosen if isinstance(chosen, Mapping) else {"chosen": chosen}
    return _values({name: value for name, value in named.items() if value})


def _costs_section(facts: Mapping[str, Any], lines: list[Line]) -> Html:
    values = {label: show(facts[name]) for name, (label, show) in COSTS.items() if name in facts}
    # A validation between two steps has a line of its own, and its time is not that of a step.
    gaps = [
        after["seconds"] - before["seconds"]
        for before, after in pairwise(lines)
        if after["split"] == "train"
    ]
    if gaps:
        values["median time of an outer step"] = duration(median(gaps))
    return definitions(values) if values else note("Neither memory nor time was measured.")


def _values(values: Mapping[str, Any]) -> Html:
    """Names and values of JSON, if there are any."""
    words = {name.replace("_", " "): plain(value) for name, value in values.items()}
    return definitions(words) if words else Html()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
