"""Plots of a run. Matplotlib is imported when one is drawn, and needs no display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metaimplicit.training.files import write_atomically
from metaimplicit.training.fits import Fits
from metaimplicit.training.log import read_metrics
from metaimplicit.training.metrics import Evaluation
from metaimplicit.training.panels import draw_fit, draw_measure, draw_progress, metric_of


def plot_curves(out: str | Path) -> None:
    """Plot a run's training and validation against steps and against seconds, as curves.png.

    The metric is the accuracy or that of the learner, or else the loss on a logarithmic axis.
    Training is drawn step by step in a faint line, and as a running mean over a fiftieth of the
    steps.

    Args:
        out: The run's folder, with its metrics.jsonl. Damaged lines are left out.

    Raises:
        FileNotFoundError: The folder holds no metrics.jsonl or no config.json.

    Example:
        >>> import tempfile
        >>> import tasks
        >>> import torch
        >>> from metaimplicit import MetaLearner
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

    lines = read_metrics(out, complete=False)
    metric = metric_of(lines)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key, label in zip(axes, ("step", "seconds"), ("meta-steps", "seconds"), strict=True):
        draw_progress(ax, lines, x=key, y=metric)
        ax.set_xlabel(label)
    axes[0].set_ylabel(f"query {metric}")
    _legend_below(figure, axes[0])
    _save(figure, Path(out, "curves.png"))


def plot_adaptation(
    out: str | Path, evaluation: Evaluation, *, title: str = "", fits: Fits | None = None
) -> None:
    """Plot the metric against the number of inner steps with its 95 % interval, as adaptation.png.

    Args:
        out: The folder for the plot.
        evaluation: What was measured.
        title: The title of the figure.
        fits: Curves to draw beside it, one panel for each task. If None, there are none.

    Example:
        >>> import tempfile
        >>> import torch
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
    draw_measure(axes[0], evaluation)
    if title:
        figure.suptitle(title)
    if fits is not None:
        for task, ax in enumerate(axes[1:]):
            draw_fit(ax, fits, task)
        _legend_below(figure, axes[1])
    _save(figure, Path(out, "adaptation.png"))


def _legend_below(figure: Any, ax: Any) -> None:
    """A legend of one panel's lines, below all panels and outside the data."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=len(handles),
        )


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
