"""Towers of optimisers on MNIST, beside plain optimisers, and from good and bad step sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from command_line.ranges import Count, Numbers, Steps, Width, within
from figures import legend_below
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import tasks
from experiments.base import Experiment
from experiments.networks import seeded
from experiments.runs import METHOD, Case, Row, Runs, markdown, markdown_table, mean, median
from experiments.towers import HYPERPARAMETERS, STEPS_PER_POINT, train_with_curve
from metaimplicit import Hyperoptimizer, Positive
from metaimplicit.tuning.hyperoptimizers import SGD, AdaGrad, Adam, AdamW, Level, RMSProp

LOG_LR = {"lr": Positive()}  # the domain whose free coordinate is log lr

# "a-by-b" is optimiser a with its hyperparameters moved by b. It is compared with plain "a".
TOWERS: dict[str, Level] = {
    "sgd": SGD(0.01),
    "sgd-by-sgd": SGD(0.01, optimizer=SGD(0.01)),
    "sgd-by-adagrad": SGD(0.01, optimizer=AdaGrad(0.01)),
    "sgd-by-rmsprop": SGD(0.01, optimizer=RMSProp(0.1)),
    "sgd-by-adam": SGD(0.01, optimizer=Adam(1e-3)),
    "sgd-log-by-adam": SGD(0.01, optimizer=Adam(0.1), domains=LOG_LR),
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
    "adam-log-by-sgd": Adam(0.01, optimizer=SGD(1.0), domains=LOG_LR),
    "adam-by-adam": Adam(0.01, optimizer=Adam(1e-4)),
    "adamw": AdamW(0.01),
    "adamw-by-sgd": AdamW(0.01, optimizer=SGD(1e-4)),
    "adam001": Adam(0.001),
    "adam001-by-sgd": Adam(0.001, optimizer=SGD(1e-5)),  # the example of the paper's package
}
STEPS_PER_MEAN = 200  # of the step sizes in the plot


@dataclass(frozen=True)
class MnistTower(Experiment):
    """Test error of a 784-128-10 network after training by towers (Chandra et al. 2022).

    The method A-by-B is the optimiser A with hyperparameters that B moves. It is shown beside A
    with the hyperparameters it starts from, and beside A from a fresh start with the
    hyperparameters that the tower ended on ("re-used, fixed"). The methods `height-N` are N + 1
    levels of SGD that all start from the same step size, where the step size of the top level is
    fixed. They run from every step size of `starts`, with seed 0.
    """

    epochs: Steps = 30
    """Number of passes through the 60,000 training images."""
    batch: Count = 256
    """Number of images in a training batch."""
    hidden: Width = 128
    """Number of units of the hidden layer, which are tanh."""
    logits: Literal["tanh", "linear"] = "tanh"
    """Output of the network. The example of the paper's package applies tanh to it."""
    heights: Annotated[tuple[int, ...], within(0, 100)] = (0, 1, 2, 3, 4, 5)
    """Numbers N of levels above the SGD of the weights in `height-N`."""
    starts: Numbers = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Step sizes that all levels of `height-N` start from."""
    height_epochs: Steps = 5
    """Number of epochs of `height-N`."""
    training: Annotated[int | None, within(1, 1_000_000)] = None
    """Number of training images of each class. If it is not given, all are used."""

    name = "mnist-tower"
    image_set = "mnist"
    default_methods = tuple(TOWERS)
    case_options = ("heights", "starts")
    quick_options: ClassVar[dict[str, Any]] = {
        "epochs": 1,
        "hidden": 4,
        "training": 20,
        "batch": 50,
        "heights": (0, 2),
        "starts": (0.01, 1.0),
        "height_epochs": 1,
    }

    def check_options(self) -> None:
        """Raise ValueError for sizes or starts out of range."""
        super().check_options()
        if not min(self.starts, default=1.0) > 0:
            raise ValueError(f"--starts: got {self.starts}, expected numbers > 0")

    def cases(self) -> list[Case]:
        """Every method for every seed, then every height from every start."""
        heights = [
            {"method": f"height-{height}", "start": start, "seed": 0}
            for height in self.heights
            for start in self.starts
        ]
        return super().cases() + heights

    def run(self, case: Case, out: Path) -> Row:
        """Train by the tower of a case, then by the plain optimiser with the values it ended on."""
        if "start" in case:
            height = int(case["method"].removeprefix("height-"))
            tower = sgd_tower(height, case["start"])
            return self.train(tower, case["seed"], self.height_epochs)

        tower = TOWERS[case["method"]]
        row = self.train(tower, case["seed"], self.epochs)
        learnt = row["levels"][0] if row["diverged"] is None else {}
        # No plain optimiser has a step size for each tensor.
        if learnt and all(isinstance(value, float) for value in learnt.values()):
            fixed = replace(
                tower,
                optimizer=None,
                learn=None,
                domains={},
                **learnt,
            )
            row["reused_error"] = self.train(fixed, case["seed"], self.epochs)["error"]
        return row

    @cached_property
    def data(self) -> tuple[tasks.Examples, tasks.Examples]:
        """The training and the test set as vectors of pixels in [0, 1], read once for all runs."""
        vectors = [
            tasks.Examples(part.inputs.flatten(1).float() / 255, part.targets)
            for part in tasks.mnist(self.data_root)
        ]
        train, test = (part.to(self.torch_device) for part in vectors)
        return train, test

    def train(self, tower: Level, seed: int, epochs: int) -> Row:
        """The row of `train_with_curve`, and the test error in %, None if the run diverged."""
        train_set, test = self.data
        if self.training is not None:
            train_set, _ = tasks.per_class(train_set, self.training, seed)
        batches = tasks.Batches(train_set, self.batch, seed)
        steps_per_epoch = len(train_set) // self.batch
        with seeded(seed):
            layers = [nn.Linear(784, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 10)]
        if self.logits == "tanh":
            layers.append(nn.Tanh())
        model = nn.Sequential(*layers).to(train_set.inputs)

        def loss(step: int) -> Tensor:
            batch = batches(step)
            return F.cross_entropy(model(batch["inputs"]), batch["targets"])

        row = train_with_curve(
            Hyperoptimizer(model.parameters(), tower),
            loss,
            steps=epochs * steps_per_epoch,
            last=steps_per_epoch,
        )
        return row | {"error": percentage_wrong(model, test) if row["diverged"] is None else None}

    def table(self, runs: Runs) -> str:
        """A line for each method; then the test errors of each height from each start."""
        columns = {
            "method": METHOD,
            "starts at": initial_hyperparameters,
            "test error, %": mean("error"),
            "plain, %": lambda group: plain_error(group, runs),
            "training loss, last epoch": mean("loss", 4),
            "learnt (seed 0)": learnt_hyperparameters,
            "re-used, fixed, %": mean("reused_error"),
            "ms a step": median("ms", 2),
        }
        methods = Runs(run for run in runs if "start" not in run.case)
        heights = Runs(run for run in runs if "start" in run.case)
        table = markdown_table(columns, methods.groups("method"))
        if not heights:
            return table
        starts = sorted({run.case["start"] for run in heights})
        lines = [
            [METHOD(group), *(mean("error")(group.where(start=start)) for start in starts)]
            for _, group in heights.groups("method")
        ]
        header = ["test error, %, from", *(f"{start:g}" for start in starts)]
        return f"{table}\n\n{markdown(header, lines)}"

    def plot(self, runs: Runs, figure: Figure) -> None:
        """Step sizes of the towers of seed 0, by their lowest level; errors against starts.

        A method is a tower if its name has "-by-" in it, as "adam-by-sgd" has. Towers of several
        heights, the runs that have a start, are in the last panel.
        """
        figure.set_size_inches(9, 8)
        axes = figure.subplots(2, 2).flatten()
        families = {
            "SGD": ("sgd", "momentum"),
            "AdaGrad and RMSProp": ("adagrad", "rmsprop"),
            "Adam": ("adam", "adamw", "adam001"),
        }
        for ax, (title, family) in zip(axes, families.items(), strict=False):
            towers = [
                run
                for run in runs.where(seed=0)
                if "-by-" in run.case["method"] and run.case["method"].split("-")[0] in family
            ]
            plot_step_sizes(ax, Runs(towers))
            ax.set_title(f"lr of {title}")
        plot_heights(axes[-1], Runs(run for run in runs if "start" in run.case))


def sgd_tower(height: int, lr: float) -> Level:
    """SGD with `height` levels of SGD above it, all of which start from the step size `lr`."""
    tower = SGD(lr)
    for _ in range(height):
        tower = SGD(lr, optimizer=tower)
    return tower


def plot_step_sizes(ax: Axes, runs: Runs) -> None:
    """The step size of each run against training steps."""
    for case, row in runs:
        curve = torch.tensor([row["curve"]["step"], row["curve"]["lr"]], dtype=torch.float64)
        if curve.numel():
            # The means of consecutive parts, of two numbers each.
            means = [part.mean(1) for part in curve.split(STEPS_PER_MEAN // STEPS_PER_POINT, dim=1)]
            steps, step_sizes = torch.stack(means).T
            (line,) = ax.plot(steps, step_sizes, label=case["method"], linewidth=0.9)
            line.set(marker="o", markersize=1.5)
    ax.set(xlabel="training steps", ylabel=f"mean over {STEPS_PER_MEAN} steps")
    ax.set_yscale("symlog", linthresh=1e-4)
    legend_below(ax, columns=3)


def plot_heights(ax: Axes, runs: Runs) -> None:
    """The test error of each height against the step size that its levels start from."""
    for case, group in runs.groups("method"):
        finished = [run for run in group if run.row["error"] is not None]
        starts = [run.case["start"] for run in finished]
        errors = [run.row["error"] for run in finished]
        ax.plot(starts, errors, marker="o", markersize=3, label=case["method"])
    ax.set(title="test error, %, of towers of SGD", xlabel="step size of all levels at the start")
    ax.set_xscale("log")
    legend_below(ax, columns=3)


def initial_hyperparameters(runs: Runs) -> str:
    """A cell with the hyperparameters other than 0 that the lowest level starts from."""
    numbers = TOWERS[runs[0].case["method"]].initial_values
    shown = {name: numbers.get(name, 0) for name in (*HYPERPARAMETERS, "alpha")}
    return hyperparameter_list({name: value for name, value in shown.items() if value != 0})


def learnt_hyperparameters(runs: Runs) -> str:
    """A cell with the hyperparameters that the lowest level ended on, of the first run."""
    levels = runs[0].row.get("levels", [{}])
    return hyperparameter_list(levels[0])


def hyperparameter_list(values: dict[str, float | Sequence[float]]) -> str:
    """Names and values. Of one value for each tensor, the smallest and the largest are shown.

    Example:
        >>> hyperparameter_list({"lr": [0.01, 0.2], "momentum": 0.9})
        'lr 0.01 … 0.2, momentum 0.9'
    """
    texts = [
        f"{name} {value:.4g}"
        if isinstance(value, float)
        else f"{name} {min(value):.2g} … {max(value):.2g}"
        for name, value in values.items()
    ]
    return ", ".join(texts)


def plain_error(runs: Runs, all_runs: Runs) -> str:
    """A cell with the test error of the plain optimiser that a tower is compared with."""
    method = runs[0].case["method"]
    plain = all_runs.where(method=method.split("-")[0])
    return mean("error")(plain) if "-by-" in method else ""


@torch.no_grad()
def percentage_wrong(model: nn.Module, test: tasks.Examples) -> float:
    """The share of wrong predictions, in %."""
    wrong = model(test.inputs).argmax(1) != test.targets
    return 100 * float(wrong.double().mean())
