"""Dataset distillation: MNIST in a few learnt images a class, from which a network is trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor, nn

import tasks
from experiments.base import Case, Experiment, Row, markdown, select, spread
from experiments.networks import class_accuracies, seeded, train
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.methods import known_options, make_method
from metaimplicit.params import Params
from metaimplicit.training import fit_tuner, read_metrics, write_atomically
from metaimplicit.tuning import SyntheticData, TuningProblem

CLASSES = 10
FRESH = 10**9  # first of the seeds of initialisations that no outer step has seen


@dataclass(frozen=True)
class Distillation(Experiment):
    """Balanced test accuracy of a network trained on distilled images of MNIST alone (Wang et al. 2018).

    φ are the images, from real ones on; f is the cross-entropy on them plus decay, minimised anew from an
    initialisation for every hypergradient; g is the cross-entropy on a batch of the training set. Tested by the same
    training, from initialisations that no outer step has seen. Baselines: `random`, where φ starts, and `mean`, the
    means of as many parts of each class. Hataya & Yamada's size: --images 5 --network lenet --inner-steps 100 --lr 0.01
    --outer-lr 0.001.
    """

    images: int = 1
    """Synthetic images of each class."""
    network: Literal["linear", "mlp", "lenet"] = "linear"
    """Softmax regression; one hidden layer of 100; two convolutions of 5×5 and three linear layers."""
    start: Literal["drawn", "fixed"] = "drawn"
    """The initialisation of the network: drawn anew at every outer step, or one for the whole run."""
    steps: int = 100
    """Outer steps."""
    inner_steps: int = 60
    """Gradient steps on the synthetic images for each."""
    lr: float = 0.02
    """Of the gradient steps, with momentum 0.9."""
    decay: float = 0.3
    """½ decay ‖θ‖² is part of the inner loss: large, or else the inner loop ends far from the argmin where no synthetic
    image reaches, and the implicit methods' gradients are wrong."""
    batch: int = 256
    """Real images for each outer step."""
    outer_lr: float = 0.05
    """Adam's, on standardised pixels."""
    solver_steps: int = 10
    """Products of CG, terms of Neumann, steps that `truncated` keeps."""
    rank: int = 10
    """Columns of Nyström."""
    rho: float = 0.1
    """Nyström's damping."""
    test: int = 1000
    """Test images of each class, at most; below 900, drawn."""
    trials: int = 5
    """Initialisations that images are tested from."""

    name: ClassVar[str] = "distillation"
    baselines: ClassVar[tuple[str, ...]] = ("random", "mean")
    compared: ClassVar[tuple[str, ...]] = (
        *baselines,
        "unrolled",
        "truncated",
        "cg",
        "neumann",
        "nystrom",
        "t1-t2",
    )

    def quickened(self) -> Distillation:
        return replace(
            self, method=self.method or ("random", "unrolled", "cg"), seeds=1, steps=3, inner_steps=3, batch=20,
            solver_steps=2, rank=2, test=10, trials=1,
        )  # fmt: skip

    def run(self, case: Case, out: Path) -> Row:
        began, method, seed = time.perf_counter(), case["method"], case["seed"]
        whole, test = self.data()
        images, labels = self.real(whole, seed, mean=method == "mean")
        row: Row = {}
        if method not in self.baselines:
            tuner = self._tuner(self.problem(images, labels, seed), method)
            judge = tasks.Batches(whole, min(self.batch, len(whole)), seed)
            starts = self.starts(images, labels, seed)
            fit_tuner(tuner, starts, judge, out=out, steps=self.steps, resume=True)
            losses = [
                [line[key] for key in ("step", "loss", "inner_gradient_norm")]
                for line in read_metrics(out)
            ]
            images, row = tuner.meta["synthetic"], {"curve": losses}
        accuracies = [
            statistics.fmean(class_accuracies(self._trained(images, labels, start), test))
            for start in (self._start(seed, 0), *range(FRESH, FRESH + self.trials))
        ]
        figure = Figure(figsize=(CLASSES, self.images), layout="constrained")
        draw(figure, images)
        write_atomically(out / "images.png", lambda file: figure.savefig(file, dpi=60))
        return row | {
            "accuracy": statistics.fmean(accuracies[1:]),
            "first": accuracies[0],
            "seconds": time.perf_counter() - began,
        }

    def data(self) -> tuple[tasks.Examples, tasks.Examples]:
        """The training and the test set, standardised."""
        whole, test = tasks.mnist(self.data_root)
        if self.test < 900:  # the rarest digit has 892 test images
            test, _ = tasks.per_class(test, self.test, 0)
        a, b = (tasks.standardise(part, like=whole).to(self.torch_device) for part in (whole, test))
        return a, b

    def real(
        self, examples: tasks.Examples, seed: int, mean: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Images of every class, class by class, and their labels: drawn ones, or means of as many parts of a class."""
        labels = torch.arange(CLASSES, device=examples.targets.device).repeat_interleave(
            self.images
        )
        if mean:
            of_class = [
                examples.inputs[examples.targets == c].chunk(self.images) for c in range(CLASSES)
            ]
            return torch.stack([part.mean(0) for parts in of_class for part in parts]), labels
        drawn, _ = tasks.per_class(examples, self.images, seed)
        return drawn.inputs[drawn.targets.argsort(stable=True)], labels

    def problem(self, images: Tensor, labels: Tensor, seed: int) -> TuningProblem:
        """Training on the images from the initialisation that a batch names, judged on real ones."""
        model = self._network(self._start(seed, 0)).to(images)
        found = tuning_problem(
            model,
            F.cross_entropy,
            [SyntheticData(images, labels)],
            penalty=Proximal(self.decay, center="zero"),
        )

        def init(meta: Params, batch: dict[str, Any]) -> Params:
            drawn = self._network(batch["start"]).to(images)
            return {name: p.detach() for name, p in drawn.named_parameters()}

        return found._replace(problem=replace(found.problem, init=init))

    def starts(self, images: Tensor, labels: Tensor, seed: int) -> Callable[[int], dict[str, Any]]:
        """Training batches: φ takes the place of the images; `start` is the initialisation of the outer step."""
        batch = {"inputs": images, "targets": labels}
        return lambda i: batch | {"start": self._start(seed, i // (self.inner_steps + 1))}

    def _start(self, seed: int, step: int) -> int:
        return 1000 * seed + (step if self.start == "drawn" else 0)

    def _network(self, seed: int) -> nn.Sequential:
        with seeded(seed):
            if self.network == "linear":
                return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))
            if self.network == "mlp":
                return nn.Sequential(
                    nn.Flatten(), nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, CLASSES)
                )
            return nn.Sequential(
                nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
                nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
                nn.Linear(84, CLASSES),
            )  # fmt: skip

    def _tuner(self, problem: TuningProblem, flag: str) -> Tuner:
        options = known_options(
            flag,
            solver_steps=self.solver_steps,
            rank=self.rank,
            rho=self.rho,
            scale=self.lr if flag == "t1-t2" else None,
        )
        return Tuner(
            problem.problem,
            problem.meta,
            inner=TorchOptimizer(torch.optim.SGD, steps=self.inner_steps, lr=self.lr, momentum=0.9),
            method=make_method(flag, **options),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
            warm_start=False,
        )

    def _trained(self, images: Tensor, labels: Tensor, start: int) -> nn.Module:
        """The inner loop by torch alone."""
        model = self._network(start).to(images)
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.decay)
        train(model, lambda i: {"inputs": images, "targets": labels}, self.inner_steps, sgd)
        return model

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for method in self.methods:
            accuracy, first, seconds = (
                select(rows, key, method=method) for key in ("accuracy", "first", "seconds")
            )
            lines.append([
                f"`{method}`",
                spread([100 * x for x in accuracy]),
                spread([100 * x for x in first]),
                f"{statistics.median(seconds):.0f}",
            ])  # fmt: skip
        return markdown(
            ["method", "balanced test accuracy, %", "from the first initialisation, %", "s"], lines
        )

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        shown = [case for case, _ in rows if case["seed"] == 0]
        grid = figure.add_gridspec(len(shown), 2)
        left = figure.add_subplot(grid[:, 0])
        for case, row in rows:
            if "curve" in row and case["seed"] == 0:
                left.plot(
                    *list(zip(*row["curve"], strict=True))[:2], label=case["method"], linewidth=0.8
                )
        if left.lines:
            left.legend(fontsize=7)
        left.set(xlabel="outer step", ylabel="cross-entropy of real images", yscale="log")
        for place, case in enumerate(shown):
            ax = figure.add_subplot(grid[place, 1])
            ax.imshow(
                imread(self.folder / "-".join(str(part) for part in case.values()) / "images.png")
            )
            ax.set_title(case["method"], fontsize=7)
            ax.axis("off")


def draw(figure: Figure, images: Tensor) -> None:
    """A column for each class, each image from its darkest pixel to its brightest."""
    rows = len(images) // CLASSES
    for place, image in enumerate(images.detach().cpu()):
        column, row = divmod(place, rows)
        ax = figure.add_subplot(rows, CLASSES, row * CLASSES + column + 1)
        ax.imshow(image[0].numpy(), cmap="gray")
        ax.axis("off")
