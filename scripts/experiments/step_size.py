"""Step size and momentum of SGD on MNIST: forward mode, reverse mode and real-time tuning."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import tasks
from experiments.base import Case, Experiment, Row, markdown, select, spread
from experiments.networks import class_accuracies, seeded, train
from metaimplicit import (
    FromMeta,
    GradientDescent,
    Interval,
    Positive,
    Tuner,
    hypergradient,
    tuning_problem,
)
from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.params import Params
from metaimplicit.problem import Stream
from metaimplicit.tuning import Scalar, TunerStep, TuningProblem

LOOP = GradientDescent(lr=FromMeta("lr"), momentum=FromMeta("momentum"))


@dataclass(frozen=True)
class StepSize(Experiment):
    """η and μ of SGD with momentum, training a network of one hidden layer, from poor values of both.

    f is the cross-entropy of a training batch, g that of the validation set. `forward` and `unrolled` train anew for
    every hypergradient, `horizon` steps; `real-time` (Franceschi et al. 2017, RTHO) trains once and moves η and μ every
    `period` steps. All take `steps` training steps in all. Baseline: `none`, η and μ as they start.
    """

    steps: int = 10_000
    """Training steps of all outer steps together."""
    horizon: int = 100
    """T, training steps for each hypergradient of `forward` and `unrolled`."""
    period: int = 10
    """The same of `real-time`."""
    lr: float = 0.001
    """η to start from."""
    momentum: float = 0.5
    """μ to start from."""
    outer_lr: float = 0.1
    """Adam's, on log η and logit μ, of `forward` and `unrolled`."""
    realtime_lr: float = 0.01
    """The same of `real-time`."""
    hidden: int = 64
    """Units of the hidden layer, tanh."""
    training: int = 500
    """Training images of each class."""
    validation: int = 100
    """Validation images of each class."""
    test: int = 10_000
    """Test images, the first."""
    batch: int = 64
    """Images in a training batch."""

    name: ClassVar[str] = "step-size"
    baselines: ClassVar[tuple[str, ...]] = ("none",)
    compared: ClassVar[tuple[str, ...]] = ("none", "unrolled", "forward", "real-time")

    def quickened(self) -> StepSize:
        return replace(
            self,
            seeds=1,
            steps=20,
            horizon=2,
            period=1,
            hidden=4,
            training=10,
            validation=5,
            test=100,
            batch=16,
        )

    def cases(self) -> list[Case]:
        if unknown := [m for m in self.methods if m not in self.compared]:
            raise ValueError(
                f"--method: got {', '.join(unknown)}, expected some of {', '.join(self.compared)}"
            )
        if not 1 <= self.period <= self.horizon <= self.steps or self.horizon % self.period:
            raise ValueError(
                f"--period, --horizon, --steps: got {self.period}, {self.horizon}, {self.steps}, expected each at most "
                "the next, and the horizon a multiple of the period"
            )
        return super().cases()

    def run(self, case: Case, out: Path) -> Row:
        method, seed = case["method"], case["seed"]
        train_set, validation, test = self._data(seed)
        batches = tasks.Batches(train_set, min(self.batch, len(train_set)), seed)
        judge = tasks.Batches(validation, None, 0)(0)
        began = time.perf_counter()
        if method == "none":
            params, row = self._plain(seed, batches, judge)
        else:
            params, row = self._tuned(method, seed, batches, judge)
        row["seconds"] = time.perf_counter() - began
        model = self._network(seed)
        row["accuracy"] = statistics.fmean(class_accuracies(model, test, params))
        _, lr, momentum, row["loss"] = row["trajectory"][-1]
        self._sgd(model, batches, 0, self.horizon, self._optimizer(model, lr, momentum))
        row |= {
            "fresh_loss": _loss(model, judge),
            "fresh_accuracy": statistics.fmean(class_accuracies(model, test)),
        }
        if method != "none":
            row["difference"] = self.difference(method, seed, batches, judge)
            if seed == 0 and method != "real-time":
                row["memory"] = self._memory(method, seed, batches, judge)
        return row | {
            "lr": lr,
            "momentum": momentum,
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def _data(self, seed: int) -> tuple[tasks.Examples, ...]:
        whole, test = tasks.mnist(self.data_root)
        validation, rest = tasks.per_class(whole, self.validation, seed)
        train_set, _ = tasks.per_class(rest, self.training, seed)
        parts = train_set, validation, test.take(torch.arange(min(self.test, len(test))))
        return tuple(
            tasks.standardise(part, like=train_set).to(self.torch_device) for part in parts
        )

    def _network(self, seed: int) -> nn.Sequential:
        with seeded(seed):
            layers = (
                nn.Flatten(),
                nn.Linear(784, self.hidden),
                nn.Tanh(),
                nn.Linear(self.hidden, 10),
            )
        return nn.Sequential(*layers).to(self.torch_device)

    def problem(self, model: nn.Module) -> TuningProblem:
        """φ = (η, μ), which the inner loop `LOOP` reads."""
        variables = [
            Scalar("lr", self.lr, Positive()),
            Scalar("momentum", self.momentum, Interval(0, 1)),
        ]
        return tuning_problem(model, F.cross_entropy, variables)

    def _optimizer(self, model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def _sgd(
        self,
        model: nn.Module,
        batches: tasks.Batches,
        first: int,
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        train(model, lambda i: batches(first + i), steps, optimizer)

    def _plain(self, seed: int, batches: tasks.Batches, judge: Any) -> tuple[Params, Row]:
        model = self._network(seed)
        optimizer, trajectory = self._optimizer(model, self.lr, self.momentum), []
        for begin in range(0, self.steps, self.horizon):
            self._sgd(model, batches, begin, min(self.horizon, self.steps - begin), optimizer)
            done = min(begin + self.horizon, self.steps)
            trajectory.append([done, self.lr, self.momentum, _loss(model, judge)])
        return {name: p.detach() for name, p in model.named_parameters()}, {
            "trajectory": trajectory
        }

    def _tuner(self, method: str, seed: int) -> Tuner:
        problem, live = self.problem(self._network(seed)), method == "real-time"
        return Tuner(
            problem.problem,
            problem.meta,
            inner=LOOP.updated(steps=self.period if live else self.horizon),
            method=method,
            optimizer=partial(torch.optim.Adam, lr=self.realtime_lr if live else self.outer_lr),
            domains=problem.domains,
            warm_start=live,
        )

    def _tuned(
        self, method: str, seed: int, batches: tasks.Batches, judge: Any
    ) -> tuple[Params, Row]:
        tuner, trajectory = self._tuner(method, seed), []
        memory: dict[str, float] = {}
        k, began = tuner.inner.steps, held()

        def told(step: TunerStep) -> None:
            lr, momentum = (tuner.meta[name].item() for name in ("lr", "momentum"))
            if tuner.steps * k % self.horizon == 0:
                trajectory.append([tuner.steps * k, lr, momentum, step.outer_loss])

        fit = partial(tuner.fit, batches, lambda i: judge, callback=told)
        if method == "real-time" and seed == 0:
            for mark in (
                factor * self.horizon
                for factor in (1, 10, 100)
                if factor * self.horizon <= self.steps
            ):
                fit(steps=(mark - self.period) // k)
                before = held() - began
                with LiveBytes() as live:  # slow, so of the last outer step before the mark alone
                    fit(steps=mark // k)
                memory[str(mark)] = (before + live.peak) / 2**20
        fit(steps=self.steps // k)
        return tuner.params, {"trajectory": trajectory, **({"memory": memory} if memory else {})}

    def difference(self, method: str, seed: int, batches: tasks.Batches, judge: Any) -> float:
        """‖p − q‖/‖q‖ of the hypergradients of `method` and reverse mode (of reverse and forward mode), in float64.

        T = `horizon` steps from the same initialisation at η and μ as they start; `real-time` in pieces of `period`.
        """
        problem = self.problem(self._network(seed).double())

        def gradient(flag: str, steps: int) -> torch.Tensor:
            end = None
            for first in range(0, self.horizon, steps):

                def batch(t: int, first: int = first) -> Any:
                    return _double(batches(first + t) if t < steps else judge)

                found = hypergradient(
                    problem.problem,
                    problem.meta,
                    Stream(batch),
                    inner=LOOP.updated(steps=steps),
                    method=flag,
                    start=end,
                )
                end = found.end
            return torch.stack([found.grads[name] for name in ("lr", "momentum")])

        ours = gradient(method, self.period if method == "real-time" else self.horizon)
        other = gradient("forward" if method == "unrolled" else "unrolled", self.horizon)
        return float((ours - other).norm() / other.norm())

    def _memory(
        self, method: str, seed: int, batches: tasks.Batches, judge: Any
    ) -> dict[str, float]:
        """MiB of tensors alive at once, at the peak of one inner loop, by its number of steps."""
        problem = self.problem(self._network(seed))
        peaks: dict[str, float] = {}
        for steps in (self.horizon // 5 or 1, 2 * self.horizon):

            def batch(t: int, steps: int = steps) -> Any:
                return batches(t) if t < steps else judge

            with LiveBytes() as live:
                hypergradient(
                    problem.problem,
                    problem.meta,
                    Stream(batch),
                    inner=LOOP.updated(steps=steps),
                    method=method,
                )
            peaks[str(steps)] = live.peak / 2**20
        return peaks

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for method in self.methods:
            if not select(rows, "loss", method=method):
                continue
            found = {key: select(rows, key, method=method) for key in (*_SHOWN, "seconds")}
            differences = [
                row["difference"]
                for case, row in rows
                if case["method"] == method and "difference" in row
            ]
            measured = [
                row["memory"] for case, row in rows if case["method"] == method and "memory" in row
            ]
            lines.append([
                f"`{method}`",
                *(spread(found[key], digits) for key, digits in _SHOWN.items()),
                f"{max(differences):.0e}" if differences else "–",
                ", ".join(f"{mib:.2f} ({steps})" for peaks in measured for steps, mib in peaks.items()) or "–",
                f"{statistics.median(found['seconds']):.0f}",
            ])  # fmt: skip
        header = [
            "method", "η reached", "μ reached", "validation loss", "test accuracy",
            f"validation loss, {self.horizon} steps anew", "test accuracy, anew", "hypergradients differ by",
            "peak MiB (after steps)", "s",
        ]  # fmt: skip
        return markdown(header, lines)

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        for case, row in rows:
            if case["seed"] == 0:
                steps, *curves = zip(*row["trajectory"], strict=True)
                for ax, curve in zip(axes, curves, strict=True):
                    ax.plot(steps, curve, label=case["method"])
        for ax, label in zip(axes, ("η", "μ", "validation loss"), strict=True):
            ax.set(xlabel="training steps", title=label)
        axes[0].set_yscale("log")
        axes[2].set_yscale("log")
        axes[0].legend(fontsize=7)


_SHOWN = {
    "lr": 4,
    "momentum": 3,
    "loss": 4,
    "accuracy": 4,
    "fresh_loss": 4,
    "fresh_accuracy": 4,
}  # digits


def held() -> int:
    """Bytes of the tensors that Python holds."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


@torch.no_grad()
def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    return F.cross_entropy(model(batch["inputs"]), batch["targets"]).item()


def _double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch | {"inputs": batch["inputs"].double()}
