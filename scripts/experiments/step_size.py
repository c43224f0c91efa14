"""Step size and momentum of SGD on MNIST: forward mode, reverse mode and real-time tuning."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from command_line.ranges import Count, Number, Share, Steps, Width
from figures import shared_legend_below
from matplotlib.figure import Figure
from torch import nn

import tasks
from experiments.networks import Split, balanced_accuracy, parameter_count, seeded, train
from experiments.runs import METHOD, Case, Row, Runs, markdown_table, mean, median
from experiments.sgd_loop import (
    LOOP,
    MEBIBYTE,
    Batch,
    Data,
    hypergradient_in_pieces,
    live_tensor_bytes,
    peak_of_loop,
)
from experiments.tuning import TuningExperiment
from metaimplicit import Positive, Tuner, tuning_problem
from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.params import Params
from metaimplicit.tuning import Interval, Scalar, TunerStep, TuningProblem


@dataclass(frozen=True)
class StepSize(TuningExperiment):
    """Step size η and momentum μ of SGD from poor values, for a network of one hidden layer.

    The inner loss f is the cross-entropy of a training batch; the outer loss g is that of the
    validation set. `forward` and `unrolled` train for `horizon` steps from the initialisation for
    every hypergradient. `real-time` (Franceschi et al. 2017, RTHO) trains once, and moves η and μ
    every `period` steps. Every method takes `steps` training steps in all. The baseline `none`
    leaves η and μ as they are.
    """

    steps: Steps = 10_000
    """Number of training steps of all outer steps together."""
    horizon: Steps = 100
    """Number of training steps T for each hypergradient of `forward` and `unrolled`."""
    period: Steps = 10
    """Number of training steps for each hypergradient of `real-time`."""
    lr: Number = 0.001
    """Step size η at the start."""
    momentum: Share = 0.5
    """Momentum μ at the start."""
    outer_lr: Number = 0.1
    """Step size of Adam on log η and logit μ for `forward` and `unrolled`."""
    realtime_lr: Number = 0.01
    """Step size of Adam on log η and logit μ for `real-time`."""
    hidden: Width = 64
    """Number of units of the hidden layer, which are tanh."""
    training: Count = 500
    """Number of training images of each class."""
    validation: Count = 100
    """Number of validation images of each class."""
    test: Count = 10_000
    """Number of test images. They are the first of the test set."""
    batch: Count = 64
    """Number of images in a training batch."""

    name = "step-size"
    image_set = "mnist"
    baselines = ("none",)
    default_methods = ("none", "unrolled", "forward", "real-time")
    quick_options: ClassVar[dict[str, Any]] = {
        "steps": 20,
        "horizon": 2,
        "period": 1,
        "hidden": 4,
        "training": 10,
        "validation": 5,
        "test": 100,
        "batch": 16,
    }

    @property
    def known_methods(self) -> tuple[str, ...]:
        """The default methods: no others give the hypergradient of a step size."""
        return self.default_methods

    def check_options(self) -> None:
        """Raise ValueError for numbers of steps that do not fit one another."""
        super().check_options()
        in_order = 1 <= self.period <= self.horizon <= self.steps
        if not in_order or self.horizon % self.period:
            raise ValueError(
                f"--period, --horizon, --steps: got {self.period}, {self.horizon}, {self.steps}, "
                "expected each at most the next, and the horizon a multiple of the period"
            )

    def run(self, case: Case, out: Path) -> Row:
        """Train, with η and μ tuned or not, and again for `horizon` steps with the values reached.

        The `trajectory` of a row has the training steps done, η, μ and the validation loss, after
        every `horizon` training steps. Its `seconds` are those of the training alone.
        """
        method, seed = case["method"], case["seed"]
        data = self.data(seed)
        began = time.perf_counter()
        if method == "none":
            params, row = self.train_untuned(seed, data)
        else:
            params, row = self.tune(method, seed, data)
        row["seconds"] = time.perf_counter() - began

        model = self.network(seed)
        row["parameters"] = parameter_count(model)
        row["accuracy"] = balanced_accuracy(model, data.test, params)
        _, row["lr"], row["momentum"], row["loss"] = row["trajectory"][-1]
        sgd = torch.optim.SGD(model.parameters(), lr=row["lr"], momentum=row["momentum"])
        train(model, data.batches, steps=self.horizon, optimizer=sgd)
        row["fresh_loss"] = loss_of(model, data.validation)
        row["fresh_accuracy"] = balanced_accuracy(model, data.test)
        if method != "none":
            row["difference"] = self.difference(method, seed, data)
        if method in ("unrolled", "forward") and seed == 0:
            row["memory"] = self.memory_of_loops(method, seed, data)
        return row

    def data(self, seed: int) -> Data:
        """The data of a seed."""
        whole, test = tasks.mnist(self.data_root)
        validation, others = tasks.per_class(whole, self.validation, seed)
        train_set, _ = tasks.per_class(others, self.training, seed)
        test = test.take(torch.arange(min(self.test, len(test))))
        split = Split(train_set, validation, test).standardised(self.torch_device)
        return Data(
            batches=tasks.Batches(split.train, min(self.batch, len(split.train)), seed),
            validation=tasks.Batches(split.validation, None, 0)(0),
            test=split.test,
        )

    def network(self, seed: int) -> nn.Sequential:
        """784-hidden-10, tanh."""
        with seeded(seed):
            layers = [nn.Linear(784, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 10)]
        return nn.Sequential(nn.Flatten(), *layers).to(self.torch_device)

    def problem(self, model: nn.Module) -> TuningProblem:
        """The bilevel problem of φ = (η, μ), which the inner loop `LOOP` reads."""
        lr = Scalar("lr", self.lr, Positive())
        momentum = Scalar("momentum", self.momentum, Interval(0, 1))
        return tuning_problem(model, F.cross_entropy, [lr, momentum])

    def train_untuned(self, seed: int, data: Data) -> tuple[Params, Row]:
        """Train with η and μ as they start. Returns the parameters and the trajectory."""
        model = self.network(seed)
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        trajectory = []
        for first in range(0, self.steps, self.horizon):
            steps = min(self.horizon, self.steps - first)
            train(model, data.batches_from(first), steps=steps, optimizer=sgd)
            loss = loss_of(model, data.validation)
            trajectory.append([first + steps, self.lr, self.momentum, loss])
        params = {name: p.detach() for name, p in model.named_parameters()}
        return params, {"trajectory": trajectory}

    def tune(self, method: str, seed: int, data: Data) -> tuple[Params, Row]:
        """Tune η and μ. Returns the parameters of the last inner loop, and the trajectory.

        The row of `real-time` and seed 0 also has its memory.
        """
        tuner = self.tuner(method, seed)
        inner_steps = tuner.inner.steps
        trajectory = []

        def note(step: TunerStep) -> None:
            done = tuner.steps * inner_steps
            if done % self.horizon == 0:
                lr = tuner.meta["lr"].item()
                momentum = tuner.meta["momentum"].item()
                trajectory.append([done, lr, momentum, step.outer_loss])

        fit = partial(tuner.fit, data.batches, lambda i: data.validation, callback=note)
        row: Row = {"trajectory": trajectory}
        if method == "real-time" and seed == 0:
            row["memory"] = self.memory_along_run(fit)
        fit(steps=self.steps // inner_steps)
        return tuner.params, row

    def tuner(self, method: str, seed: int) -> Tuner:
        """A tuner of η and μ. That of `real-time` goes on with the training at each outer step."""
        realtime = method == "real-time"
        lr = self.realtime_lr if realtime else self.outer_lr
        return self.make_tuner(
            self.problem(self.network(seed)),
            method,
            inner=LOOP.updated(steps=self.period if realtime else self.horizon),
            optimizer=partial(torch.optim.Adam, lr=lr),
            warm_start=realtime,
        )

    def difference(self, method: str, seed: int, data: Data) -> float:
        """‖p − q‖/‖q‖ of the hypergradients p of a method and q of reverse mode, in float64.

        The method `unrolled` is reverse mode; its q is that of forward mode. Both are those of
        `horizon` steps from the initialisation, at the values of η and μ to start from.
        """
        problem = self.problem(self.network(seed).double())
        other = "forward" if method == "unrolled" else "unrolled"
        steps = self.horizon
        piece = self.period if method == "real-time" else steps
        p = hypergradient_in_pieces(problem, data.double(), method, steps=steps, piece=piece)
        q = hypergradient_in_pieces(problem, data.double(), other, steps=steps, piece=steps)
        return float((p - q).norm() / q.norm())

    def memory_of_loops(self, method: str, seed: int, data: Data) -> dict[str, float]:
        """The peak MiB of live tensors in a short and in a long inner loop, by number of steps."""
        problem = self.problem(self.network(seed))
        lengths = (max(self.horizon // 5, 1), 2 * self.horizon)
        return {str(k): peak_of_loop(problem, data, method, steps=k) for k in lengths}

    def memory_along_run(self, fit: Callable[..., object]) -> dict[str, float]:
        """The peak MiB of live tensors after 1, 10 and 100 horizons of real-time tuning.

        `fit` takes outer steps up to a number of them. `LiveBytes` is slow, so it watches the last
        outer step before each mark only, and what was alive before that step is added.
        """
        at_start = live_tensor_bytes()
        peaks: dict[str, float] = {}
        for horizons in (1, 10, 100):
            done = horizons * self.horizon
            if done > self.steps:
                break
            fit(steps=done // self.period - 1)
            before = live_tensor_bytes() - at_start
            with LiveBytes() as live:
                fit(steps=done // self.period)
            peaks[str(done)] = (before + live.peak) / MEBIBYTE
        return peaks

    def table(self, runs: Runs) -> str:
        """A line for each method."""
        columns = {
            "method": METHOD,
            "η reached": mean("lr", 4),
            "μ reached": mean("momentum", 3),
            "validation loss": mean("loss", 4),
            "test accuracy": mean("accuracy", 4),
            f"validation loss, fresh start, {self.horizon} steps": mean("fresh_loss", 4),
            "test accuracy, fresh start": mean("fresh_accuracy", 4),
            "hypergradients differ by": largest_difference,
            "peak MiB (after steps)": memory,
            "s": median("seconds"),
        }
        return markdown_table(columns, runs.groups("method"))

    def plot(self, runs: Runs, figure: Figure) -> None:
        """η, μ and the validation loss against training steps, of seed 0."""
        axes = figure.subplots(1, 3)
        for case, row in runs.where(seed=0):
            steps, *curves = zip(*row["trajectory"], strict=True)
            # The curves of forward and of reverse mode are the same to round-off.
            linestyle = "--" if case["method"] == "forward" else "-"
            for ax, curve in zip(axes, curves, strict=True):
                ax.plot(steps, curve, linestyle, label=case["method"])
        for ax, title in zip(axes, ("η", "μ", "validation loss"), strict=True):
            ax.set(title=title, xlabel="training steps")
        axes[0].set_yscale("log")
        axes[2].set_yscale("log")
        shared_legend_below(figure)


def largest_difference(runs: Runs) -> str:
    """A cell with the largest difference from the other mode's hypergradient."""
    differences = runs.values("difference")
    return f"{max(differences):.0e}" if differences else "–"


def memory(runs: Runs) -> str:
    """A cell with the peaks of memory, each with its number of steps."""
    peaks = [peak for by_steps in runs.values("memory") for peak in by_steps.items()]
    return ", ".join(f"{mebibytes:.2f} ({steps})" for steps, mebibytes in peaks) or "–"


@torch.no_grad()
def loss_of(model: nn.Module, batch: Batch) -> float:
    """The mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch["inputs"]), batch["targets"]).item()
