"""Training by SGD whose step size and momentum are φ: its data, hypergradients and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tasks
from metaimplicit import FromMeta, GradientDescent, hypergradient
from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.hypergradient import Hypergradient
from metaimplicit.iterate import Iterate
from metaimplicit.problem import Stream
from metaimplicit.tuning import TuningProblem

LOOP = GradientDescent(lr=FromMeta("lr"), momentum=FromMeta("momentum"))
MEBIBYTE = 2**20
Batch = dict[str, Tensor]


class Data(NamedTuple):
    """The batch of a training step, from 0 on; the validation set as a batch; the test set."""

    batches: Callable[[int], Batch]
    validation: Batch
    test: tasks.Examples

    def batches_from(self, first: int) -> Callable[[int], Batch]:
        """The batches of the training steps from `first` on."""
        return lambda step: self.batches(first + step)

    def stream(self, first: int, steps: int) -> Stream:
        """The data of an inner loop that takes the training steps from `first` on.

        The outer loss, at step `steps` of the stream, sees the validation set.
        """
        return Stream(lambda t: self.batches(first + t) if t < steps else self.validation)

    def double(self) -> Data:
        """The same batches with inputs in float64."""

        def double(batch: Batch) -> Batch:
            return batch | {"inputs": batch["inputs"].double()}

        return Data(lambda i: double(self.batches(i)), double(self.validation), self.test)


def loop_hypergradient(
    problem: TuningProblem,
    data: Data,
    method: str,
    *,
    steps: int,
    first: int = 0,
    start: Iterate | None = None,
) -> Hypergradient:
    """The hypergradient in φ = (lr, momentum) of one inner loop.

    Args:
        problem: θ* is the end of `LOOP`, which reads lr and momentum from its meta-parameters.
        data: Training batches and the validation set.
        method: Flag of the method.
        steps: Number of training steps of the loop.
        first: Number of the first training step.
        start: Where the loop starts. If None, it starts from the initialisation.
    """
    return hypergradient(
        problem.problem,
        problem.meta,
        data.stream(first, steps),
        inner=LOOP.updated(steps=steps),
        method=method,
        start=start,
    )


def hypergradient_in_pieces(
    problem: TuningProblem, data: Data, method: str, *, steps: int, piece: int
) -> Tensor:
    """The hypergradient, `[2]`, after `steps` training steps taken in inner loops of `piece` steps.

    Each loop starts where the one before it ended. With `real-time`, which carries the derivative
    from loop to loop, the result does not depend on `piece`.
    """
    end = None
    for first in range(0, steps, piece):
        result = loop_hypergradient(
            problem,
            data,
            method,
            steps=piece,
            first=first,
            start=end,
        )
        end = result.end
    return torch.stack([result.grads["lr"], result.grads["momentum"]])


def peak_of_loop(problem: TuningProblem, data: Data, method: str, *, steps: int) -> float:
    """The peak MiB of live tensors in one inner loop and its hypergradient."""
    with LiveBytes() as live:
        loop_hypergradient(problem, data, method, steps=steps)
    peak: float = live.peak / MEBIBYTE
    return peak


def live_tensor_bytes() -> int:
    """The bytes of the storages of all tensors that Python's garbage collector tracks."""
    gc.collect()
    # A tensor of another type may have no memory, as those that torch's compiler traces with.
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
