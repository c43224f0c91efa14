"""What one panel of a plot shows. Matplotlib is imported when it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metaimplicit.training.fits import Fits
from metaimplicit.training.metrics import Evaluation

Line = dict[str, Any]  # of metrics.jsonl


def metric_of(lines: Sequence[Line]) -> str:
    """What a run is judged by: the accuracy or the metric, if it has one, or else the loss.

    Example:
        >>> metric_of([{"loss": 1.0, "accuracy": None}])
        'loss'
    """
    for name in ("accuracy", "metric"):
        if any(line.get(name) is not None for line in lines):
            return name
    return "loss"


def draw_progress(ax: Any, lines: Sequence[Line], *, x: str, y: str) -> None:
    """Training, step by step and as a running mean, and validation.

    Args:
        ax: The panel.
        lines: Those of metrics.jsonl. Those without `y` are left out.
        x: What they are drawn against, "step" or "seconds".
        y: What is drawn. A loss has a logarithmic axis.
    """
    for split in ("train", "validation"):
        rows = [row for row in lines if row["split"] == split and row.get(y) is not None]
        if not rows:
            continue
        at = [row[x] for row in rows]
        values = [row[y] for row in rows]
        if split == "train":
            draw_running_mean(ax, at, values, color="C0", label="training")
        else:
            ax.plot(
                at,
                values,
                "o-",
                color="C1",
                markersize=3,
                label="validation",
            )
    if x == "step":
        ax.xaxis.get_major_locator().set_params(integer=True)
    if y == "loss":
        set_log_scale(ax)
    ax.grid(which="both", alpha=0.3)


def draw_running_mean(
    ax: Any, x: Sequence[float], y: Sequence[float], *, color: str, label: str
) -> None:
    """A faint line, and its running mean over a fiftieth of the points."""
    window = max(len(x) // 50, 1)
    running_mean = torch.tensor(y).unfold(0, window, 1).mean(1)
    name = label if window == 1 or not label else f"{label}, mean of {window} steps"
    ax.plot(x, y, color=color, alpha=0.25, linewidth=0.5)
    ax.plot(x[window - 1 :], running_mean, color=color, label=name)


def draw_measure(ax: Any, evaluation: Evaluation) -> None:
    """The metric with its 95 % interval, against inner steps."""
    curve = evaluation.curve()
    mean = torch.tensor([estimate.mean for estimate in curve])
    interval = torch.tensor([estimate.interval for estimate in curve])
    ax.plot(evaluation.steps, mean, "o-", markersize=3)
    ax.fill_between(evaluation.steps, mean - interval, mean + interval, alpha=0.3)
    ax.set(xlabel="inner steps", ylabel=f"query {evaluation.metric}, 95 % interval")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def draw_fit(ax: Any, fits: Fits, task: int) -> None:
    """The predictions for one task, with its support and the truth."""
    inputs = fits.query.inputs[task]
    order = inputs.argsort()
    truth = fits.query.targets[task][order]
    steps = "1 step" if fits.steps == 1 else f"{fits.steps} steps"
    ax.plot(inputs[order], truth, color="0.6", linewidth=3, label="truth")
    ax.plot(
        fits.grid,
        fits.before[task],
        ":",
        color="C1",
        label="before adaptation",
    )
    ax.plot(fits.grid, fits.after[task], color="C0", label=f"after {steps}")
    support = (fits.support.inputs[task], fits.support.targets[task])
    ax.plot(*support, "^", color="k", markersize=5, label="support")
    ax.set_xlabel("input")


def draw_histogram(ax: Any, evaluation: Evaluation) -> None:
    """How many tasks have which metric after the last inner step. Those that are NaN have none."""
    values = evaluation.values[-1]
    ax.hist(values[values.isfinite()].tolist(), bins=20, color="C0", alpha=0.8)
    ax.set(xlabel=f"query {evaluation.metric} of a task", ylabel="tasks")
    ax.grid(alpha=0.3)


def draw_alone(draw: Callable[[Any], object]) -> Any:
    """A small figure of one panel, which stays readable on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7))
    ax = figure.subplots()
    draw(ax)
    if ax.get_legend_handles_labels()[1]:
        for text in ax.legend(fontsize=7, framealpha=0.5).get_texts():
            text.set_parse_math(False)  # a label may hold any name, and so a $
    figure.subplots_adjust(left=0.17, right=0.97, top=0.96, bottom=0.18)
    return figure


def set_log_scale(ax: Any) -> None:
    """A logarithmic y axis with plain numbers, 2 rather than 2 × 10⁰, if a value is positive."""
    from matplotlib.ticker import LogFormatter

    if not math.isfinite(ax.dataLim.minposy):
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter())
