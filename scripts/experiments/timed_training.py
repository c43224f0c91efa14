"""Training whose steps are timed and whose evaluations are not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.runs import Row
from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient

Pair = tuple[Tensor, Tensor]  # inputs and targets
# "step", "seconds" and "loss": after a step, the loss of all the training examples
History = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """A model and what is minimised.

    Attributes:
        model: The model with its initialisation.
        loss: `(outputs, targets) -> scalar`, the mean over examples.
        test_metric: The same for the test examples.
        batch: The batch of a step, from 0 on.
        train: All the training examples.
        test: All the test examples.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    test_metric: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[int], Pair]
    train: Pair
    test: Pair


def train_on_a_clock(
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    *,
    is_finished: Callable[[int, float], bool],
    next_evaluation: Callable[[int], int],
) -> Row:
    """Train until the budget is spent, or the training loss is not finite.

    The clock counts CPU seconds of the process (wall seconds on CUDA, after waiting for the
    device). It runs during steps, which read their batches, and stands still during evaluations.
    With one thread, CPU seconds do not depend on what else the machine runs.

    Args:
        optimizer: Holds the parameters of the setting's model.
        setting: The model, its loss and its batches.
        is_finished: Given the steps taken and the seconds spent, whether to end.
        next_evaluation: Given the steps taken, those at which to evaluate the loss next.

    Returns:
        A row with the `history`, from step 0 on, and `diverged`: the reason, or None.
    """
    device = setting.train[0].device
    history: History = {"step": [], "seconds": [], "loss": []}
    steps = 0
    seconds = 0.0
    due = 0
    while True:
        finished = is_finished(steps, seconds)
        if finished or steps == due:
            loss = evaluate(setting.loss, setting.model, setting.train)
            if not math.isfinite(loss):
                return {
                    "history": history,
                    "diverged": f"the loss is {loss} after {steps} steps",
                }
            history["step"].append(steps)
            history["seconds"].append(seconds)
            history["loss"].append(loss)
            if finished:
                return {"history": history, "diverged": None}
            due = next_evaluation(steps)
        began = clock(device)
        try:
            take_step(optimizer, setting, steps)
        except FloatingPointError as error:
            return {"history": history, "diverged": str(error)}
        seconds += clock(device) - began
        steps += 1


def take_step(optimizer: torch.optim.Optimizer, setting: Setting, step: int) -> None:
    """One training step, of a first- or of a second-order optimiser."""
    inputs, targets = setting.batch(step)
    if isinstance(optimizer, (GaussNewton, NaturalGradient, KFAC)):
        optimizer.step(lambda: (setting.model(inputs), targets))
        return
    optimizer.zero_grad()
    setting.loss(setting.model(inputs), targets).backward()
    optimizer.step()


@torch.no_grad()
def evaluate(metric: Callable[[Tensor, Tensor], Tensor], model: nn.Module, examples: Pair) -> float:
    """A metric of all examples, whose outputs are computed 1000 at a time."""
    inputs, targets = examples
    outputs = torch.cat([model(part) for part in inputs.split(1000)])
    return metric(outputs, targets).item()


def clock(device: torch.device) -> float:
    """Seconds: of the process on a CPU, of the wall on a CUDA device whose queue is empty."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
