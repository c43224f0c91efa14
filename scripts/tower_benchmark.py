"""What a level of a tower costs: candidates take training steps in turn, in one process, and are timed each by each."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from experiments.cifar_tower import resnet20
from experiments.networks import seeded
from torch import Tensor, nn

from metaimplicit.tuning.hyperoptimizers import SGD, Adam, Hyperoptimizer, Level

Step = Callable[[], float]  # takes a training step; returns the seconds that its optimiser took


def in_turn(
    candidates: dict[str, Step], rounds: int, warm: int = 3
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, `whole` and `optimizer`, one of each candidate a round."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"whole": [], "optimizer": []} for name in candidates
    }
    gc.collect()
    for i in range(warm + rounds):
        for name, step in candidates.items():
            began = time.perf_counter()
            optimizer = step()
            whole = time.perf_counter() - began
            if i >= warm:
                found[name]["whole"].append(whole)
                found[name]["optimizer"].append(optimizer)
    return found


def stepping(
    model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer | None
) -> Step:
    """The ordinary training step; without an optimiser, forward and backward alone."""

    def step() -> float:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        began = time.perf_counter()
        if optimizer is not None:
            optimizer.step()
        return time.perf_counter() - began

    return step


def published(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: Any) -> Step:
    """The same by gradient-descent-the-ultimate-optimizer, without `create_graph=True`, which it does not need."""
    from gradient_descent_the_ultimate_optimizer import gdtuo

    wrapped = gdtuo.ModuleWrapper(model, optimizer=optimizer)
    wrapped.initialize()

    def step() -> float:
        wrapped.begin()
        loss = F.cross_entropy(wrapped.forward(batch[0]), batch[1])
        wrapped.zero_grad()
        loss.backward()
        began = time.perf_counter()
        wrapped.step()
        return time.perf_counter() - began

    return step


def perceptron(rounds: int = 600) -> str:
    """784-128-10 on batches of 256: the optimiser's part, forward and backward taken off, beside the package's."""
    from gradient_descent_the_ultimate_optimizer import gdtuo

    with seeded(0):
        batch = torch.rand(256, 784), torch.randint(10, (256,))

    def model() -> nn.Module:
        with seeded(0):
            return nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))

    def ours(tower: Level) -> Step:
        made = model()
        return stepping(made, batch, Hyperoptimizer(made.parameters(), tower))

    def torchs(kind: Callable[..., torch.optim.Optimizer]) -> Step:
        made = model()
        return stepping(made, batch, kind(made.parameters(), lr=1e-3))

    found = in_turn(
        {
            "forward and backward": stepping(model(), batch, None),
            "torch SGD": torchs(torch.optim.SGD),
            "torch Adam": torchs(torch.optim.Adam),
            "SGD": ours(SGD(0.01)),
            "SGD/SGD": ours(SGD(0.01, optimizer=SGD(1e-5))),
            "SGD/SGD, published": published(
                model(), batch, gdtuo.SGD(0.01, optimizer=gdtuo.SGD(1e-5))
            ),
            "Adam": ours(Adam()),
            "Adam/SGD": ours(Adam(optimizer=SGD(1e-5))),
            "Adam/SGD, published": published(model(), batch, gdtuo.Adam(optimizer=gdtuo.SGD(1e-5))),
        },
        rounds,
    )
    base = found["forward and backward"]["whole"]
    lines = [f"{'784-128-10, batch 256':<22} {'ms a step':>9} {'optimiser, ms':>13}"]
    parts = {}
    for name, times in found.items():
        parts[name] = 1000 * statistics.median(
            a - b for a, b in zip(times["whole"], base, strict=True)
        )
        lines.append(
            f"{name:<22} {1000 * statistics.median(times['whole']):>9.3f} {parts[name]:>13.3f}"
        )
    for name in ("SGD/SGD", "Adam/SGD"):
        lines.append(
            f"{name}: {parts[name] / parts[f'{name}, published']:.2f} of the published package's part"
        )
    return "\n".join(lines)


def residual_network(rounds: int = 25, batch_size: int = 128) -> str:
    """ResNet-20 on 32×32 images: a whole training step by towers of SGD with momentum, over that of no tower."""
    with seeded(0):
        batch = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    candidates: dict[str, Step] = {}
    for height in range(4):
        above = None
        for _ in range(height):
            above = SGD(
                1e-12, optimizer=above
            )  # towers multiply products of gradients, large ones here
        model = resnet20(0)
        tower = SGD(0.01, momentum=0.9, weight_decay=1e-4, optimizer=above)
        candidates[f"height {height}"] = stepping(
            model, batch, Hyperoptimizer(model.parameters(), tower)
        )
    model = resnet20(0)
    plain = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    found = in_turn({"torch SGD": stepping(model, batch, plain), **candidates}, rounds, warm=2)
    base = found["height 0"]
    lines = [
        f"{f'ResNet-20, batch {batch_size}':<22} {'ms a step':>9} {'optimiser, ms':>13} {'over height 0, %':>17}"
    ]
    for name, times in found.items():
        over = statistics.median(
            a / b - 1 for a, b in zip(times["whole"], base["whole"], strict=True)
        )
        whole, part = (1000 * statistics.median(times[key]) for key in ("whole", "optimizer"))
        lines.append(f"{name:<22} {whole:>9.1f} {part:>13.2f} {100 * over:>17.2f}")
    first, last = (statistics.median(found[f"height {h}"]["optimizer"]) for h in (0, 3))
    share = 100 * (last - first) / 3 / statistics.median(base["whole"])
    return "\n".join([*lines, f"a level, by the optimiser's own time: {share:.2f} % of a step"])
