"""Towers of optimisers on MNIST: each against its plain optimiser, and towers of SGD from good and bad step sizes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

import tasks
from experiments.base import Case, Experiment, Row, markdown, spread
from experiments.networks import seeded
from experiments.towers import descend
from metaimplicit import Hyperoptimizer, Positive
from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam, AdamW, Level, RMSProp

LOG = {"lr": Positive()}  # log lr moves, not lr
TOWERS: dict[str, Level] = {  # "a-by-b": a's hyperparameters by b; it is compared with "a"
    "sgd": SGD(0.01),
    "sgd-by-sgd": SGD(0.01, optimizer=SGD(0.01)),
    "sgd-by-adagrad": SGD(0.01, optimizer=AdaGrad(0.01)),
    "sgd-by-rmsprop": SGD(0.01, optimizer=RMSProp(0.1)),
    "sgd-by-adam": SGD(0.01, optimizer=Adam(1e-3)),
    "sgd-log-by-adam": SGD(0.01, optimizer=Adam(0.1), domains=LOG),
    "sgd-per-tensor-by-sgd": SGD(0.01, optimizer=SGD(0.1), learn={"lr": "per-tensor"}),
    "momentum": SGD(0.01, momentum=0.9),
    "momentum-by-sgd": SGD(0.01, momentum=0.9, optimizer=SGD(0.1)),
    "adagrad": AdaGrad(0.01, initial=0.1),
    "adagrad-by-sgd": AdaGrad(0.01, initial=0.1, optimizer=SGD(1e-3)),
    "adagrad-by-adagrad": AdaGrad(0.01, initial=0.1, optimizer=AdaGrad(0.01)),
    "rmsprop": RMSProp(0.01),
    "rmsprop-by-sgd": RMSProp(0.01, optimizer=SGD(1e-6)),
    "rmsprop-by-rmsprop": RMSProp(0.01, optimizer=RMSProp(1e-5)),
    "adam": Adam(0.01),
    "adam-by-sgd": Adam(0.01, optimizer=SGD(1e-4)),
    "adam-lr-by-sgd": Adam(0.01, optimizer=SGD(1e-4), learn=("lr",)),
    "adam-log-by-sgd": Adam(0.01, optimizer=SGD(1.0), domains=LOG),
    "adam-by-adam": Adam(0.01, optimizer=Adam(1e-4)),
    "adamw": AdamW(0.01),
    "adamw-by-sgd": AdamW(0.01, optimizer=SGD(1e-4)),
    "adam001": Adam(0.001),
    "adam001-by-sgd": Adam(0.001, optimizer=SGD(1e-5)),  # the published package's example
}


@dataclass(frozen=True)
class MnistTower(Experiment):
    """Test error of 784-128-10 (tanh) after training by towers of optimisers, as in Chandra et al. (2022).

    Methods are A-by-B, A's hyperparameters moved by B, beside A with the values it starts from, and A with the values
    the tower ended on, fixed from a fresh start ("re-used"). `height-N` are N + 1 levels of SGD, every one from the
    same step size, the top one's fixed: `starts` are tried for each, by seed 0.
    """

    epochs: int = 30
    """Over the 60,000 training images."""
    batch: int = 256
    """Images in a training batch."""
    hidden: int = 128
    """Units of the hidden layer."""
    logits: Literal["tanh", "linear"] = "tanh"
    """Whether the output is squashed, as in the published example of the paper's package."""
    heights: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Levels above the SGD of the weights."""
    starts: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Step sizes that every level starts from."""
    height_epochs: int = 5
    """Epochs of `height-N`."""
    training: int | None = None
    """Training images of each class; by default all."""

    name: ClassVar[str] = "mnist-tower"
    listed: ClassVar[tuple[str, ...]] = ("heights", "starts")
    compared: ClassVar[tuple[str, ...]] = tuple(TOWERS)
    baselines: ClassVar[tuple[str, ...]] = tuple(TOWERS)

    def quickened(self) -> MnistTower:
        return replace(
            self,
            seeds=1,
            epochs=1,
            hidden=4,
            training=20,
            batch=50,
            heights=(0, 2),
            starts=(0.01, 1.0),
            height_epochs=1,
        )

    def cases(self) -> list[Case]:
        for name, number in {
            "--epochs": self.epochs,
            "--height-epochs": self.height_epochs,
        }.items():
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        if unknown := [m for m in self.methods if m not in TOWERS]:
            raise ValueError(
                f"--method: got {', '.join(unknown)}, expected some of {', '.join(TOWERS)}"
            )
        if min(self.heights, default=0) < 0 or not min(self.starts, default=1.0) > 0:
            raise ValueError(
                f"--heights, --starts: got {self.heights} and {self.starts}, expected ≥ 0 and > 0"
            )
        sensitivity = [
            {"method": f"height-{height}", "start": start, "seed": 0}
            for height in self.heights
            for start in self.starts
        ]
        return super().cases() + sensitivity

    def run(self, case: Case, out: Path) -> Row:
        if "start" in case:
            levels = SGD(case["start"])
            for _ in range(int(case["method"].removeprefix("height-"))):
                levels = SGD(case["start"], optimizer=levels)
            return self._trained(levels, case["seed"], self.height_epochs)
        tower = TOWERS[case["method"]]
        row = self._trained(tower, case["seed"], self.epochs)
        learnt = row["levels"][0] if row["diverged"] is None else {}
        if learnt and all(isinstance(x, float) for x in learnt.values()):
            fixed = replace(tower, optimizer=None, learn=None, domains={}, **learnt)
            row["reused_error"] = self._trained(fixed, case["seed"], self.epochs)["error"]
        return row

    @cached_property
    def _data(self) -> tuple[tasks.Examples, tasks.Examples]:
        pair = [
            tasks.Examples(x.inputs.flatten(1).float() / 255, x.targets)
            for x in tasks.mnist(self.data_root)
        ]
        train, test = (part.to(self.torch_device) for part in pair)
        return train, test

    def _trained(self, tower: Level, seed: int, epochs: int) -> Row:
        """What a run comes to: error in %, None where it diverged; the last epoch's mean loss; the values learnt."""
        train, test = self._data
        if self.training is not None:
            train, _ = tasks.per_class(train, self.training, seed)
        batches, last = tasks.Batches(train, self.batch, seed), len(train) // self.batch
        with seeded(seed):
            model = nn.Sequential(
                nn.Linear(784, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 10)
            )
        if self.logits == "tanh":
            model.append(nn.Tanh())
        model.to(train.inputs)

        def loss(step: int) -> Tensor:
            batch = batches(step)
            return F.cross_entropy(model(batch["inputs"]), batch["targets"])

        row = descend(Hyperoptimizer(model.parameters(), tower), loss, epochs * last, last)
        return row | {"error": _error(model, test) if row["diverged"] is None else None}

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for method in self.methods:
            found = [row for case, row in rows if case["method"] == method]
            plain = [row for case, row in rows if case["method"] == method.split("-")[0]]
            if not found:
                continue
            start = {
                name: x
                for name, x in TOWERS[method].initial_values.items()
                if name in _SHOWN and x != 0
            }
            levels = found[0].get("levels", [])
            lines.append([
                f"`{method}`",
                _numbers(start),
                _spread(found, "error"),
                _spread(plain, "error") if "-by-" in method else "",
                _spread(found, "loss", 4),
                _numbers(levels[0]) if levels else "",
                _spread([row for row in found if "reused_error" in row], "reused_error"),
                f"{statistics.median(row['ms'] for row in found):.2f}",
            ])  # fmt: skip
        header = [
            "method", "starts at", "test error, %", "plain, %", "training loss, last epoch", "learnt (seed 0)",
            "re-used, fixed, %", "ms a step",
        ]  # fmt: skip
        heights = sorted({case["method"] for case, _ in rows if "start" in case})
        table = markdown(header, lines)
        if not heights:
            return table
        starts = sorted({case["start"] for case, _ in rows if "start" in case})
        grid = [
            [f"`{height}`", *(_spread([r for c, r in rows if c.get("start") == x and c["method"] == height], "error")
                              for x in starts)]
            for height in heights
        ]  # fmt: skip
        return f"{table}\n\n{markdown(['test error, %, from', *(f'{x:g}' for x in starts)], grid)}"

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
        for case, row in rows:
            if case["seed"] == 0 and "-by-" in case["method"] and row["curve"]["step"]:
                points = torch.tensor(
                    [row["curve"]["step"], row["curve"]["lr"]], dtype=torch.float64
                ).split(20, 1)
                left.plot(
                    *torch.stack([part.mean(1) for part in points]).T,
                    label=case["method"],
                    linewidth=0.9,
                )
        left.set(title="step size, means over 200 steps", xlabel="training steps")
        left.set_yscale("symlog", linthresh=1e-4)
        for height in sorted({case["method"] for case, _ in rows if "start" in case}):
            found = [
                (case["start"], row["error"]) for case, row in rows if case["method"] == height
            ]
            points = sorted(point for point in found if point[1] is not None)
            right.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="o",
                markersize=3,
                label=height,
            )
        right.set(
            title="test error, %, of towers of SGD",
            xlabel="step size every level starts from",
            xscale="log",
        )
        for ax in (left, right):
            if ax.get_lines():
                ax.legend(fontsize=5, loc="lower left" if ax is left else "best")


_SHOWN = ("lr", "momentum", "alpha", "beta1", "beta2")


def _numbers(values: dict[str, Any]) -> str:
    """Of a step size for each tensor, the smallest and the largest."""
    shown = {
        n: f"{x:.4g}" if isinstance(x, float) else f"{min(x):.2g} … {max(x):.2g}"
        for n, x in values.items()
    }
    return ", ".join(f"{name} {text}" for name, text in shown.items())


def _spread(rows: Sequence[Row], key: str, digits: int = 2) -> str:
    """Over the runs; how many diverged, if any did."""
    values = [row[key] for row in rows if row.get(key) is not None]
    lost = len(rows) - len(values)
    return "; ".join(
        [*([spread(values, digits)] if values else []), *([f"{lost} diverged"] if lost else [])]
    )


@torch.no_grad()
def _error(model: nn.Module, test: tasks.Examples) -> float:
    wrong = model(test.inputs).argmax(1) != test.targets
    return 100 * float(wrong.double().mean())
