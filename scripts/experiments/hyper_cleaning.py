"""Data hyper-cleaning: MNIST with wrong labels, found by a weight for each example learnt on a clean validation set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import tasks
from experiments.base import Case, Experiment, Row, markdown, select, spread
from experiments.networks import class_accuracies, joined, seeded, train
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.methods import known_options, make_method
from metaimplicit.params import Params
from metaimplicit.training import fit_tuner, read_metrics
from metaimplicit.tuning import ExampleWeights, Interval

START = 0.5  # of every weight
THRESHOLD = START / 2  # an example whose weight ends below is called mislabelled


@dataclass(frozen=True)
class HyperCleaning(Experiment):
    """Mislabelled examples of MNIST found, and a network's balanced test accuracy (Franceschi et al. 2017, §5.1).

    f is the weighted cross-entropy of the training set plus decay, g the cross-entropy of the validation set. A weight
    in (0, 1) for each training example starts at 0.5; one that ends below 0.25 marks its label as wrong. `retrained` is
    plain training on the examples that are left and the validation set. Baselines, trained for as many steps: `none`,
    the corrupted set; `none+validation`, both sets; `clean`, an oracle, the corrupted examples left out;
    `clean+validation`. The paper, from random splits of the same sizes: none+validation 87.74 %, clean+validation
    90.46 %, retrained about 90.0 %, F1 about 0.92.
    """

    training: int = 500
    """Training images of each class."""
    validation: int = 500
    """Validation images of each class."""
    share: float = 0.5
    """Of training labels that are wrong."""
    hidden: int = 0
    """Units of a hidden layer; 0, softmax regression."""
    steps: int = 40
    """Outer steps."""
    inner_steps: int = 10
    """Gradient steps on the whole training set for each."""
    lr: float = 0.01
    """Of the gradient steps, with momentum 0.9."""
    decay: float = 1e-2
    """½ decay ‖θ‖² is part of the training loss."""
    outer_lr: float = 0.2
    """Adam's, on the weights' logits."""
    solver_steps: int = 10
    """Products of CG, terms of Neumann, steps that `truncated` keeps."""
    rank: int = 10
    """Columns of Nyström."""
    rho: float = 0.1
    """Nyström's damping."""
    penalty: float = 10.0
    """λ of F2SA."""

    name: ClassVar[str] = "hyper-cleaning"
    baselines: ClassVar[tuple[str, ...]] = ("none", "none+validation", "clean", "clean+validation")
    compared: ClassVar[tuple[str, ...]] = (
        *baselines, "cg", "neumann", "nystrom", "nystrom-cg", "soba", "t1-t2", "sama", "f2sa", "truncated"
    )  # fmt: skip

    def quickened(self) -> HyperCleaning:
        return replace(
            self, method=self.method or ("none", "clean+validation", "cg", "nystrom"), seeds=1, training=10,
            validation=10, steps=10, inner_steps=2, solver_steps=3, rank=3,
        )  # fmt: skip

    def run(self, case: Case, out: Path) -> Row:
        began, method, seed = time.perf_counter(), case["method"], case["seed"]
        train_set, wrong, validation, test = self.data(seed)
        model = self._network(seed)
        if method in self.baselines:
            kept = train_set.take(~wrong) if method.startswith("clean") else train_set
            row = self._trained(model, joined(kept, validation) if "+" in method else kept, test)
        else:
            tuner = self._tuner(model, len(train_set), method)

            def missed(params: Params, meta: Params) -> float:
                return 1 - detection(meta["example_weights"] < THRESHOLD, wrong)["f1"]

            whole = tasks.Batches(train_set, None, seed), tasks.Batches(validation, None, seed)
            fit_tuner(tuner, *whole, out=out, steps=self.steps, metric=missed, resume=True)
            measured = [line for line in read_metrics(out) if line["split"] == "validation"]
            weights = tuner.meta["example_weights"]
            retrained = joined(train_set.take(weights >= THRESHOLD), validation)
            row = detection(weights < THRESHOLD, wrong) | {
                "accuracy": statistics.fmean(class_accuracies(model, test, tuner.params)),
                "retrained": self._trained(self._network(seed), retrained, test)["accuracy"],
                "curve": [[line["step"], 1 - line["metric"]] for line in measured],
                "histogram": {
                    name: torch.histc(weights[mask].cpu().float(), 20, 0, 1).tolist()
                    for name, mask in (("right", ~wrong), ("wrong", wrong))
                },
            }
        return row | {"seconds": time.perf_counter() - began}

    def data(self, seed: int) -> tuple[tasks.Examples, Tensor, tasks.Examples, tasks.Examples]:
        """The corrupted training set, which of its labels are wrong, the validation and the test set."""
        whole, test = tasks.mnist(self.data_root)
        validation, rest = tasks.per_class(whole, self.validation, seed)
        clean, _ = tasks.per_class(rest, self.training, seed)
        tasks.check_disjoint(clean, validation)
        train_set, wrong = tasks.corrupt_labels(clean, self.share, seed)
        parts = [tasks.standardise(part, like=clean) for part in (train_set, validation, test)]
        a, b, c = (part.to(self.torch_device) for part in parts)
        return a, wrong.to(self.torch_device), b, c

    def _network(self, seed: int) -> nn.Sequential:
        with seeded(seed):
            hidden = [nn.Linear(784, self.hidden), nn.Tanh()] if self.hidden else []
            return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(self.hidden or 784, 10)).to(
                self.torch_device
            )

    def _trained(self, model: nn.Module, examples: tasks.Examples, test: tasks.Examples) -> Row:
        """As many steps as the tuner takes inner ones, with its decay."""
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.decay)
        train(model, tasks.Batches(examples, None, 0), self.steps * self.inner_steps, sgd)
        return {
            "examples": len(examples),
            "accuracy": statistics.fmean(class_accuracies(model, test)),
        }

    def _tuner(self, model: nn.Module, count: int, flag: str) -> Tuner:
        weights = ExampleWeights(count, start=START, domain=Interval(0, 1))
        problem = tuning_problem(
            model, F.cross_entropy, [weights], penalty=Proximal(self.decay, center="zero")
        )
        options = known_options(
            flag,
            solver_steps=self.solver_steps,
            rank=self.rank,
            rho=self.rho,
            scale=self.lr if flag == "t1-t2" else None,
            penalty=self.penalty,
        )
        return Tuner(
            problem.problem,
            problem.meta,
            inner=TorchOptimizer(torch.optim.SGD, steps=self.inner_steps, lr=self.lr, momentum=0.9),
            method=make_method(flag, **options),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
            domains=problem.domains,
        )

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for method in self.methods:
            of_method = [(case, row) for case, row in rows if case["method"] == method]
            cells = [
                spread([scale * row[key] for _, row in of_method if key in row], digits)
                for key, scale, digits in (
                    ("f1", 1, 3), ("precision", 1, 3), ("recall", 1, 3), ("accuracy", 100, 2), ("retrained", 100, 2)
                )
            ]  # fmt: skip
            lines.append(
                [f"`{method}`", *cells, f"{statistics.median(select(of_method, 'seconds')):.0f}"]
            )
        return markdown(
            [
                "method",
                "F1",
                "precision",
                "recall",
                "balanced test accuracy, %",
                "retrained, %",
                "s",
            ],
            lines,
        )

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        tuned = [(case, row) for case, row in rows if case["method"] not in self.baselines]
        for case, row in tuned:
            if case["seed"] == 0:
                right.plot(*zip(*row["curve"], strict=True), label=case["method"])
        for name, counts in tuned[0][1]["histogram"].items() if tuned else ():
            left.stairs(
                counts,
                torch.linspace(0, 1, len(counts) + 1).tolist(),
                fill=True,
                alpha=0.5,
                label=name,
            )
            left.set(
                title=f"labels, {tuned[0][0]['method']}", xlabel="learnt weight", ylabel="examples"
            )
            left.axvline(THRESHOLD, color="black", linewidth=0.8, linestyle=":")
            left.legend(fontsize=7)
            right.legend(fontsize=7)
        right.set(title="mislabelled examples found", xlabel="outer step", ylabel="F1", ylim=(0, 1))


def detection(found: Tensor, wrong: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of the examples found mislabelled, both bool `[n]`; 0 where nothing right was found."""
    hits = int((found & wrong).sum())
    precision, recall = hits / max(int(found.sum()), 1), hits / max(int(wrong.sum()), 1)
    return {
        "f1": 2 * hits / max(int(found.sum() + wrong.sum()), 1),
        "precision": precision,
        "recall": recall,
    }
