"""Data reweighting: weights of long-tailed CIFAR-10, learnt on a balanced validation set."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from command_line.ranges import Count, InnerSteps, Number, Numbers, Products, Steps, within
from figures import shared_legend_below
from matplotlib.figure import Figure
from torch import nn

import tasks
from experiments.networks import (
    Split,
    class_accuracies,
    conv_net,
    joined,
    parameter_count,
    train,
)
from experiments.runs import (
    METHOD,
    Case,
    Row,
    Runs,
    case_value,
    markdown_table,
    mean,
    median,
    spread,
)
from experiments.tuning import TuningExperiment
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.training import fit_tuner
from metaimplicit.tuning import ClassWeights, ExampleWeights, TuningProblem, Variable, WeightNetwork

# Test accuracy in the table of Hataya & Yamada (2023), which does not name its model.
PAPER_ACCURACY = {
    (200.0, "none"): "0.62 ± 0.06",
    (200.0, "cg"): "0.63 ± 0.06",
    (200.0, "neumann"): "0.60 ± 0.09",
    (200.0, "nystrom"): "0.66 ± 0.02",
    (100.0, "none"): "0.67 ± 0.13",
    (100.0, "cg"): "0.70 ± 0.05",
    (100.0, "neumann"): "0.73 ± 0.01",
    (100.0, "nystrom"): "0.73 ± 0.02",
    (50.0, "none"): "0.74 ± 0.08",
    (50.0, "cg"): "0.78 ± 0.02",
    (50.0, "neumann"): "0.79 ± 0.01",
    (50.0, "nystrom"): "0.79 ± 0.01",
}


@dataclass(frozen=True)
class Reweighting(TuningExperiment):
    """Balanced test accuracy of a convolutional network on long-tailed CIFAR-10.

    The inner loss f is the weighted cross-entropy of a training batch plus decay. The outer loss g
    is the cross-entropy of a balanced validation batch of other images. The baseline `none` has no
    weights; `none+validation` has none either, and also trains on the validation set. The size of
    the paper is --largest 5000 --filters 64 128 256 --steps 20000.
    """

    imbalance: Numbers = (100.0,)
    """Size of the largest class over that of the smallest class."""
    variable: Literal["classes", "class-network", "network", "examples"] = "classes"
    """What weighs an example: its class, a network of its loss (and class), or its own weight."""
    largest: Count = 1000
    """Number of training images of the largest class."""
    validation: Count = 30
    """Number of validation images of each class."""
    test: Count = 1000
    """Number of test images of each class."""
    filters: Annotated[tuple[int, ...], within(1, 4096)] = (16, 32, 64)
    """Channels of the convolutions."""
    steps: Steps = 2000
    """Number of training steps in all."""
    inner_steps: InnerSteps = 20
    """Number of training steps for each hypergradient."""
    batch: Count = 64
    """Number of images in a training batch, and in a validation batch."""
    lr: Number = 0.05
    """Step size of SGD with momentum 0.9. It decreases to 0 along a cosine."""
    decay: Number = 5e-4
    """Strength of the decay, ½ decay ‖θ‖² in the training loss."""
    outer_lr: Number = 0.05
    """Step size of Adam on the parameters of the weights."""
    solver_steps: Products = 10
    """Number of products of CG, and of terms of Neumann's series."""
    rank: Products = 10
    """Number of columns of Nyström's sketch."""
    damping: Number = 0.1
    """Multiple of the identity added to the Gauss–Newton matrix. It includes Nyström's ρ."""

    name = "reweighting"
    image_set = "cifar10"
    baselines = ("none", "none+validation")
    default_methods = (*baselines, "cg", "neumann", "nystrom", "nystrom-cg")
    case_options = ("imbalance",)
    quick_options: ClassVar[dict[str, Any]] = {
        "method": ("none", "cg", "nystrom"),
        "largest": 100,
        "validation": 5,
        "test": 20,
        "filters": (8, 8),
        "steps": 6,
        "inner_steps": 2,
        "batch": 16,
        "solver_steps": 2,
        "rank": 2,
    }

    def check_options(self) -> None:
        """Raise ValueError for sizes out of range."""
        super().check_options()
        self.check_range("inner_steps", high=self.steps)
        for imbalance in self.imbalance:
            tasks.long_tailed_counts(self.largest, 10, imbalance)

    def cases(self) -> list[Case]:
        """Every method for every seed, at one imbalance after the other."""
        cases = super().cases()
        return [case | {"imbalance": value} for value in self.imbalance for case in cases]

    def method_options(self, flag: str) -> dict[str, Any]:
        """The options of the solvers."""
        return {"solver_steps": self.solver_steps, "rank": self.rank, "damping": self.damping}

    def run(self, case: Case, out: Path) -> Row:
        """Train, with learnt weights or without. A tuner's row has the mean weights of classes."""
        seed = case["seed"]
        split = self.data(seed, case["imbalance"])
        train_set = split.train
        if case["method"] == "none+validation":
            train_set = joined(split.train, split.validation)
        batches = tasks.Batches(train_set, min(self.batch, len(train_set)), seed)
        model = conv_net(
            3,
            10,
            filters=self.filters,
            seed=seed,
        ).to(self.torch_device)
        row: Row = {"examples": len(train_set), "parameters": parameter_count(model)}

        if case["method"] in self.baselines:
            self.train_without_weights(model, batches)
            accuracies = class_accuracies(model, split.test)
        else:
            problem = self.problem(model, len(train_set))
            tuner = self.tuner(problem, case["method"])
            size = min(self.batch, len(split.validation))
            fit_tuner(
                tuner,
                batches,
                tasks.Batches(split.validation, size, seed + 1),
                out=out,
                identity=self.data_digests,
                steps=self.steps // self.inner_steps,
                resume=True,
            )
            accuracies = class_accuracies(model, split.test, tuner.params)
            whole = tasks.Batches(train_set, None, seed)(0)
            weights = problem.weights(tuner.params, tuner.meta, whole)
            row["weights"] = [weights[train_set.targets == c].mean().item() for c in range(10)]
        return row | {"accuracy": statistics.fmean(accuracies), "classes": accuracies}

    def data(self, seed: int, imbalance: float) -> Split:
        """A long-tailed training set, a balanced validation set of other images, the test set."""
        whole, test = tasks.cifar10(self.data_root)
        validation, others = tasks.per_class(whole, self.validation, seed)
        train_set = tasks.long_tailed(
            others,
            imbalance,
            seed,
            largest=self.largest,
        )
        tasks.check_disjoint(train_set, validation)
        if self.test < 1000:
            test, _ = tasks.per_class(test, self.test, 0)
        return Split(train_set, validation, test).standardised(self.torch_device)

    def problem(self, model: nn.Module, examples: int) -> TuningProblem:
        """The bilevel problem whose φ gives the training examples their weights."""
        variables: dict[str, Variable] = {
            "class-network": WeightNetwork(classes=10),
            "network": WeightNetwork(),
            "classes": ClassWeights(10),
            "examples": ExampleWeights(examples),
        }
        decay = Proximal(self.decay, center="zero")
        return tuning_problem(
            model,
            F.cross_entropy,
            [variables[self.variable]],
            penalty=decay,
        )

    def tuner(self, problem: TuningProblem, flag: str) -> Tuner:
        """A tuner that goes on with the training at each outer step."""
        return self.make_tuner(
            problem,
            flag,
            inner=TorchOptimizer(
                torch.optim.SGD,
                steps=self.inner_steps,
                lr=self.lr,
                momentum=0.9,
            ),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
            schedule=self.cosine,
        )

    def train_without_weights(self, model: nn.Module, batches: tasks.Batches) -> None:
        """Take the steps of the tuner's inner loops, with all weights 1."""
        sgd = torch.optim.SGD(
            model.parameters(),
            lr=self.lr,
            momentum=0.9,
            weight_decay=self.decay,
        )
        train(
            model,
            batches,
            steps=self.steps,
            optimizer=sgd,
            schedule=lambda step: self.cosine(step // self.inner_steps),
        )

    def cosine(self, outer_step: int) -> float:
        """The factor on the step size, from 1 at the start to 0 at the end."""
        return 0.5 * (1 + math.cos(math.pi * outer_step * self.inner_steps / self.steps))

    def table(self, runs: Runs) -> str:
        """A line for each imbalance and method."""
        columns = {
            "imbalance": case_value("imbalance", "{:g}"),
            "method": METHOD,
            "balanced test accuracy": mean("accuracy", 4),
            "first 3 classes": lambda runs: mean_of_classes(runs, slice(3)),
            "last 3 classes": lambda runs: mean_of_classes(runs, slice(-3, None)),
            "the paper's accuracy": paper_accuracy,
            "s": median("seconds"),
        }
        return markdown_table(columns, runs.groups("imbalance", "method"))

    def plot(self, runs: Runs, figure: Figure) -> None:
        """Accuracy and learnt weight of each class, at the first imbalance, means over seeds."""
        imbalance = self.imbalance[0]
        left, right = figure.subplots(1, 2)
        for i, (case, group) in enumerate(runs.where(imbalance=imbalance).groups("method")):
            style = {"marker": "o", "markersize": 3, "color": f"C{i}", "label": case["method"]}
            for ax, key in ((left, "classes"), (right, "weights")):
                if values := group.values(key):
                    means = [statistics.fmean(seeds) for seeds in zip(*values, strict=True)]
                    ax.plot(means, **style)
        left.set(title=f"imbalance {imbalance:g}", ylabel="test accuracy")
        right.set(title="learnt weights", ylabel="mean weight")
        for ax in (left, right):
            ax.set(xlabel="class, from frequent to rare", xticks=range(10))
        shared_legend_below(figure)


def mean_of_classes(runs: Runs, classes: slice) -> str:
    """A cell with the mean accuracy over some of the classes."""
    accuracies = [statistics.fmean(values[classes]) for values in runs.values("classes")]
    return spread(accuracies, 3)


def paper_accuracy(runs: Runs) -> str:
    """A cell with the paper's accuracy for the imbalance and the method, or a dash."""
    case = runs[0].case
    return PAPER_ACCURACY.get((case["imbalance"], case["method"]), "–")
