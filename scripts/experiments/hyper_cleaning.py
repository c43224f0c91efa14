"""Data hyper-cleaning: weights of mislabelled MNIST, learnt on a clean validation set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from command_line.ranges import Count, InnerSteps, Number, Products, Share, Steps, within
from figures import legend_below, panels
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import tasks
from experiments.networks import Split, balanced_accuracy, joined, seeded, train
from experiments.runs import METHOD, Case, Row, Run, Runs, markdown_table, mean, median
from experiments.tuning import TuningExperiment
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.params import Params
from metaimplicit.training import fit_tuner, read_metrics
from metaimplicit.tuning import ExampleWeights, Interval

START = 0.5  # of every weight
THRESHOLD = START / 2  # a weight below it marks the label as wrong


@dataclass(frozen=True)
class HyperCleaning(TuningExperiment):
    """Detection of wrong labels on MNIST, and test accuracy (Franceschi et al. 2017, §5.1).

    The inner loss f is the weighted cross-entropy of the training set plus decay; the outer loss g
    is the cross-entropy of the validation set. Each training example has a weight in (0, 1), which
    starts at 0.5. A weight that ends below 0.25 marks the label as wrong. The column `retrained` is
    plain training on the examples that are left and the validation set. Baselines train without
    weights for as many steps: `none` on the corrupted set, `clean` on its examples with right
    labels; `none+validation` and `clean+validation` add the validation set. The paper reports, for
    random splits of the same sizes, 87.74 % for none+validation, 90.46 % for clean+validation,
    about 90.0 % for retrained, and an F1 of about 0.92.
    """

    training: Count = 500
    """Number of training images of each class."""
    validation: Count = 500
    """Number of validation images of each class."""
    share: Share = 0.5
    """Share of the training labels that are wrong."""
    hidden: Annotated[int, within(0, 65_536)] = 0
    """Number of units of a hidden layer. With 0 there is none: softmax regression."""
    steps: Steps = 40
    """Number of outer steps."""
    inner_steps: InnerSteps = 10
    """Number of gradient steps on the whole training set for each outer step."""
    lr: Number = 0.01
    """Step size of the gradient steps, which have momentum 0.9."""
    decay: Number = 1e-2
    """Strength of the decay, ½ decay ‖θ‖² in the training loss."""
    outer_lr: Number = 0.2
    """Step size of Adam on the logits of the weights."""
    solver_steps: Products = 10
    """Number of products of CG, of terms of Neumann's series, of steps that `truncated` keeps."""
    rank: Products = 10
    """Number of columns of Nyström's sketch."""
    rho: Number = 0.1
    """Damping ρ of Nyström."""
    penalty: Number = 10.0
    """Penalty λ of F2SA."""

    name = "hyper-cleaning"
    image_set = "mnist"
    baselines = ("none", "none+validation", "clean", "clean+validation")
    default_methods = (
        *baselines,
        "cg",
        "neumann",
        "nystrom",
        "nystrom-cg",
        "soba",
        "t1-t2",
        "sama",
        "f2sa",
        "truncated",
    )
    quick_options: ClassVar[dict[str, Any]] = {
        "method": ("none", "clean+validation", "cg", "nystrom"),
        "training": 10,
        "validation": 10,
        "steps": 10,
        "inner_steps": 2,
        "solver_steps": 3,
        "rank": 3,
    }

    def check_options(self) -> None:
        """Raise ValueError if a baseline has no example."""
        super().check_options()
        clean = [method for method in self.methods if method.startswith("clean")]
        if self.share == 1 and clean:
            raise ValueError(
                f"--share: got {self.share:g} with --method {clean[0]}, which trains on the right "
                "labels, expected less than 1; or leave that method out"
            )

    def method_options(self, flag: str) -> dict[str, Any]:
        """The options of the solvers. The step of `t1-t2` is a gradient step of the inner loop."""
        return {
            "solver_steps": self.solver_steps,
            "rank": self.rank,
            "rho": self.rho,
            "scale": self.lr if flag == "t1-t2" else None,
            "penalty": self.penalty,
        }

    def run(self, case: Case, out: Path) -> Row:
        """Train a baseline, or learn the weights and compare them with the wrong labels."""
        method, seed = case["method"], case["seed"]
        split, wrong = self.data(seed)
        if method in self.baselines:
            examples = split.train.take(~wrong) if method.startswith("clean") else split.train
            if method.endswith("+validation"):
                examples = joined(examples, split.validation)
            accuracy = self.train_without_weights(examples, split.test, seed)
            return {"examples": len(examples), "accuracy": accuracy}

        def undetected(params: Params, meta: Params) -> float:
            return 1 - detection(meta["example_weights"] < THRESHOLD, wrong)["f1"]

        model = self.network(seed)
        tuner = self.tuner(model, len(split.train), method)
        fit_tuner(
            tuner,
            tasks.Batches(split.train, None, seed),
            tasks.Batches(split.validation, None, seed),
            out=out,
            identity=self.data_digests,
            steps=self.steps,
            metric=undetected,
            resume=True,
        )
        measured = [line for line in read_metrics(out) if line["split"] == "validation"]
        weights = tuner.meta["example_weights"]
        kept = weights >= THRESHOLD
        remaining = split.validation
        if kept.any():
            remaining = joined(split.train.take(kept), split.validation)
        return detection(weights < THRESHOLD, wrong) | {
            "accuracy": balanced_accuracy(model, split.test, tuner.params),
            "retrained": self.train_without_weights(remaining, split.test, seed),
            "curve": [[line["step"], 1 - line["metric"]] for line in measured],
            "histogram": {
                "right": histogram(weights[~wrong]),
                "wrong": histogram(weights[wrong]),
            },
        }

    def data(self, seed: int) -> tuple[Split, Tensor]:
        """The three sets, and which training labels are wrong, bool `[n]`."""
        whole, test = tasks.mnist(self.data_root)
        validation, others = tasks.per_class(whole, self.validation, seed)
        clean, _ = tasks.per_class(others, self.training, seed)
        tasks.check_disjoint(clean, validation)
        train_set, wrong = tasks.corrupt_labels(clean, self.share, seed)
        split = Split(train_set, validation, test).standardised(self.torch_device)
        return split, wrong.to(self.torch_device)

    def network(self, seed: int) -> nn.Sequential:
        """Softmax regression, or a network with one hidden layer of tanh units."""
        layers: list[nn.Module] = [nn.Flatten()]
        with seeded(seed):
            if self.hidden:
                layers += [nn.Linear(784, self.hidden), nn.Tanh()]
            layers.append(nn.Linear(self.hidden or 784, 10))
        return nn.Sequential(*layers).to(self.torch_device)

    def tuner(self, model: nn.Module, examples: int, flag: str) -> Tuner:
        """A tuner of one weight for each training example."""
        weights = ExampleWeights(examples, start=START, domain=Interval(0, 1))
        decay = Proximal(self.decay, center="zero")
        return self.make_tuner(
            tuning_problem(model, F.cross_entropy, [weights], penalty=decay),
            flag,
            inner=TorchOptimizer(
                torch.optim.SGD,
                steps=self.inner_steps,
                lr=self.lr,
                momentum=0.9,
            ),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
        )

    def train_without_weights(
        self, examples: tasks.Examples, test: tasks.Examples, seed: int
    ) -> float:
        """The test accuracy after as many steps as a tuner takes inner steps, with its decay."""
        model = self.network(seed)
        sgd = torch.optim.SGD(
            model.parameters(),
            lr=self.lr,
            momentum=0.9,
            weight_decay=self.decay,
        )
        steps = self.steps * self.inner_steps
        train(model, tasks.Batches(examples, None, 0), steps=steps, optimizer=sgd)
        return balanced_accuracy(model, test)

    def table(self, runs: Runs) -> str:
        """A line for each method."""
        columns = {
            "method": METHOD,
            "F1": mean("f1", 3),
            "precision": mean("precision", 3),
            "recall": mean("recall", 3),
            "balanced test accuracy, %": mean("accuracy", scale=100),
            "retrained, %": mean("retrained", scale=100),
            "s": median("seconds"),
        }
        return markdown_table(columns, runs.groups("method"))

    def plot(self, runs: Runs, figure: Figure) -> None:
        """The weights that the first method learnt; F1 against outer steps; both of seed 0."""
        tuned = [run for run in runs.where(seed=0) if run.case["method"] not in self.baselines]
        groups = panels(tuned)
        figure.set_size_inches(4 * (1 + len(groups)), 4)
        left, *others = figure.subplots(1, 1 + len(groups), squeeze=False)[0]
        if tuned:
            plot_histogram(left, tuned[0])
        for ax, group in zip(others, groups, strict=True):
            for case, row in group:
                ax.plot(*zip(*row["curve"], strict=True), label=case["method"])
            ax.set(title="detection of wrong labels", xlabel="outer steps")
            ax.set(ylabel="F1", ylim=(0, 1))
            legend_below(ax)


def histogram(weights: Tensor) -> list[float]:
    """The numbers of weights in 20 equal intervals of [0, 1]."""
    return torch.histc(weights.cpu().float(), bins=20, min=0, max=1).tolist()


def plot_histogram(ax: Axes, run: Run) -> None:
    """The weights that a run learnt, of examples with right and with wrong labels."""
    for name, counts in run.row["histogram"].items():
        edges = torch.linspace(0, 1, len(counts) + 1).tolist()
        ax.stairs(counts, edges, fill=True, alpha=0.5, label=f"{name} labels")
    ax.axvline(
        THRESHOLD,
        color="black",
        linewidth=0.8,
        linestyle=":",
        label="threshold",
    )
    ax.set(
        title=f"weights by {run.case['method']}",
        xlabel="learnt weight",
        ylabel="examples",
    )
    legend_below(ax, columns=3)


def detection(marked: Tensor, wrong: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of the examples marked as wrong.

    Args:
        marked: Which labels were marked as wrong, bool `[n]`.
        wrong: Which labels are wrong, bool `[n]`.

    Returns:
        The three numbers. Each is 0 if no wrong label was marked.

    Example:
        >>> detection(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        {'f1': 0.6666666666666666, 'precision': 0.5, 'recall': 1.0}
    """
    hits = int((marked & wrong).sum())
    count_marked = int(marked.sum())
    count_wrong = int(wrong.sum())
    return {
        "f1": 2 * hits / max(count_marked + count_wrong, 1),
        "precision": hits / max(count_marked, 1),
        "recall": hits / max(count_wrong, 1),
    }
