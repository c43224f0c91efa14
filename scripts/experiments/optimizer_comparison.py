"""What experiments on optimisers share: runs timed without their evaluations, a grid of step sizes, table and plot."""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

from experiments.base import Case, Experiment, Row, markdown, spread
from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient

Pair = tuple[Tensor, Tensor]  # inputs, targets
History = dict[
    str, list[float]
]  # "step", "seconds", "loss": after a step, the loss of all the training examples


@dataclass(frozen=True)
class Setting:
    """What is minimised, and from where."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean over examples
    judge: Callable[[Tensor, Tensor], Tensor]  # of the test examples
    batch: Callable[[int], Pair]  # of a step, from 0 on
    train: Pair
    test: Pair


@dataclass(frozen=True)
class Race(Experiment):
    """Optimisers from the same initialisation, each at the best of its step sizes: lowest mean final training loss."""

    rival: ClassVar[str] = "adam"  # whose lowest loss the others are to reach
    judged: ClassVar[tuple[str, int]]  # what `Setting.judge` finds, and its digits
    batched: ClassVar[str]  # what a step sees, for the plot

    @abstractmethod
    def setting(self, seed: int) -> Setting: ...

    @abstractmethod
    def optimizer(self, case: Case, setting: Setting) -> torch.optim.Optimizer: ...

    @abstractmethod
    def ended(self, case: Case, steps: int, seconds: float) -> bool:
        """Whether the budget is spent."""

    @abstractmethod
    def mark(self, steps: int) -> int:
        """When to evaluate next, > steps."""

    def rates(self, method: str) -> tuple[float, ...]:
        """The step sizes to try: the option named after the method."""
        found: tuple[float, ...] = getattr(self, method.replace("-", "_"))
        return found

    def cases(self) -> list[Case]:
        if unknown := [m for m in self.methods if m not in self.compared]:
            raise ValueError(
                f"--method: got {', '.join(unknown)}, expected some of {', '.join(self.compared)}"
            )
        for method in self.methods:
            rates = self.rates(method)
            if not rates or not all(0 < rate < math.inf for rate in rates):
                raise ValueError(
                    f"--{method}: got {rates}, expected step sizes, each positive and finite"
                )
        return [
            {"method": case["method"], "lr": lr, "seed": case["seed"]}
            for case in super().cases()
            for lr in self.rates(case["method"])
        ]

    def run(self, case: Case, out: Path) -> Row:
        setting = self.setting(case["seed"])
        row = descend(self.optimizer(case, setting), setting, partial(self.ended, case), self.mark)
        found = setting.judge(_outputs(setting.model, setting.test[0]), setting.test[1]).item()
        parameters = sum(p.numel() for p in setting.model.parameters())
        return row | {"judged": None if row["diverged"] else found, "parameters": parameters}

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        runs = self.best(rows)
        every = [row for _, found in runs.values() for row in found.values() if not row["diverged"]]
        steps = min((row["history"]["step"][-1] for row in every), default=0)
        seconds = min((row["history"]["seconds"][-1] for row in every), default=0.0)
        lines = []
        for method, (lr, found) in runs.items():
            whole = [row for row in found.values() if not row["diverged"]]
            first = [reach(row["history"], self.goal(runs, seed)) for seed, row in found.items()]
            lost = (
                f" ({len(found) - len(whole)} of {len(found)} diverged)"
                if len(whole) < len(found)
                else ""
            )
            lines.append([
                f"`{method}`",
                f"{lr:g}{lost}",
                spread([before(row["history"], "step", steps) for row in whole], 4),
                spread([before(row["history"], "seconds", seconds) for row in whole], 4),
                *(_middle([point[i] for point in first], digits) for i, digits in ((0, 0), (1, 2))),
                f"{statistics.median(_pace(row) for row in found.values()):.2f}",
                spread([row["judged"] for row in whole], self.judged[1]),
            ])  # fmt: skip
        header = [
            "method", "step size", f"training loss, {steps} steps", f"training loss, {seconds:.3g} s",
            f"steps to {self.rival}'s lowest", f"s to {self.rival}'s lowest", "ms a step", f"{self.judged[0]}, end",
        ]  # fmt: skip
        return markdown(header, lines)

    def best(self, rows: Sequence[tuple[Case, Row]]) -> dict[str, tuple[float, dict[int, Row]]]:
        """Of each method the best step size, and its rows by seed."""
        runs: dict[str, tuple[float, dict[int, Row]]] = {}
        for method in self.methods:
            tried: dict[float, dict[int, Row]] = {}
            for case, row in rows:
                if case["method"] == method:
                    tried.setdefault(case["lr"], {})[case["seed"]] = row
            if tried:
                lr = min(
                    tried,
                    key=lambda lr: statistics.fmean(_final(row) for row in tried[lr].values()),
                )
                runs[method] = lr, tried[lr]
        return runs

    def goal(self, runs: dict[str, tuple[float, dict[int, Row]]], seed: int) -> float:
        """The rival's lowest loss from the same initialisation; −∞ without one."""
        row = runs[self.rival][1].get(seed) if self.rival in runs else None
        return min(row["history"]["loss"]) if row else -math.inf

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for i, (method, (lr, found)) in enumerate(self.best(rows).items()):
            for seed, row in found.items():
                label = f"{method}, {lr:g}" if seed == min(found) else None
                for ax, key in zip(axes, ("step", "seconds"), strict=True):
                    points = [
                        (x, y)
                        for x, y in zip(row["history"][key], row["history"]["loss"], strict=True)
                        if x > 0
                    ]
                    ax.plot(*zip(*points, strict=True), color=f"C{i}", label=label, lw=1, alpha=0.8)
        for ax, title in zip(
            axes, (f"steps, {self.batched}", "CPU seconds, evaluation left out"), strict=True
        ):
            ax.set(xscale="log", yscale="log", xlabel=title)
            ax.xaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel("training loss")
        axes[0].legend(fontsize=7)


def descend(
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    ended: Callable[[int, float], bool],
    mark: Callable[[int], int],
) -> Row:
    """Train until the budget is spent, or the loss is not finite.

    The clock, seconds of the process on the CPU (of the wall on CUDA, whose queue is waited for), runs only in steps,
    the reading of batches included. On one thread they are the seconds of an idle machine, whatever else it runs.

    Returns:
        `history`, from step 0 on; `diverged`, why, or None.
    """
    device = setting.train[0].device
    history: History = {"step": [], "seconds": [], "loss": []}
    steps, seconds, due, diverged = 0, 0.0, 0, None
    while True:
        over = ended(steps, seconds)
        if over or steps == due:
            with torch.no_grad():
                value = setting.loss(
                    _outputs(setting.model, setting.train[0]), setting.train[1]
                ).item()
            if not math.isfinite(value):
                diverged = f"the loss is {value} after {steps} steps"
                break
            for key, number in {"step": steps, "seconds": seconds, "loss": value}.items():
                history[key].append(number)
            if over:
                break
            due = mark(steps)
        began = _now(device)
        try:
            _step(optimizer, setting, steps)
        except FloatingPointError as error:
            diverged = str(error)
            break
        seconds += _now(device) - began
        steps += 1
    return {"history": history, "diverged": diverged}


def reach(history: History, goal: float) -> tuple[float, float]:
    """Steps and seconds after which the loss was first found at `goal` or below; ∞ if it never was."""
    found = zip(history["step"], history["seconds"], history["loss"], strict=True)
    return next(
        ((step, seconds) for step, seconds, loss in found if loss <= goal), (math.inf, math.inf)
    )


def before(history: History, key: str, budget: float) -> float:
    """The loss last found within `budget` of steps or seconds."""
    return [
        loss for spent, loss in zip(history[key], history["loss"], strict=True) if spent <= budget
    ][-1]


def _step(optimizer: torch.optim.Optimizer, setting: Setting, step: int) -> None:
    inputs, targets = setting.batch(step)
    if isinstance(optimizer, (GaussNewton, NaturalGradient, KFAC)):
        optimizer.step(lambda: (setting.model(inputs), targets))
        return
    optimizer.zero_grad()
    setting.loss(setting.model(inputs), targets).backward()
    optimizer.step()


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(1000)])


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _final(row: Row) -> float:
    return math.inf if row["diverged"] else float(row["history"]["loss"][-1])


def _pace(row: Row) -> float:
    """Milliseconds a step."""
    history: History = row["history"]
    return 1000 * history["seconds"][-1] / max(history["step"][-1], 1)


def _middle(values: Sequence[float], digits: int) -> str:
    """The median, and in how many runs there was a finite value, if not in all."""
    middle, finite = statistics.median(values), sum(map(math.isfinite, values))
    some = f" ({finite} of {len(values)})" if finite < len(values) else ""
    return f"{middle:.{digits}f}{some}" if middle < math.inf else f"–{some}"
