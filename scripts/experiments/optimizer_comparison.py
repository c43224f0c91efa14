"""What experiments on optimisers share: step sizes to try, training on a clock, a table, a plot."""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from figures import shared_legend_below
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.base import Experiment
from experiments.networks import parameter_count
from experiments.runs import (
    METHOD,
    Case,
    Cell,
    Row,
    Run,
    Runs,
    case_value,
    markdown_table,
    mean,
    median,
)
from experiments.timed_training import History, Setting, evaluate, train_on_a_clock


@dataclass(frozen=True)
class OptimizerComparison(Experiment):
    """Optimisers from the same initialisation, each at the best of its step sizes.

    The best step size has the lowest mean training loss at the end. The step sizes of a method are
    the option that is named after it.
    """

    rival: ClassVar[str] = "adam"  # the others are to reach its lowest loss
    metric_name: ClassVar[str]  # of `Setting.test_metric`
    metric_digits: ClassVar[int]

    @abstractmethod
    def setting(self, seed: int) -> Setting:
        """The model and the data of a seed."""

    @abstractmethod
    def optimizer(self, case: Case, setting: Setting) -> torch.optim.Optimizer:
        """The optimiser of a case."""

    @abstractmethod
    def is_finished(self, case: Case, steps: int, seconds: float) -> bool:
        """Whether a run has used up its steps or its seconds."""

    @abstractmethod
    def next_evaluation(self, steps: int) -> int:
        """The number of steps, above `steps`, at which to evaluate the loss next."""

    @abstractmethod
    def batch_description(self) -> str:
        """What a step sees."""

    def step_sizes(self, method: str) -> tuple[float, ...]:
        """The step sizes to try."""
        sizes: tuple[float, ...] = getattr(self, method.replace("-", "_"))
        return sizes

    def check_options(self) -> None:
        """Raise ValueError for a method without step sizes, or one out of range."""
        super().check_options()
        for method in self.methods:
            sizes = self.step_sizes(method)
            if not sizes or not all(0 < size < math.inf for size in sizes):
                raise ValueError(
                    f"--{method}: got {sizes}, expected step sizes that are positive and finite"
                )

    def cases(self) -> list[Case]:
        """Every method for every seed, at every step size."""
        return [
            {"method": case["method"], "lr": lr, "seed": case["seed"]}
            for case in super().cases()
            for lr in self.step_sizes(case["method"])
        ]

    def run(self, case: Case, out: Path) -> Row:
        """Train by the optimiser of a case; the row has its history and the test metric."""
        setting = self.setting(case["seed"])
        row = train_on_a_clock(
            self.optimizer(case, setting),
            setting,
            is_finished=lambda steps, seconds: self.is_finished(case, steps, seconds),
            next_evaluation=self.next_evaluation,
        )
        row["parameters"] = parameter_count(setting.model)
        row["test_metric"] = None
        if row["diverged"] is None:
            metric = evaluate(setting.test_metric, setting.model, setting.test)
            if math.isfinite(metric):
                row["test_metric"] = metric
            else:  # a run on its way to infinity, whose clock ran out in between
                row["diverged"] = f"the {self.metric_name} is {metric} at the end"
        return row

    def table(self, runs: Runs) -> str:
        """A line for each method, at its best step size.

        Losses are compared at the most steps, and at the most seconds, that all runs have.
        """
        best = best_runs(runs)
        ends = [run.row["history"] for run in best if run.row["diverged"] is None]
        steps = min((history["step"][-1] for history in ends), default=0)
        seconds = min((history["seconds"][-1] for history in ends), default=0.0)
        lines = Runs(
            Run(
                case,
                row
                | summarise(
                    row,
                    steps,
                    seconds,
                    goal=self.goal(best, case["seed"]),
                ),
            )
            for case, row in best
        )
        columns = {
            "method": METHOD,
            "step size": case_value("lr", "{:g}"),
            f"training loss, {steps} steps": mean("loss_at_steps", 4),
            f"training loss, {seconds:.3g} s": mean("loss_at_seconds", 4),
            f"steps to {self.rival}'s lowest": median_reached("steps_to_goal", 0),
            f"s to {self.rival}'s lowest": median_reached("seconds_to_goal", 2),
            "ms a step": median("ms", 2),
            f"{self.metric_name}, end": mean("test_metric", self.metric_digits),
        }
        return markdown_table(columns, lines.groups("method"))

    def goal(self, best: Runs, seed: int) -> float:
        """The rival's lowest loss from the initialisation of a seed, or −∞ without such a run."""
        histories = best.where(method=self.rival, seed=seed).values("history")
        return min(histories[0]["loss"]) if histories else -math.inf

    def plot(self, runs: Runs, figure: Figure) -> None:
        """The training loss against steps and against seconds, of every seed."""
        axes = figure.subplots(1, 2, sharey=True)
        for i, (case, group) in enumerate(best_runs(runs).groups("method", "lr")):
            label = f"{case['method']}, {case['lr']:g}"
            for _, row in group:
                for ax, key in zip(axes, ("step", "seconds"), strict=True):
                    # The axis is logarithmic: step 0 has no place on it.
                    points = row["history"][key][1:], row["history"]["loss"][1:]
                    style = {"marker": "o", "markersize": 1.5, "linewidth": 1, "alpha": 0.8}
                    ax.plot(*points, color=f"C{i}", label=label, **style)
        axes[0].set(xlabel=f"steps, {self.batch_description()}", ylabel="training loss")
        axes[1].set(xlabel="CPU seconds without evaluation")
        for ax in axes:
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_minor_formatter(NullFormatter())
        shared_legend_below(figure)


def best_runs(runs: Runs) -> Runs:
    """The runs at the best step size of their method."""

    def final_loss(row: Row) -> float:
        return row["history"]["loss"][-1] if row["diverged"] is None else math.inf

    best = Runs()
    for _, group in runs.groups("method"):
        by_size = [at_size for _, at_size in group.groups("lr")]
        best += min(by_size, key=lambda at: statistics.fmean(final_loss(row) for _, row in at))
    return best


def summarise(row: Row, steps: float, seconds: float, *, goal: float) -> Row:
    """The loss of a run at some steps and at some seconds, its way to a loss, and its pace.

    Args:
        row: What `train_on_a_clock` returned.
        steps: Number of steps at which to state the loss.
        seconds: Seconds at which to state the loss.
        goal: The loss to reach.

    Returns:
        `loss_at_steps` and `loss_at_seconds`, None if the run diverged; `steps_to_goal` and
        `seconds_to_goal`, ∞ if the goal was not reached; milliseconds a step, `ms`.
    """
    history: History = row["history"]
    finished = row["diverged"] is None
    steps_to_goal, seconds_to_goal = first_at_goal(history, goal)
    return {
        "loss_at_steps": last_loss_within(history, "step", steps) if finished else None,
        "loss_at_seconds": last_loss_within(history, "seconds", seconds) if finished else None,
        "steps_to_goal": steps_to_goal,
        "seconds_to_goal": seconds_to_goal,
        "ms": 1000 * history["seconds"][-1] / max(history["step"][-1], 1),
    }


def first_at_goal(history: History, goal: float) -> tuple[float, float]:
    """Steps and seconds when the loss was first evaluated at `goal` or below; else infinities.

    Example:
        >>> first_at_goal({"step": [0, 5], "seconds": [0.0, 0.1], "loss": [2.0, 1.0]}, 1.5)
        (5, 0.1)
    """
    points = zip(history["step"], history["seconds"], history["loss"], strict=True)
    for steps, seconds, loss in points:
        if loss <= goal:
            return steps, seconds
    return math.inf, math.inf


def last_loss_within(history: History, key: str, budget: float) -> float:
    """The last loss evaluated within a budget of "step" or "seconds".

    Example:
        >>> last_loss_within({"step": [0, 5], "loss": [2.0, 1.0]}, "step", 4)
        2.0
    """
    points = zip(history[key], history["loss"], strict=True)
    return [loss for spent, loss in points if spent <= budget][-1]


def median_reached(key: str, digits: int) -> Cell:
    """A cell with the median of row[key], where ∞ means never, and how many values are finite."""

    def cell(runs: Runs) -> str:
        values = runs.values(key)
        finite = sum(map(math.isfinite, values))
        note = f" ({finite} of {len(values)})" if finite < len(values) else ""
        middle = statistics.median(values)
        return (f"{middle:.{digits}f}" if math.isfinite(middle) else "–") + note

    return cell
