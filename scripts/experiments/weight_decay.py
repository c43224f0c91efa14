"""A decay for every weight of a logistic regression: direction and length of hypergradients."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import problems
import torch
import torch.nn.functional as F
from command_line.ranges import Count, Number, Numbers, Products, Seeds, Steps
from figures import legend_below
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.runs import (
    METHOD,
    Case,
    Cell,
    Row,
    Runs,
    case_value,
    markdown_table,
    mean,
    spread,
)
from experiments.tuning import TuningExperiment
from metaimplicit import hypergradient
from metaimplicit.params import Params
from metaimplicit.solvers import SolverState
from metaimplicit.tuning import Box, TuningProblem

PAPER_STEP = 1.0  # the outer step in the code of Hataya & Yamada (2023)


@dataclass(frozen=True)
class WeightDecay(TuningExperiment):
    """Losses and accuracy of a logistic regression whose 100 decays are tuned on validation data.

    The set-up is that of the code of Hataya & Yamada (2023): 500 training and 500 validation
    points, 100 inner steps of 0.1 from zero, solves that start from zero, outer steps of SGD with
    momentum 0.9, decays that start at 1 and are at least 1e-8. The hypergradients of every method
    are compared with the exact one, that of `dense`, at the same decays. The baseline `none` leaves
    the decays as they are. Seed s is data set s + 1 of compare.py.
    """

    seeds: Seeds = 5
    """Number of data sets."""
    outer_lrs: Numbers = (0.1, 0.3, 1.0, 3.0)
    """Outer step sizes to compare. A method's best one has the lowest mean validation loss."""
    outer_steps: Steps = 10
    """Number of outer steps. The paper's code, with 1000 inner steps in all, takes 9."""
    solver_steps: Products = 5
    """Number of products of CG and of Nyström-CG, and of terms of Neumann's series."""
    rank: Products = 5
    """Number of columns of Nyström's sketch."""
    rho: Number = 0.1
    """Damping ρ of Nyström."""
    scale: Number = 0.1
    """Step of Neumann's series. The paper's code has one option for it and ρ."""
    test: Count = 10_000
    """Number of test points. No choice depends on them."""

    name = "weight-decay"
    baselines = ("none",)
    default_methods = (
        *baselines,
        "dense",
        "unrolled",
        "cg",
        "neumann",
        "nystrom",
        "nystrom-cg",
        "t1-t2",
    )
    case_options = ("outer_lrs",)
    quick_options: ClassVar[dict[str, Any]] = {
        "outer_lrs": (1.0, 3.0),
        "outer_steps": 2,
        "test": 100,
    }

    def check_options(self) -> None:
        """Raise ValueError for sizes or step sizes out of range."""
        super().check_options()
        if not self.outer_lrs or not min(self.outer_lrs) > 0:
            raise ValueError(f"--outer-lrs: got {self.outer_lrs}, expected some numbers > 0")

    def cases(self) -> list[Case]:
        """Every method for every seed and outer step. The baseline has the outer step 0."""
        return [
            case | {"outer_lr": lr}
            for case in super().cases()
            for lr in ([0.0] if case["method"] == "none" else self.outer_lrs)
        ]

    def method_options(self, flag: str) -> dict[str, Any]:
        """The options of the solvers."""
        return {
            "solver_steps": self.solver_steps,
            "rank": self.rank,
            "rho": self.rho,
            "scale": self.scale if flag == "neumann" else None,
        }

    def run(self, case: Case, out: Path) -> Row:
        """Tune the decays of one data set.

        The row has, for each outer step, the validation loss before it and how its hypergradient
        compares with the exact one; then the losses and the accuracy at the end. The `loss` of a
        run that diverged is None.
        """
        data_set = problems.logistic(case["seed"] + 1, self.test)
        row: Row = {"losses": [], "cosines": [], "ratios": []}
        try:
            meta = data_set.meta
            if case["method"] != "none":
                meta = self.tune(data_set, case, row)
            end = hypergradient(
                data_set.problem,
                meta,
                data_set.data,
                inner=data_set.inner,
                method="dense",
            )
        except FloatingPointError:
            return row | {"loss": None}
        loss = end.outer_loss.item()
        if not math.isfinite(loss):
            return row | {"loss": None}

        inputs, labels = data_set.data
        logits = inputs[1000:] @ end.params["w"]  # of the test points
        labels = labels[1000:]
        row["losses"].append(loss)
        return row | {
            "loss": loss,
            "test_loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
            "test_accuracy": ((logits > 0) == (labels > 0)).double().mean().item(),
        }

    def tune(self, data_set: problems.Instance, case: Case, row: Row) -> Params:
        """Take the outer steps, and note in the row how each hypergradient compares with the exact.

        Raises:
            FloatingPointError: A hypergradient is not finite.
        """
        tuner = self.make_tuner(
            TuningProblem(data_set.problem, data_set.meta, {"decay": Box(1e-8)}),
            case["method"],
            inner=data_set.inner,
            optimizer=partial(torch.optim.SGD, lr=case["outer_lr"], momentum=0.9),
            warm_start=False,
        )
        (decay,) = tuner.optimizer.param_groups[0]["params"]
        for _ in range(self.outer_steps):
            before = {name: value.clone() for name, value in tuner.meta.items()}
            tuner.state = SolverState()  # the solve starts from zero
            with warnings.catch_warnings():
                # of large residuals: the cosines and ratios show what they cause
                warnings.simplefilter("ignore", RuntimeWarning)
                step = tuner.step(data_set.data, data_set.data)
                exact = hypergradient(
                    data_set.problem,
                    before,
                    data_set.data,
                    inner=problems.STAY_AT_START,
                    method="dense",
                    start=tuner.end,
                )
            cosine, ratio = cosine_and_ratio(exact.grads["decay"], decay.grad)
            if not math.isfinite(cosine + ratio):
                raise FloatingPointError(
                    f"{case}: got a cosine of {cosine} and a norm ratio of {ratio}, "
                    "expected finite numbers; lower --outer-lrs"
                )
            row["losses"].append(step.outer_loss)
            row["cosines"].append(cosine)
            row["ratios"].append(ratio)
        return tuner.meta

    def table(self, runs: Runs) -> str:
        """One table at the paper's outer step, if it ran, one at the best step of each method."""
        columns = {
            "method": METHOD,
            "outer step": outer_step,
            "validation loss": mean("loss", 3),
            "test loss": mean("test_loss", 3),
            "test accuracy, %": mean("test_accuracy", scale=100),
            "cosine": mean_over_steps("cosines", 4),
            "norm ratio": mean_over_steps("ratios", 3),
        }
        tried = ", ".join(f"{lr:g}" for lr in self.outer_lrs)
        at_best = markdown_table(columns, runs_at_best_step(runs).groups("method"))
        text = f"At each method's best outer step of {tried}, by mean validation loss:\n\n{at_best}"
        if PAPER_STEP not in self.outer_lrs:
            return text
        at_paper = markdown_table(columns, runs_at_paper_step(runs).groups("method"))
        return (
            f"At the outer step of Hataya & Yamada's code, {PAPER_STEP:g}:\n\n{at_paper}\n\n{text}"
        )

    def plot(self, runs: Runs, figure: Figure) -> None:
        """Validation loss against outer steps, at the paper's outer step and at the best ones."""
        figure.set_size_inches(8, 5)
        tuned = Runs(run for run in runs if run.case["method"] != "none")
        panels = {"best outer step of each method": runs_at_best_step(tuned)}
        if PAPER_STEP in self.outer_lrs:
            panels = {f"outer step {PAPER_STEP:g}": runs_at_paper_step(tuned), **panels}
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (title, shown) in zip(axes, panels.items(), strict=True):
            plot_losses(ax, shown)
            ax.set(title=title)
        axes[0].set(ylabel="validation loss")


def cosine_and_ratio(exact: Tensor, other: Tensor) -> tuple[float, float]:
    """The cosine of the angle between two vectors `[n]`, and ‖other‖/‖exact‖.

    Example:
        >>> cosine_and_ratio(torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0]))
        (1.0, 2.0)
    """
    a = exact / exact.norm()
    b = other / exact.norm()
    return float(a @ b / b.norm()), float(b.norm())


def runs_at_paper_step(runs: Runs) -> Runs:
    """The runs at the outer step of the paper's code, and those of the baseline."""
    return Runs(run for run in runs if run.case["outer_lr"] in (0.0, PAPER_STEP))


def runs_at_best_step(runs: Runs) -> Runs:
    """The runs at the best outer step of their method."""
    best = {case["method"]: best_step(group) for case, group in runs.groups("method")}
    return Runs(run for run in runs if run.case["outer_lr"] == best[run.case["method"]])


def best_step(runs: Runs) -> float:
    """The outer step with the lowest mean validation loss.

    Steps at which a run diverged come last. The test points have no influence.
    """
    mean_losses: dict[float, float] = {}
    for case, group in runs.groups("outer_lr"):
        losses = group.values("loss")
        mean_losses[case["outer_lr"]] = math.inf if None in losses else statistics.fmean(losses)
    return min(sorted(mean_losses), key=lambda lr: mean_losses[lr])


def outer_step(runs: Runs) -> str:
    """A cell with the outer step, or a dash for the baseline."""
    return case_value("outer_lr", "{:g}")(runs) if runs[0].case["outer_lr"] else "–"


def mean_over_steps(key: str, digits: int) -> Cell:
    """A cell with the mean over outer steps of row[key], for the runs that did not diverge."""

    def cell(runs: Runs) -> str:
        finished = [run.row for run in runs if run.row["loss"] is not None]
        return spread([statistics.fmean(row[key]) for row in finished if row[key]], digits)

    return cell


def plot_losses(ax: Axes, runs: Runs) -> None:
    """Mean validation losses of the methods none of whose runs diverged."""
    for case, group in runs.groups("method", "outer_lr"):
        if None in group.values("loss"):
            continue
        losses = zip(*group.values("losses"), strict=True)
        label = f"{case['method']}, {case['outer_lr']:g}"
        ax.plot(
            [statistics.fmean(seeds) for seeds in losses],
            marker="o",
            markersize=3,
            label=label,
        )
    ax.set(xlabel="outer steps")
    legend_below(ax)
