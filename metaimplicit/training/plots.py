"""Pictures of a run. Matplotlib is imported when one is drawn, without a display."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaimplicit.learner import EpisodeBatch, MetaLearner
from metaimplicit.training.files import write_atomically
from metaimplicit.training.log import read_metrics
from metaimplicit.training.metrics import Evaluation, to_device


@dataclass(frozen=True)
class Fits:
    """One-dimensional regression before and after adaptation, `tasks` tasks over a grid of `points` inputs.

    Attributes:
        grid: `[points]`.
        before, after: predictions, `[tasks, points]`, after 0 and `steps` inner steps.
        support, query: (inputs, targets), each `[tasks, examples]`.
        steps: inner steps.
    """

    grid: Tensor
    before: Tensor
    after: Tensor
    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    steps: int


def predict_curves(learner: MetaLearner, episodes: EpisodeBatch, steps: int) -> Fits:
    """Adapt to tasks of one input and one output, and predict over the range of their query inputs."""
    episodes = to_device(episodes, next(learner.parameters()).device)
    low, high = episodes.query[0].min(), episodes.query[0].max()
    grid = torch.linspace(float(low), float(high), 200, device=low.device, dtype=low.dtype)
    inputs = grid[:, None].expand(len(episodes.support[0]), -1, 1)
    with torch.no_grad():
        before, after = (
            learner.adapt(episodes.support, steps=count, batched=True)(inputs).squeeze(-1).cpu()
            for count in (0, steps)
        )
    support, query = (
        (x.squeeze(-1).cpu(), y.squeeze(-1).cpu()) for x, y in (episodes.support, episodes.query)
    )
    return Fits(grid.cpu(), before, after, support, query, steps)


def plot_curves(out: Path) -> None:
    """curves.png: training and validation against meta-steps and against seconds, from metrics.jsonl."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    metric = "accuracy" if any(line["accuracy"] is not None for line in lines) else "loss"
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, key, label in zip(axes, ("step", "seconds"), ("meta-steps", "seconds"), strict=True):
        for split, colour in (("train", "C0"), ("validation", "C1")):
            rows = [line for line in lines if line["split"] == split and line[metric] is not None]
            if not rows:
                continue
            x, y = [row[key] for row in rows], torch.tensor([row[metric] for row in rows])
            if split == "validation":
                ax.plot(x, y, "o-", color=colour, markersize=3, label=split)
            else:
                window = max(len(rows) // 50, 1)
                ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.5)
                ax.plot(
                    x[window - 1 :],
                    y.unfold(0, window, 1).mean(1),
                    color=colour,
                    label=f"{split}, mean of {window}",
                )
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    if metric == "loss":
        axes[0].set_yscale("log")
    axes[0].set_ylabel(f"query {metric}")
    axes[0].legend()
    _save(figure, out / "curves.png")


def plot_adaptation(
    out: Path, evaluation: Evaluation, *, title: str = "", fits: Fits | None = None
) -> None:
    """adaptation.png: the metric against inner steps with its 95 % interval, and any fitted curves beside it."""
    from matplotlib.figure import Figure

    curve = evaluation.curve()
    panels = 1 if fits is None else 1 + len(fits.before)
    figure = Figure(figsize=(max(3.2 * panels, 5), 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    steps, mean = evaluation.steps, torch.tensor([e.mean for e in curve])
    interval = torch.tensor([e.interval for e in curve])
    axes[0].plot(steps, mean, "o-", markersize=3)
    axes[0].fill_between(steps, mean - interval, mean + interval, alpha=0.3)
    axes[0].set(xlabel="inner steps", ylabel=f"query {evaluation.metric}", title=title)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].grid(alpha=0.3)
    if fits is not None:
        for task, ax in enumerate(axes[1:]):
            _plot_fit(ax, fits, task)
        axes[1].legend(fontsize="small")
    _save(figure, out / "adaptation.png")


def _plot_fit(ax: Any, fits: Fits, task: int) -> None:
    order = fits.query[0][task].argsort()
    ax.plot(
        fits.query[0][task][order],
        fits.query[1][task][order],
        color="0.6",
        linewidth=3,
        label="truth",
    )
    ax.plot(fits.grid, fits.before[task], ":", color="C1", label="before")
    ax.plot(
        fits.grid,
        fits.after[task],
        color="C0",
        label=f"after {fits.steps} step{'s' * (fits.steps != 1)}",
    )
    ax.plot(
        fits.support[0][task], fits.support[1][task], "^", color="k", markersize=5, label="support"
    )
    ax.set_xlabel("x")


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
