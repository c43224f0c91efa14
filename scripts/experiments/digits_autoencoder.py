"""An autoencoder of 8×8 digits, by first- and by second-order optimisers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from command_line import require_package
from command_line.ranges import Number, Numbers, Products, within
from torch import Tensor, nn

import tasks
from experiments.networks import seeded
from experiments.optimizer_comparison import OptimizerComparison
from experiments.runs import Case
from experiments.tabular_data import scikit_learn_set
from experiments.timed_training import Pair, Setting
from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient
from metaimplicit.solvers import CG

LAYERS = (64, 15, 15, 15, 15, 10, 15, 15, 15, 15, 64)
SOLVE_BY_CG = ("gauss-newton", "natural-gradient")


@dataclass(frozen=True)
class DigitsAutoencoder(OptimizerComparison):
    """Training loss ½ Σ (z − y)² of a 64-15-15-15-15-10-15-15-15-15-64 network on digits.

    The digits are scikit-learn's, with pixels in [0, 1]. Units are tanh, the code and the outputs
    are linear. Weights are uniform after Glorot & Bengio (2010), biases are zero, and all methods
    start from the same ones. `gauss-newton` solves for (G + λI)⁻¹∇L by CG, with λ after Levenberg
    and Marquardt. For this loss the exact Fisher matrix is G, so `natural-gradient` takes the
    Fisher matrix of targets drawn from the model, one for each image.
    """

    seconds: Annotated[float, within(1e-3, 1_000_000)] = 6.0
    """Seconds of each run, of its steps alone."""
    cg_seconds: Annotated[float, within(1e-3, 1_000_000)] = 24.0
    """Seconds of `gauss-newton` and `natural-gradient`, which solve by CG and take fewer steps."""
    images: Annotated[int, within(1, 1796)] = 1000
    """Number of training images out of 1797. The others are the test set."""
    batch: Annotated[int | None, within(1, 1796)] = None
    """Number of images in a step. If it is not given, a step sees all training images."""
    products: Products = 100
    """Largest number of CG steps of `gauss-newton` and `natural-gradient`."""
    sgd: Numbers = (0.03, 0.1, 0.3)
    """Step sizes to try for `sgd`."""
    momentum: Numbers = (0.01, 0.03, 0.1)
    """Step sizes to try for SGD with momentum 0.9."""
    adam: Numbers = (0.003, 0.01, 0.03)
    """Step sizes to try for `adam`."""
    gauss_newton: Numbers = (1.0,)
    """Step lengths to try for `gauss-newton`."""
    natural_gradient: Numbers = (1.0,)
    """Step lengths to try for `natural-gradient`."""
    kfac: Numbers = (0.1, 0.3, 1.0)
    """Step sizes to try for `kfac`."""
    damping: Number = 0.01
    """Damping λ of `kfac`. For `gauss-newton` and `natural-gradient` it is the λ to start from."""
    kl_clip: Number = 0.01
    """Bound κ on the step of `kfac`."""

    name = "digits-autoencoder"
    default_methods = ("sgd", "momentum", "adam", "gauss-newton", "natural-gradient", "kfac")
    case_options = ("sgd", "momentum", "adam", "gauss_newton", "natural_gradient", "kfac")
    quick_options: ClassVar[dict[str, Any]] = {
        "seconds": 0.03,
        "cg_seconds": 0.03,
        "images": 50,
        "products": 2,
    }
    metric_name = "test loss"
    metric_digits = 4

    def check_options(self) -> None:
        """Raise ValueError for sizes out of range, ImportError without scikit-learn."""
        super().check_options()
        require_package("sklearn", purpose=self.name, extra="tune")
        self.check_range("batch", high=self.images)

    def batch_description(self) -> str:
        """What a step sees."""
        return "all the images" if self.batch is None else f"{self.batch} images each"

    def is_finished(self, case: Case, steps: int, seconds: float) -> bool:
        """Whether the seconds of the method have passed."""
        return seconds >= (self.cg_seconds if case["method"] in SOLVE_BY_CG else self.seconds)

    def next_evaluation(self, steps: int) -> int:
        """After 2 % more steps, at least one."""
        return steps + 1 + steps // 50

    def setting(self, seed: int) -> Setting:
        """The autoencoder, and the digits in an order that the seed draws."""
        whole = scikit_learn_set("digits")
        random = tasks.examples.random_stream(seed, "digits")
        order = torch.from_numpy(random.permutation(len(whole)))
        pixels = (whole.inputs[order] / 16).float().to(self.torch_device)
        train = pixels[: self.images]
        test = pixels[self.images :]
        labels = whole.targets[order[: self.images]].to(train.device)
        batches = tasks.Batches(tasks.Examples(train, labels), self.batch, seed)

        def batch(step: int) -> Pair:
            inputs = batches(step)["inputs"]
            return inputs, inputs

        return Setting(
            model=autoencoder(seed).to(self.torch_device),
            loss=half_squares,
            test_metric=half_squares,
            batch=batch,
            train=(train, train),
            test=(test, test),
        )

    def optimizer(self, case: Case, setting: Setting) -> torch.optim.Optimizer:
        """The optimiser of a case."""
        model = setting.model
        loss = setting.loss
        lr = case["lr"]
        damping = self.damping
        cg = CG(max_steps=self.products, tol=1e-3)
        match case["method"]:
            case "sgd":
                return torch.optim.SGD(model.parameters(), lr)
            case "momentum":
                return torch.optim.SGD(model.parameters(), lr, momentum=0.9)
            case "adam":
                return torch.optim.Adam(model.parameters(), lr)
            case "gauss-newton":
                return GaussNewton(model, loss, lr=lr, damping=damping, solver=cg)
            case "natural-gradient":
                return NaturalGradient(
                    model,
                    loss,
                    lr=lr,
                    damping=damping,
                    solver=cg,
                    likelihood="gaussian",
                    expectation="monte-carlo",
                    seed=case["seed"],
                )
        return KFAC(
            model,
            loss,
            lr=lr,
            damping=damping,
            kl_clip=self.kl_clip,
            likelihood="gaussian",
            seed=case["seed"],
        )


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """½ Σ_k (z_k − y_k)², the mean over examples; both `[n, features]`."""
    return 0.5 * (outputs - targets).square().sum(-1).mean()


def autoencoder(seed: int) -> nn.Sequential:
    """Linear layers of the sizes `LAYERS`, each with tanh but for the code and the outputs."""
    layers: list[nn.Module] = []
    code = min(LAYERS)
    outputs = LAYERS[-1]
    with seeded(seed):
        for inputs, width in pairwise(LAYERS):
            linear = nn.Linear(inputs, width)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if width not in (code, outputs):
                layers.append(nn.Tanh())
    return nn.Sequential(*layers)
