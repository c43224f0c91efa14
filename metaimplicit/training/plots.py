"""Plots of a run. Matplotlib is imported when one is drawn, and needs no display."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaimplicit.learner import EpisodeBatch, MetaLearner, Pair, read_episodes
from metaimplicit.training.files import write_atomically
from metaimplicit.training.log import read_metrics
from metaimplicit.training.metrics import Evaluation, to_device

GRID_POINTS = 200
Row = dict[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Fits:
    """Predictions for tasks of one input and one output, before and after adaptation.

    Attributes:
        grid: The inputs, `[points]`.
        before: The predictions after 0 inner steps, `[tasks, points]`.
        after: The predictions after `steps` inner steps, likewise.
        support: Inputs and targets, `[tasks, examples]`.
        query: Likewise.
        steps: The number of inner steps.

    Example:
        >>> from metaimplicit.learner import Episode
        >>> pair = Pair(torch.randn(2, 5, 1), torch.randn(2, 5, 1))  # 2 tasks of 5 examples
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> fits = predict_curves(learner, Episode(pair, pair), steps=3)
        >>> fits.grid.shape, fits.before.shape, fits.support.inputs.shape
        (torch.Size([200]), torch.Size([2, 200]), torch.Size([2, 5]))
    """

    grid: Tensor
    before: Tensor
    after: Tensor
    support: Pair
    query: Pair
    steps: int


def predict_curves(learner: MetaLearner, episodes: EpisodeBatch, steps: int) -> Fits:
    """Adapt to tasks of one input and one output, and predict over the range of their query inputs.

    Args:
        learner: The learner.
        episodes: A batch of tasks with inputs and targets `[tasks, examples, 1]`, on any device.
        steps: The number of inner steps.

    Returns:
        Predictions at 200 inputs, on the CPU.

    Example:
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> from metaimplicit.learner import Episode
        >>> pair = Pair(torch.randn(2, 5, 1), torch.randn(2, 5, 1))
        >>> predict_curves(learner, Episode(pair, pair), steps=3).after.shape
        torch.Size([2, 200])
    """
    device = next(learner.parameters()).device
    (batch,) = read_episodes(to_device(episodes, device))
    support, query = batch
    low = float(query.inputs.min())
    high = float(query.inputs.max())
    dtype = query.inputs.dtype
    grid = torch.linspace(low, high, GRID_POINTS, device=device, dtype=dtype)
    inputs = grid[:, None].expand(len(query.inputs), -1, 1)

    def predict(count: int) -> Tensor:
        adapted = learner.adapt(support, steps=count, batched=True)
        with torch.no_grad():
            outputs: Tensor = adapted(inputs)
        return outputs.squeeze(-1).cpu()

    return Fits(
        grid=grid.cpu(),
        before=predict(0),
        after=predict(steps),
        support=_without_last_axis(support),
        query=_without_last_axis(query),
        steps=steps,
    )


def plot_curves(out: Path) -> None:
    """Plot a run's training and validation against steps and against seconds, as curves.png.

    The metric is the accuracy, or the loss on a logarithmic axis for regression. Training is drawn
    step by step in a faint line, and as a running mean over a fiftieth of the steps.

    Args:
        out: The run's folder, with its metrics.jsonl. Damaged lines are left out.

    Raises:
        FileNotFoundError: The folder holds no metrics.jsonl or no config.json.

    Example:
        >>> import tempfile
        >>> import tasks
        >>> from metaimplicit.training import Budget, fit
        >>> sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder)
        ...     _ = fit(learner, optimizer, sampler, out=out, budget=Budget(steps=3), bar=False)
        ...     plot_curves(out)
        ...     (out / "curves.png").exists()
        True
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    lines = read_metrics(out, complete=False)
    has_accuracy = any(line["accuracy"] is not None for line in lines)
    metric = "accuracy" if has_accuracy else "loss"
    rows = [line for line in lines if line[metric] is not None]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key, label in zip(axes, ("step", "seconds"), ("meta-steps", "seconds"), strict=True):
        _plot_training(ax, [row for row in rows if row["split"] == "train"], key, metric)
        _plot_validation(ax, [row for row in rows if row["split"] == "validation"], key, metric)
        ax.set_xlabel(label)
        ax.grid(which="both", alpha=0.3)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(f"query {metric}")
    if metric == "loss":
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(LogFormatter())  # 2 rather than 2 × 10⁰
        axes[0].yaxis.set_minor_formatter(LogFormatter())
    _legend_below(figure, axes[0])
    _save(figure, out / "curves.png")


def plot_adaptation(
    out: Path, evaluation: Evaluation, *, title: str = "", fits: Fits | None = None
) -> None:
    """Plot the metric against the number of inner steps with its 95 % interval, as adaptation.png.

    Args:
        out: The folder for the plot.
        evaluation: What was measured.
        title: The title of the figure.
        fits: Curves to draw beside it, one panel for each task. If None, there are none.

    Example:
        >>> import tempfile
        >>> losses = torch.tensor([[4.0, 2.0], [1.0, 1.0]])  # after 0 and 5 steps, of two tasks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder)
        ...     plot_adaptation(out, Evaluation(losses, accuracies=None, steps=(0, 5)))
        ...     (out / "adaptation.png").exists()
        True
    """
    from matplotlib.figure import Figure

    panels = 1 if fits is None else 1 + len(fits.before)
    figure = Figure(figsize=(max(3.2 * panels, 5), 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_metric(axes[0], evaluation)
    if title:
        figure.suptitle(title)
    if fits is not None:
        for task, ax in enumerate(axes[1:]):
            _plot_fit(ax, fits, task)
        _legend_below(figure, axes[1])
    _save(figure, out / "adaptation.png")


def _plot_training(ax: Any, rows: list[Row], key: str, metric: str) -> None:
    if not rows:
        return
    x = [row[key] for row in rows]
    y = torch.tensor([row[metric] for row in rows])
    window = max(len(rows) // 50, 1)
    running_mean = y.unfold(0, window, 1).mean(1)
    name = "training" if window == 1 else f"training, mean of {window} steps"
    ax.plot(x, y, color="C0", alpha=0.25, linewidth=0.5)
    ax.plot(x[window - 1 :], running_mean, color="C0", label=name)


def _plot_validation(ax: Any, rows: list[Row], key: str, metric: str) -> None:
    if not rows:
        return
    x = [row[key] for row in rows]
    y = [row[metric] for row in rows]
    ax.plot(x, y, "o-", color="C1", markersize=3, label="validation")


def _plot_metric(ax: Any, evaluation: Evaluation) -> None:
    curve = evaluation.curve()
    mean = torch.tensor([estimate.mean for estimate in curve])
    interval = torch.tensor([estimate.interval for estimate in curve])
    ax.plot(evaluation.steps, mean, "o-", markersize=3)
    ax.fill_between(evaluation.steps, mean - interval, mean + interval, alpha=0.3)
    ax.set(xlabel="inner steps", ylabel=f"query {evaluation.metric}, 95 % interval")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)


def _plot_fit(ax: Any, fits: Fits, task: int) -> None:
    inputs = fits.query.inputs[task]
    order = inputs.argsort()
    truth = fits.query.targets[task][order]
    steps = "1 step" if fits.steps == 1 else f"{fits.steps} steps"
    ax.plot(inputs[order], truth, color="0.6", linewidth=3, label="truth")
    ax.plot(fits.grid, fits.before[task], ":", color="C1", label="before adaptation")
    ax.plot(fits.grid, fits.after[task], color="C0", label=f"after {steps}")
    support = (fits.support.inputs[task], fits.support.targets[task])
    ax.plot(*support, "^", color="k", markersize=5, label="support")
    ax.set_xlabel("input")


def _legend_below(figure: Any, ax: Any) -> None:
    """A legend of one panel's lines, below all panels and outside the data."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))


def _without_last_axis(pair: Pair) -> Pair:
    return Pair(pair.inputs.squeeze(-1).cpu(), pair.targets.squeeze(-1).cpu())


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
