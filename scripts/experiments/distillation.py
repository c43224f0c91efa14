"""Dataset distillation: a few learnt images of each class of MNIST, to train a network from."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from command_line.ranges import Count, InnerSteps, Number, Products, Steps, within
from figures import legend_below
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor, nn

import tasks
from experiments.networks import balanced_accuracy, seeded, train
from experiments.runs import METHOD, Case, Row, Run, Runs, markdown_table, mean, median
from experiments.tuning import TuningExperiment
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.params import Params
from metaimplicit.training import fit_tuner, read_metrics, write_atomically
from metaimplicit.tuning import SyntheticData, TuningProblem

CLASSES = 10
UNSEEN = 10**9  # the first seed of the initialisations for tests, which no outer step uses


class Images(NamedTuple):
    """Images `[n, 1, 28, 28]`, class by class, and their labels `[n]`."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Distillation(TuningExperiment):
    """Test accuracy of a network trained on distilled images of MNIST alone (Wang et al. 2018).

    φ are the images, which start from real ones. The inner loss f is the cross-entropy on them plus
    decay; every hypergradient minimises it from an initialisation. The outer loss g is the
    cross-entropy on a batch of the training set. Images are tested by the same training, from
    initialisations that no outer step used. The baseline `random` are the real images that φ starts
    from; `mean` are the means of equal parts of each class.

    The decay is large because otherwise the inner loop ends far from the argmin in directions that
    no synthetic image determines, and the gradients of the implicit methods are wrong. The size of
    Hataya & Yamada (2023) is --images 5 --network lenet --inner-steps 100 --lr 0.01 with
    an --outer-lr of 0.001.
    """

    images: Count = 1
    """Number of synthetic images of each class."""
    network: Literal["linear", "mlp", "lenet"] = "linear"
    """Network: softmax regression, one hidden layer of 100 units, or LeNet."""
    start: Literal["drawn", "fixed"] = "drawn"
    """Initialisation of the network: drawn for each outer step, or fixed for the whole run."""
    steps: Steps = 100
    """Number of outer steps."""
    inner_steps: InnerSteps = 60
    """Number of gradient steps on the synthetic images for each outer step."""
    lr: Number = 0.02
    """Step size of the gradient steps, which have momentum 0.9."""
    decay: Number = 0.3
    """Strength of the decay, ½ decay ‖θ‖² in the inner loss."""
    batch: Count = 256
    """Number of real images for each outer step."""
    outer_lr: Number = 0.05
    """Step size of Adam on the standardised pixels."""
    solver_steps: Products = 10
    """Number of products of CG, of terms of Neumann's series, of steps that `truncated` keeps."""
    rank: Products = 10
    """Number of columns of Nyström's sketch."""
    rho: Number = 0.1
    """Damping ρ of Nyström."""
    test: Count = 1000
    """Number of test images of each class. From 900 on, all of them are used."""
    trials: Annotated[int, within(1, 1000)] = 5
    """Number of initialisations from which the images are tested."""

    name = "distillation"
    image_set = "mnist"
    baselines = ("random", "mean")
    default_methods = (*baselines, "unrolled", "truncated", "cg", "neumann", "nystrom", "t1-t2")
    quick_options: ClassVar[dict[str, Any]] = {
        "method": ("random", "unrolled", "cg"),
        "steps": 3,
        "inner_steps": 3,
        "batch": 20,
        "solver_steps": 2,
        "rank": 2,
        "test": 10,
        "trials": 1,
    }

    def method_options(self, flag: str) -> dict[str, Any]:
        """The options of the solvers. The step of `t1-t2` is a gradient step of the inner loop."""
        return {
            "solver_steps": self.solver_steps,
            "rank": self.rank,
            "rho": self.rho,
            "scale": self.lr if flag == "t1-t2" else None,
        }

    def run(self, case: Case, out: Path) -> Row:
        """Learn the images of a case and test them; leave them as images.png."""
        method, seed = case["method"], case["seed"]
        whole, test = self.data()
        images = class_means(whole, self.images) if method == "mean" else self.real(whole, seed)
        row: Row = {}
        if method not in self.baselines:
            tuner = self.tuner(self.problem(images, seed), method)
            fit_tuner(
                tuner,
                self.training_batches(images, seed),
                tasks.Batches(whole, min(self.batch, len(whole)), seed),
                out=out,
                identity=self.data_digests,
                steps=self.steps,
                resume=True,
            )
            images = images._replace(inputs=tuner.meta["synthetic"])
            row["curve"] = [
                [line["step"], line["loss"], line["inner_gradient_norm"]]
                for line in read_metrics(out)
            ]

        figure = Figure(figsize=(CLASSES, self.images), layout="constrained")
        draw_images(figure, images.inputs)
        write_atomically(out / "images.png", lambda file: figure.savefig(file, dpi=60))
        first = balanced_accuracy(self.trained(images, self.start_seed(seed, 0)), test)
        unseen = [
            balanced_accuracy(self.trained(images, start), test)
            for start in range(UNSEEN, UNSEEN + self.trials)
        ]
        return row | {"accuracy": statistics.fmean(unseen), "first": first}

    def data(self) -> tuple[tasks.Examples, tasks.Examples]:
        """The training and the test set, standardised."""
        whole, test = tasks.mnist(self.data_root)
        if self.test < 900:  # the rarest digit has 892 test images
            test, _ = tasks.per_class(test, self.test, 0)
        train_set = tasks.standardise(whole).to(self.torch_device)
        return train_set, tasks.standardise(test, like=whole).to(self.torch_device)

    def real(self, examples: tasks.Examples, seed: int) -> Images:
        """Images of every class, drawn at random."""
        drawn, _ = tasks.per_class(examples, self.images, seed)
        order = drawn.targets.argsort(stable=True)
        return Images(drawn.inputs[order], class_labels(self.images, examples))

    def problem(self, images: Images, seed: int) -> TuningProblem:
        """Training on the images, from the initialisation that a batch names by its `start`."""
        model = self.initialised(self.start_seed(seed, 0)).to(images.inputs)
        tuned = tuning_problem(
            model,
            F.cross_entropy,
            [SyntheticData(images.inputs, images.labels)],
            penalty=Proximal(self.decay, center="zero"),
        )

        def init(meta: Params, batch: dict[str, Any]) -> Params:
            network = self.initialised(batch["start"]).to(images.inputs)
            return {name: p.detach() for name, p in network.named_parameters()}

        return tuned._replace(problem=replace(tuned.problem, init=init))

    def training_batches(self, images: Images, seed: int) -> Callable[[int], dict[str, Any]]:
        """The batches of the inner loops. φ takes the place of their images.

        The `start` of a batch is the seed of its outer step's initialisation. An outer step has a
        batch for each inner step, and one for the curvature.
        """
        batch = {"inputs": images.inputs, "targets": images.labels}
        return lambda i: batch | {"start": self.start_seed(seed, i // (self.inner_steps + 1))}

    def start_seed(self, seed: int, outer_step: int) -> int:
        """The seed of the initialisation of an outer step."""
        return 1000 * seed + (outer_step if self.start == "drawn" else 0)

    def initialised(self, seed: int) -> nn.Sequential:
        """The network with an initialisation that depends on `seed` alone."""
        with seeded(seed):
            match self.network:
                case "linear":
                    return nn.Sequential(nn.Flatten(), nn.Linear(784, CLASSES))
                case "mlp":
                    hidden = nn.Linear(784, 100)
                    return nn.Sequential(nn.Flatten(), hidden, nn.Tanh(), nn.Linear(100, CLASSES))
            return nn.Sequential(
                nn.Conv2d(1, 6, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 16, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(400, 120),
                nn.ReLU(),
                nn.Linear(120, 84),
                nn.ReLU(),
                nn.Linear(84, CLASSES),
            )

    def tuner(self, problem: TuningProblem, flag: str) -> Tuner:
        """A tuner of the images. Each of its inner loops starts from an initialisation."""
        return self.make_tuner(
            problem,
            flag,
            inner=TorchOptimizer(torch.optim.SGD, steps=self.inner_steps, lr=self.lr, momentum=0.9),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
            warm_start=False,
        )

    def trained(self, images: Images, start: int) -> nn.Module:
        """The network after the inner loop's steps, from the initialisation of seed `start`."""
        model = self.initialised(start).to(images.inputs)
        sgd = torch.optim.SGD(
            model.parameters(),
            lr=self.lr,
            momentum=0.9,
            weight_decay=self.decay,
        )
        batch = {"inputs": images.inputs, "targets": images.labels}
        train(model, lambda step: batch, steps=self.inner_steps, optimizer=sgd)
        return model

    def table(self, runs: Runs) -> str:
        """A line for each method."""
        columns = {
            "method": METHOD,
            "balanced test accuracy, %": mean("accuracy", scale=100),
            "from the first initialisation, %": mean("first", scale=100),
            "s": median("seconds"),
        }
        return markdown_table(columns, runs.groups("method"))

    def plot(self, runs: Runs, figure: Figure) -> None:
        """The outer loss against outer steps, and the images of each method, of seed 0."""
        shown = runs.where(seed=0)
        grid = figure.add_gridspec(len(shown), 2)
        left = figure.add_subplot(grid[:, 0])
        for case, row in shown:
            if "curve" in row:
                steps, losses, _ = zip(*row["curve"], strict=True)
                left.plot(steps, losses, label=case["method"], linewidth=0.8)
        left.set(
            xlabel="outer steps",
            ylabel="cross-entropy of real images",
            yscale="log",
        )
        legend_below(left, columns=3)
        for place, run in enumerate(shown):
            self.plot_images(figure, grid[place, 1], run)

    def plot_images(self, figure: Figure, place: Any, run: Run) -> None:
        """Show the images that a run left at a place of the figure's grid."""
        ax = figure.add_subplot(place)
        ax.imshow(imread(self.case_folder(run.case) / "images.png"))
        ax.set_title(run.case["method"], fontsize=7)
        ax.axis("off")


def class_labels(images: int, examples: tasks.Examples) -> Tensor:
    """Labels of as many images of each class, class by class, on the device of the examples."""
    classes = torch.arange(CLASSES, device=examples.targets.device)
    return classes.repeat_interleave(images)


def class_means(examples: tasks.Examples, images: int) -> Images:
    """The means of as many parts of each class, cut in the order of its examples."""
    means = []
    for c in range(CLASSES):
        parts = examples.inputs[examples.targets == c].chunk(images)
        means += [part.mean(0) for part in parts]
    return Images(torch.stack(means), class_labels(images, examples))


def draw_images(figure: Figure, images: Tensor) -> None:
    """A column for each class. Each image is scaled from its darkest to its brightest pixel."""
    rows = len(images) // CLASSES
    for i, image in enumerate(images.detach().cpu()):
        column, row = divmod(i, rows)
        ax = figure.add_subplot(rows, CLASSES, row * CLASSES + column + 1)
        ax.imshow(image[0].numpy(), cmap="gray")
        ax.axis("off")
