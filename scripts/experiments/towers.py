"""What experiments on towers share: methods from several starts, a loop that notes the hyperparameters, table, plot."""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.base import Case, Experiment, Row, markdown, spread
from metaimplicit.tuning.hyperoptimizers import SGD, Adam, Hyperoptimizer, Level

EVERY = 10  # steps that are one point of the curve
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Towers(Experiment):
    """Fixed hyperparameters, a hand-made step decay, and towers, from the same starts."""

    epochs: int = 10
    """Passes through the training set."""
    outer_sgd: float = 0.01
    """Step size of the SGD above, of `tower`."""
    outer_adam: float = 0.01
    """Step size of the Adam above, of `tower-adam`."""

    baselines: ClassVar[tuple[str, ...]] = ("plain", "step-decay", "tower", "tower-adam")
    compared: ClassVar[tuple[str, ...]] = baselines
    shown: ClassVar[dict[str, tuple[str, int]]]  # of a row: what the table calls it, its digits

    @property
    @abstractmethod
    def starts(self) -> list[Case]:
        """The hyperparameters to start from, by name, lr among them."""

    def cases(self) -> list[Case]:
        if unknown := [m for m in self.methods if m not in self.compared]:
            raise ValueError(
                f"--method: got {', '.join(unknown)}, expected some of {', '.join(self.compared)}"
            )
        if self.epochs < 1:
            raise ValueError(f"--epochs: got {self.epochs}, expected at least 1")
        if not self.starts:
            raise ValueError("--start: got none, expected at least one")
        for name, value in (
            (name, value) for start in self.starts for name, value in start.items()
        ):
            if not 0 < value < (math.inf if name == "lr" else 1):
                raise ValueError(
                    f"--start: got {name} {value}, expected a positive number, below 1 but for lr"
                )
        for method in self.methods:
            self.above(method)  # refuses step sizes out of range
        plain = super().cases()
        return [case | start for start in self.starts for case in plain]

    def above(self, method: str) -> Level | None:
        """The level that moves the optimiser's hyperparameters, if any does."""
        match method:
            case "tower":
                return SGD(self.outer_sgd)
            case "tower-adam":
                return Adam(self.outer_adam)
        return None

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for start in self.starts:
            for method in self.methods:
                at = start | {"method": method}
                if not (found := [row for case, row in rows if at.items() <= case.items()]):
                    continue
                reached = [row["learnt"]["lr"] for row in found if row["diverged"] is None]
                lines.append([
                    *(f"{value:g}" for value in start.values()),
                    f"`{method}`",
                    *(_cell(found, key, digits) for key, (_, digits) in self.shown.items()),
                    f"{statistics.median(reached):.2g}" if reached else "–",
                    f"{statistics.median(row['ms'] for row in found):.0f}",
                ])  # fmt: skip
        names = [name for name, _ in self.shown.values()]
        return markdown([*self.starts[0], "method", *names, "lr reached", "ms a step"], lines)

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        figure.set_size_inches(3.4 * len(self.starts), 5.5)
        axes = figure.subplots(2, len(self.starts), sharex=True, sharey="row", squeeze=False)
        for column, start in zip(axes.T, self.starts, strict=True):
            for i, method in enumerate(self.methods):
                found = [
                    row
                    for case, row in rows
                    if (start | {"method": method}).items() <= case.items()
                ]
                for row in found:
                    label = method if row is found[0] else None
                    for ax, name in zip(column, ("lr", "loss"), strict=True):
                        ax.plot(
                            row["curve"]["step"],
                            row["curve"][name],
                            color=f"C{i}",
                            label=label,
                            lw=1,
                            alpha=0.7,
                        )
            column[0].set(
                title=", ".join(f"{name} {value:g}" for name, value in start.items()), yscale="log"
            )
            column[1].set(xlabel="training steps", yscale="log")
        axes[0, 0].set_ylabel("lr")
        axes[1, 0].set_ylabel("training loss")
        axes[0, 0].legend(fontsize=8)


def step_decay(step: int, steps: int) -> float:
    """He et al.'s factor on lr: 0.1 from half of the run on, 0.01 from three quarters on."""
    return 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    steps: int,
    last: int,
    schedule: Schedule | None = None,
) -> Row:
    """Step along the gradients of loss(0), loss(1), …; end where a loss or a hyperparameter is not finite.

    Args:
        loss: of a step, from 0 on; 0-dim.
        last: steps whose mean loss is the row's `loss`.
        schedule: gives a factor on lr for each step.

    Returns:
        `diverged`, the step that failed, from 0 on, or None, and `reason`; `loss`, None if diverged; `curve`, by name
        the mean losses of `EVERY` steps each, and the hyperparameters after them, of many the mean; `learnt`, the last
        of these; and `levels`, a tower's by level, from the parameters' up; `ms` a step.
    """
    group = optimizer.param_groups[0]
    start, names = (
        group["lr"],
        [name for name in ("lr", "momentum", "beta1", "beta2") if name in group],
    )
    losses = torch.zeros(steps, device=group["params"][0].device)
    curve: dict[str, list[float]] = {name: [] for name in ("step", "loss", *names)}
    learnt = {name: _mean(group[name]) for name in names}
    diverged, reason, done, began = None, "", 0, time.perf_counter()
    for step in range(steps):
        if schedule is not None:
            group["lr"] = start * schedule(step)
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        losses[step] = value.detach()
        try:
            optimizer.step()
        except FloatingPointError as error:
            diverged, reason = step, str(error)
            break
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            values = {name: _mean(group[name]) for name in names}
            if not (finite := losses[done : step + 1].isfinite()).all():
                diverged, reason = done + int((~finite).nonzero()[0]), "the loss is not finite"
                break
            if not all(map(math.isfinite, values.values())):
                diverged, reason = step, f"hyperparameters turned {values}"
                break
            learnt = values
            point = {"step": step + 1, "loss": losses[done : step + 1].mean().item()} | values
            for name, number in point.items():
                curve[name].append(number)
            done = step + 1
    made = steps if diverged is None else diverged + 1
    row: Row = {"diverged": diverged, "reason": reason, "curve": curve, "learnt": learnt}
    row |= {"ms": 1000 * (time.perf_counter() - began) / made}
    if diverged is None and isinstance(optimizer, Hyperoptimizer):
        levels = optimizer.hyperparameters[0]
        row["levels"] = [
            {name: value.tolist() for name, value in level.items()} for level in levels
        ]
    return row | {"loss": losses[-last:].mean().item() if diverged is None else None}


def _mean(number: float | Tensor) -> float:
    return number.mean().item() if isinstance(number, Tensor) else number


def _cell(rows: Sequence[Row], key: str, digits: int) -> str:
    """mean ± standard deviation of the runs that did not diverge, and how many did."""
    values = [row[key] for row in rows if row["diverged"] is None]
    if not values:
        return "diverged"
    failed = len(rows) - len(values)
    return spread(values, digits) + (f" ({failed} of {len(rows)} diverged)" if failed else "")
