"""Data reweighting: long-tailed CIFAR-10, the weights of its examples learnt from a small balanced validation set."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import tasks
from experiments.base import Case, Experiment, Row, markdown, select, spread
from experiments.networks import class_accuracies, conv_net, joined, train
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.methods import known_options, make_method
from metaimplicit.training import fit_tuner
from metaimplicit.tuning import ClassWeights, ExampleWeights, TuningProblem, Variable, WeightNetwork

SEED_TABLE = {  # Hataya & Yamada's own, which names no model: test accuracy at imbalance 200, 100, 50
    "none": ("0.62 ± 0.06", "0.67 ± 0.13", "0.74 ± 0.08"),
    "cg": ("0.63 ± 0.06", "0.70 ± 0.05", "0.78 ± 0.02"),
    "neumann": ("0.60 ± 0.09", "0.73 ± 0.01", "0.79 ± 0.01"),
    "nystrom": ("0.66 ± 0.02", "0.73 ± 0.02", "0.79 ± 0.01"),
}


@dataclass(frozen=True)
class Reweighting(Experiment):
    """Balanced test accuracy of a conv net on long-tailed CIFAR-10.

    f is the weighted cross-entropy of a training batch plus decay, g the cross-entropy of a balanced validation batch
    of other images. Baselines: `none`, no weights; `none+validation`, no weights, the validation set added to training.
    The paper's size: --largest 5000 --filters 64 128 256 --steps 20000.
    """

    imbalance: tuple[float, ...] = (100.0,)
    """Size of the largest class over that of the smallest."""
    variable: Literal["classes", "class-network", "network", "examples"] = "classes"
    """What the weights are: a table of classes; a network of loss and class, or of loss; a table of examples."""
    largest: int = 1000
    """Training images of the largest class."""
    validation: int = 30
    """Validation images of each class."""
    test: int = 1000
    """Test images of each class."""
    filters: tuple[int, ...] = (16, 32, 64)
    """Channels of the convolutions."""
    steps: int = 2000
    """Training steps."""
    inner_steps: int = 20
    """Training steps for each hypergradient."""
    batch: int = 64
    """Images in a batch; validation batches are as large."""
    lr: float = 0.05
    """Of SGD with momentum 0.9, down to 0 along a cosine."""
    decay: float = 5e-4
    """½ decay ‖θ‖² is part of the training loss."""
    outer_lr: float = 0.05
    """Adam's, on the weights' parameters."""
    solver_steps: int = 10
    """Products of CG, terms of Neumann."""
    rank: int = 10
    """Columns of Nyström."""
    damping: float = 0.1
    """Added to the Gauss–Newton matrix, Nyström's ρ included."""

    name: ClassVar[str] = "reweighting"
    baselines: ClassVar[tuple[str, ...]] = ("none", "none+validation")
    compared: ClassVar[tuple[str, ...]] = (
        "none",
        "none+validation",
        "cg",
        "neumann",
        "nystrom",
        "nystrom-cg",
    )
    listed: ClassVar[tuple[str, ...]] = ("imbalance",)

    def quickened(self) -> Reweighting:
        return replace(
            self, method=self.method or ("none", "cg", "nystrom"), seeds=1, largest=100, validation=5, test=20,
            filters=(8, 8), steps=6, inner_steps=2, batch=16, solver_steps=2, rank=2,
        )  # fmt: skip

    def cases(self) -> list[Case]:
        if not 1 <= self.inner_steps <= self.steps:
            raise ValueError(
                f"--inner-steps: got {self.inner_steps}, expected from 1 to {self.steps}, --steps"
            )
        for imbalance in self.imbalance:
            tasks.long_tailed_counts(self.largest, 10, imbalance)
        plain = super().cases()
        return [case | {"imbalance": imbalance} for imbalance in self.imbalance for case in plain]

    def run(self, case: Case, out: Path) -> Row:
        began, method, seed = time.perf_counter(), case["method"], case["seed"]
        train_set, validation, test = self._data(seed, case["imbalance"])
        if method == "none+validation":
            train_set = joined(train_set, validation)
        model = conv_net(3, 10, self.filters, seed).to(self.torch_device)
        batches = tasks.Batches(train_set, min(self.batch, len(train_set)), seed)
        row: Row = {
            "examples": len(train_set),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if method in self.baselines:
            sgd = torch.optim.SGD(
                model.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.decay
            )
            train(
                model, batches, self.steps, sgd, lambda step: self._cosine(step // self.inner_steps)
            )
            accuracies = class_accuracies(model, test)
        else:
            problem = self._problem(model, train_set)
            tuner = self._tuner(problem, method)
            judge = tasks.Batches(validation, min(self.batch, len(validation)), seed + 1)
            fit_tuner(
                tuner, batches, judge, out=out, steps=self.steps // self.inner_steps, resume=True
            )
            accuracies = class_accuracies(model, test, tuner.params)
            weights = problem.weights(
                tuner.params, tuner.meta, tasks.Batches(train_set, None, seed)(0)
            )
            row |= {"weights": [weights[train_set.targets == c].mean().item() for c in range(10)]}
        return row | {
            "accuracy": statistics.fmean(accuracies),
            "classes": accuracies,
            "seconds": time.perf_counter() - began,
        }

    def _data(
        self, seed: int, imbalance: float
    ) -> tuple[tasks.Examples, tasks.Examples, tasks.Examples]:
        whole, test = tasks.cifar10(self.data_root)
        validation, rest = tasks.per_class(whole, self.validation, seed)
        train_set = tasks.long_tailed(rest, imbalance, seed, largest=self.largest)
        tasks.check_disjoint(train_set, validation)
        if self.test < 1000:
            test, _ = tasks.per_class(test, self.test, 0)
        parts = [tasks.standardise(part, like=train_set) for part in (train_set, validation, test)]
        a, b, c = (part.to(self.torch_device) for part in parts)
        return a, b, c

    def _problem(self, model: torch.nn.Module, train_set: tasks.Examples) -> TuningProblem:
        variables: dict[str, Variable] = {
            "class-network": WeightNetwork(classes=10),
            "network": WeightNetwork(),
            "classes": ClassWeights(10),
            "examples": ExampleWeights(len(train_set)),
        }
        decay = Proximal(self.decay, center="zero")
        return tuning_problem(model, F.cross_entropy, [variables[self.variable]], penalty=decay)

    def _tuner(self, problem: TuningProblem, flag: str) -> Tuner:
        options = known_options(
            flag, solver_steps=self.solver_steps, rank=self.rank, damping=self.damping
        )
        inner = TorchOptimizer(torch.optim.SGD, steps=self.inner_steps, lr=self.lr, momentum=0.9)
        return Tuner(
            problem.problem,
            problem.meta,
            inner=inner,
            method=make_method(flag, **options),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
            domains=problem.domains,
            schedule=self._cosine,
        )

    def _cosine(self, outer_step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * outer_step * self.inner_steps / self.steps))

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for imbalance in self.imbalance:
            for method in self.methods:
                at = {"method": method, "imbalance": imbalance}
                if not (values := select(rows, "accuracy", **at)):
                    continue
                classes = select(rows, "classes", **at)
                named = {200.0: 0, 100.0: 1, 50.0: 2}.get(imbalance)
                theirs = (
                    SEED_TABLE[method][named] if method in SEED_TABLE and named is not None else "–"
                )
                lines.append([
                    f"{imbalance:g}",
                    f"`{method}`",
                    spread(values, 4),
                    spread([statistics.fmean(c[:3]) for c in classes], 3),
                    spread([statistics.fmean(c[-3:]) for c in classes], 3),
                    theirs,
                    f"{statistics.median(select(rows, 'seconds', **at)):.0f}",
                ])  # fmt: skip
        header = [
            "imbalance",
            "method",
            "balanced test accuracy",
            "first 3 classes",
            "last 3",
            "paper's table",
            "s",
        ]
        return markdown(header, lines)

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        imbalance = self.imbalance[0]
        left, right = figure.subplots(1, 2)
        for i, method in enumerate(self.methods):
            at = {"method": method, "imbalance": imbalance}
            for ax, key in ((left, "classes"), (right, "weights")):
                found = [
                    row[key] for case, row in rows if key in row and at.items() <= case.items()
                ]
                if found:
                    mean = [statistics.fmean(values) for values in zip(*found, strict=True)]
                    ax.plot(range(10), mean, marker="o", markersize=3, color=f"C{i}", label=method)
        left.set(
            title=f"imbalance {imbalance:g}",
            xlabel="class, from frequent to rare",
            ylabel="test accuracy",
        )
        right.set(
            title="learnt weights", xlabel="class, from frequent to rare", ylabel="mean weight"
        )
        left.legend(fontsize=7)
