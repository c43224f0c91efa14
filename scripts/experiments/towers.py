"""What experiments on towers share: methods from several starts, training, a table, a plot."""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from command_line.ranges import Number, Steps
from figures import shared_legend_below
from matplotlib.figure import Figure
from torch import Tensor

from experiments.base import Experiment
from experiments.runs import METHOD, Case, Cell, Row, Runs, case_value, markdown_table, median
from metaimplicit.tuning.hyperoptimizers import SGD, Adam, Hyperoptimizer, Level

STEPS_PER_POINT = 10  # of a curve
HYPERPARAMETERS = ("lr", "momentum", "beta1", "beta2")  # those that a curve shows
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Towers(Experiment):
    """Fixed hyperparameters, a step decay and towers, all from the same starts."""

    epochs: Steps = 10
    """Number of passes through the training set."""
    outer_sgd: Number = 0.01
    """Step size of the SGD that moves the hyperparameters of `tower`."""
    outer_adam: Number = 0.01
    """Step size of the Adam that moves the hyperparameters of `tower-adam`."""

    default_methods = ("plain", "step-decay", "tower", "tower-adam")
    # the columns of the table between the method and the step size reached
    result_columns: ClassVar[dict[str, Cell]]

    @property
    @abstractmethod
    def starts(self) -> list[Case]:
        """The hyperparameters to start from, by name. `lr` is one of them."""

    def check_options(self) -> None:
        """Raise ValueError for starts and step sizes that are out of range."""
        super().check_options()
        if not self.starts:
            raise ValueError("--start: got none, expected at least one")
        for start in self.starts:
            for name, value in start.items():
                if not 0 < value < (math.inf if name == "lr" else 1):
                    raise ValueError(
                        f"--start: got {name} {value}, expected a positive number, "
                        "which for other hyperparameters than lr is below 1"
                    )
        for method in self.methods:
            self.outer_level(method)  # raises for a step size out of range

    def cases(self) -> list[Case]:
        """Every method for every seed, from one start after the other."""
        cases = super().cases()
        return [case | start for start in self.starts for case in cases]

    def outer_level(self, method: str) -> Level | None:
        """The level that moves the optimiser's hyperparameters, or None if they are fixed."""
        match method:
            case "tower":
                return SGD(self.outer_sgd)
            case "tower-adam":
                return Adam(self.outer_adam)
        return None

    def table(self, runs: Runs) -> str:
        """A line for each start and method."""
        names = list(self.starts[0])
        columns = {
            **{name: case_value(name, "{:g}") for name in names},
            "method": METHOD,
            **self.result_columns,
            "lr reached": lr_reached,
            "ms a step": median("ms"),
        }
        return markdown_table(columns, runs.groups(*names, "method"))

    def plot(self, runs: Runs, figure: Figure) -> None:
        """Step size and training loss against training steps: a column of panels for each start."""
        figure.set_size_inches(max(3.4 * len(self.starts), 5), 5.5)
        axes = figure.subplots(
            2,
            len(self.starts),
            sharex=True,
            sharey="row",
            squeeze=False,
        )
        for (top, bottom), start in zip(axes.T, self.starts, strict=True):
            for i, (case, group) in enumerate(runs.where(**start).groups("method")):
                style = {"color": f"C{i}", "label": case["method"], "linewidth": 1, "alpha": 0.7}
                for _, row in group:
                    top.plot(row["curve"]["step"], row["curve"]["lr"], **style)
                    bottom.plot(row["curve"]["step"], row["curve"]["loss"], **style)
            values = ", ".join(f"{name} {value:g}" for name, value in start.items())
            top.set(title=f"from {values}", yscale="log")
            bottom.set(xlabel="training steps", yscale="log")
        axes[0, 0].set_ylabel("lr")
        axes[1, 0].set_ylabel("training loss")
        shared_legend_below(figure)


def lr_reached(runs: Runs) -> str:
    """A cell with the median of the last step sizes of the runs that did not diverge."""
    reached = [row["learnt"]["lr"] for _, row in runs if row["diverged"] is None]
    return f"{statistics.median(reached):.2g}" if reached else "–"


def step_decay(step: int, steps: int) -> float:
    """The factor on lr of He et al. (2016): 0.1 from half of the run on, 0.01 from three quarters.

    Example:
        >>> [step_decay(step, 8) == 1.0 for step in range(8)].count(True)
        4
    """
    return 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))


def train_with_curve(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    last: int,
    schedule: Schedule | None = None,
) -> Row:
    """Train, and note how the loss and the hyperparameters went.

    Training ends early at a loss or a hyperparameter that is not finite.

    Args:
        optimizer: An optimiser with one group of parameters.
        loss: The training loss of a step, from 0 on; 0-dim.
        steps: Number of steps.
        last: Number of steps at the end whose mean loss is the `loss` of the row.
        schedule: The factor on lr at a step. If None, lr is as the optimiser has it.

    Returns:
        A row with

        - `diverged`: the number of the step that failed, from 0 on, or None; `reason` says why.
        - `loss`: the mean of the last training losses, or None if the run diverged.
        - `curve`: for every ten steps their last `step`, the mean `loss`, and the hyperparameters
          after them by name. Hyperparameters with many values are represented by their mean.
        - `learnt`: the hyperparameters of the last point.
        - `levels`: all values that a tower learnt, by level, from the lowest level up.
        - `ms`: milliseconds a step.
    """
    group = optimizer.param_groups[0]
    start_lr = group["lr"]
    names = [name for name in HYPERPARAMETERS if name in group]
    losses = torch.zeros(steps, device=group["params"][0].device)
    curve: dict[str, list[float]] = {name: [] for name in ("step", "loss", *names)}
    row: Row = {"diverged": None, "reason": "", "curve": curve, "learnt": values_of(group, names)}
    noted = 0  # steps that the curve has
    taken = 0
    began = time.perf_counter()
    for step in range(steps):
        taken = step + 1
        if schedule is not None:
            group["lr"] = start_lr * schedule(step)
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        losses[step] = value.detach()
        try:
            optimizer.step()
        except FloatingPointError as error:
            row |= {"diverged": step, "reason": str(error)}
            break

        # Reading the losses waits for the device, so it happens once for every point.
        if taken % STEPS_PER_POINT == 0 or taken == steps:
            values = values_of(group, names)
            row |= find_divergence(losses[noted:taken], noted, values)
            if row["diverged"] is not None:
                break
            row["learnt"] = values
            point = {"step": taken, "loss": losses[noted:taken].mean().item(), **values}
            for name, number in point.items():
                curve[name].append(number)
            noted = taken
    row["ms"] = 1000 * (time.perf_counter() - began) / taken
    finished = row["diverged"] is None
    if finished and isinstance(optimizer, Hyperoptimizer):
        row["levels"] = [
            {name: value.tolist() for name, value in level.items()}
            for level in optimizer.hyperparameters[0]
        ]
    return row | {"loss": losses[-last:].mean().item() if finished else None}


def find_divergence(losses: Tensor, first: int, values: dict[str, float]) -> Row:
    """`diverged` and `reason` if a loss or a hyperparameter is not finite, else nothing.

    Args:
        losses: The losses of consecutive steps, `[n]`.
        first: Number of the first of these steps.
        values: The hyperparameters after the last of them.
    """
    finite = losses.isfinite()
    if not finite.all():
        step = first + int((~finite).nonzero()[0])
        return {"diverged": step, "reason": "the loss is not finite"}
    if not all(map(math.isfinite, values.values())):
        step = first + len(losses) - 1
        return {"diverged": step, "reason": f"the hyperparameters are {values}"}
    return {}


def values_of(group: dict[str, Any], names: list[str]) -> dict[str, float]:
    """The hyperparameters of a group by name; the mean of one with many values."""
    return {
        name: group[name].mean().item() if isinstance(group[name], Tensor) else group[name]
        for name in names
    }
