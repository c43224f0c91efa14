"""What a level of a tower of optimisers costs.

The candidates take training steps in turn in one process, and each step is timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from experiments.cifar_tower import resnet20
from experiments.networks import seeded
from torch import Tensor, nn

from metaimplicit.tuning.hyperoptimizers import SGD, Adam, Hyperoptimizer, Level

Step = Callable[[], float]  # takes a training step; returns the seconds that its optimiser took
Batch = tuple[Tensor, Tensor]
BASELINE = "forward and backward"


@dataclass
class Times:
    """The seconds of every step of a candidate, and those of its optimiser alone."""

    whole: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """The median time of a step."""
        return 1000 * statistics.median(self.whole)

    @property
    def optimizer_milliseconds(self) -> float:
        """The median time of the optimiser in a step."""
        return 1000 * statistics.median(self.optimizer)


def time_in_turn(
    candidates: dict[str, Step], rounds: int, warm_up_rounds: int = 3
) -> dict[str, Times]:
    """Time one step of each candidate in every round, so that drifts of speed affect all alike.

    Args:
        candidates: The step of each candidate.
        rounds: The number of rounds that count.
        warm_up_rounds: The number of rounds before them, which do not count.
    """
    times = {name: Times() for name in candidates}
    gc.collect()
    for i in range(warm_up_rounds + rounds):
        for name, step in candidates.items():
            start = time.perf_counter()
            optimizer = step()
            whole = time.perf_counter() - start
            if i >= warm_up_rounds:
                times[name].whole.append(whole)
                times[name].optimizer.append(optimizer)
    return times


def training_step(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None = None
) -> Step:
    """The ordinary training step. Without an optimiser, only forward and backward."""

    def step() -> float:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        start = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
        return time.perf_counter() - start

    return step


def published_step(model: nn.Module, batch: Batch, optimizer: Any) -> Step:
    """The same by gradient-descent-the-ultimate-optimizer, without `create_graph=True`.

    That package does not need the option.
    """
    from gradient_descent_the_ultimate_optimizer import gdtuo

    wrapped = gdtuo.ModuleWrapper(model, optimizer=optimizer)
    wrapped.initialize()

    def step() -> float:
        wrapped.begin()
        loss = F.cross_entropy(wrapped.forward(batch[0]), batch[1])
        wrapped.zero_grad()
        loss.backward()
        start = time.perf_counter()
        wrapped.step()
        return time.perf_counter() - start

    return step


def perceptron(rounds: int = 600) -> str:
    """The optimiser's part of a step of a 784-128-10 network on batches of 256.

    It is the time of the whole step without that of forward and backward, for torch's optimisers,
    for towers, and for those of the published package.
    """
    times = time_in_turn(_perceptron_candidates(), rounds)
    baseline = times[BASELINE]
    lines = [f"{'784-128-10, batch 256':<22} {'ms a step':>9} {'optimiser, ms':>13}"]
    parts = {}
    for name, candidate in times.items():
        pairs = zip(candidate.whole, baseline.whole, strict=True)
        parts[name] = 1000 * statistics.median(whole - base for whole, base in pairs)
        lines.append(f"{name:<22} {candidate.milliseconds:>9.3f} {parts[name]:>13.3f}")
    for name in ("SGD/SGD", "Adam/SGD"):
        ratio = parts[name] / parts[f"{name}, published"]
        lines.append(f"{name}: {ratio:.2f} of the published package's part")
    return "\n".join(lines)


def _perceptron_candidates() -> dict[str, Step]:
    from gradient_descent_the_ultimate_optimizer import gdtuo

    with seeded(0):
        batch = (torch.rand(256, 784), torch.randint(10, (256,)))

    def new_model() -> nn.Module:
        with seeded(0):
            return nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))

    def tower_step(tower: Level) -> Step:
        model = new_model()
        return training_step(model, batch, Hyperoptimizer(model.parameters(), tower))

    def torch_step(optimizer: Callable[..., torch.optim.Optimizer]) -> Step:
        model = new_model()
        return training_step(model, batch, optimizer(model.parameters(), lr=1e-3))

    published_sgd = gdtuo.SGD(0.01, optimizer=gdtuo.SGD(1e-5))
    published_adam = gdtuo.Adam(optimizer=gdtuo.SGD(1e-5))
    return {
        BASELINE: training_step(new_model(), batch),
        "torch SGD": torch_step(torch.optim.SGD),
        "torch Adam": torch_step(torch.optim.Adam),
        "SGD": tower_step(SGD(0.01)),
        "SGD/SGD": tower_step(SGD(0.01, optimizer=SGD(1e-5))),
        "SGD/SGD, published": published_step(new_model(), batch, published_sgd),
        "Adam": tower_step(Adam()),
        "Adam/SGD": tower_step(Adam(optimizer=SGD(1e-5))),
        "Adam/SGD, published": published_step(new_model(), batch, published_adam),
    }


def residual_network(rounds: int = 25, batch_size: int = 128) -> str:
    """A training step of ResNet-20 on 32×32 images, by towers of SGD with momentum.

    The table has each height's time over that of height 0, and the cost of a level.
    """
    with seeded(0):
        batch = (
            torch.randn(
                batch_size,
                3,
                32,
                32,
            ),
            torch.randint(10, (batch_size,)),
        )
    model = resnet20(0)
    sgd = torch.optim.SGD(
        model.parameters(),
        0.01,
        momentum=0.9,
        weight_decay=1e-4,
    )
    candidates = {"torch SGD": training_step(model, batch, sgd)}
    for height in range(4):
        model = resnet20(0)
        tower = Hyperoptimizer(model.parameters(), _tower(height))
        candidates[f"height {height}"] = training_step(model, batch, tower)
    times = time_in_turn(candidates, rounds, warm_up_rounds=2)

    baseline = times["height 0"]
    title = f"ResNet-20, batch {batch_size}"
    lines = [f"{title:<22} {'ms a step':>9} {'optimiser, ms':>13} {'over height 0, %':>17}"]
    for name, candidate in times.items():
        pairs = zip(candidate.whole, baseline.whole, strict=True)
        overhead = 100 * statistics.median(whole / base - 1 for whole, base in pairs)
        whole = candidate.milliseconds
        part = candidate.optimizer_milliseconds
        lines.append(f"{name:<22} {whole:>9.1f} {part:>13.2f} {overhead:>17.2f}")

    lowest = baseline.optimizer_milliseconds
    highest = times["height 3"].optimizer_milliseconds
    share = 100 * (highest - lowest) / 3 / baseline.milliseconds
    lines.append(f"a level, by the optimiser's own time: {share:.2f} % of a step")
    return "\n".join(lines)


def _tower(height: int) -> Level:
    above: Level | None = None
    for _ in range(height):
        # Towers multiply products of gradients, which are large here.
        above = SGD(1e-12, optimizer=above)
    return SGD(0.01, momentum=0.9, weight_decay=1e-4, optimizer=above)
