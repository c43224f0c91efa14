"""Processes that share the tasks of every batch, and take the same steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from metaimplicit.learner.episodes import Episode, EpisodeBatch
from metaimplicit.learner.few_shot_model import FewShotModel
from metaimplicit.learner.forms import read_episodes
from metaimplicit.learner.results import Step
from metaimplicit.normalization import tracked_layers
from metaimplicit.plain_state import load_plain
from metaimplicit.task_axis import count_tasks, map_tensors, task_of

Value = TypeVar("Value")
Numbers = dict[str, float | None]


class LostRanksError(RuntimeError):
    """Another process ended, or cannot be reached.

    Example:
        >>> issubclass(LostRanksError, RuntimeError)
        True
    """


@dataclass(frozen=True)
class Ranks:
    """The processes of torch's default process group, which share the tasks of every batch.

        ∇ = Σ_r n_r ∇_r / Σ_r n_r, with the mean meta-gradient ∇_r of the n_r tasks of rank r.

    This is the meta-gradient of one process that has all tasks, up to round-off. Each process holds
    the whole learner. Its parameters stay the same to the bit if they begin so: every process
    builds the learner from one seed, or takes `ranks.from_first(learner.state_dict)`.

    Random numbers that all tasks of a batch share, such as the sketch of Nyström's method, do not
    depend on the number of processes, if each has the same seed and all tasks one size. Those that
    each task draws for itself do: dropout, and the samples of a Monte-Carlo Fisher matrix. Where
    layers track running statistics, the tasks of a process are normalised among themselves.

    Args:
        rank: The number of this process, from 0 on.
        count: The number of processes. If 1, nothing is sent.

    Example:
        >>> from metaimplicit import MetaLearner
        >>> learner = MetaLearner(torch.nn.Linear(2, 3), torch.nn.functional.cross_entropy)
        >>> pair = (torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))  # 4 tasks
        >>> ranks = Ranks.of_group()  # in each process, which draws the same batches
        >>> share = ranks.share({"support": pair, "query": pair})
        >>> step = ranks.average(learner, learner.backward(share))
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_group(cls) -> Ranks:
        """The processes of the default group, or this one alone if there is no group.

        Example:
            >>> Ranks.of_group()
            Ranks(rank=0, count=1)
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, episodes: EpisodeBatch) -> EpisodeBatch:
        """The tasks of this process: as many as others have, or one more or less.

        Args:
            episodes: A batch of tasks in any form that `MetaLearner.backward` takes. It is the same
                in every process.

        Raises:
            ValueError: There are fewer tasks than processes.

        Example:
            >>> pair = (torch.zeros(5, 3, 2), torch.zeros(5, 3))
            >>> [len(Ranks(rank, 2).share((pair, pair)).query.targets) for rank in (0, 1)]
            [2, 3]
        """
        if self.count == 1:
            return episodes
        groups = read_episodes(episodes)
        tasks = len(groups) if len(groups) > 1 else count_tasks(groups[0])
        if tasks < self.count:
            raise ValueError(
                f"episodes: got {tasks} tasks for {self.count} processes, expected at least one "
                "for each; draw larger batches, or start fewer processes"
            )
        start, stop = (rank * tasks // self.count for rank in (self.rank, self.rank + 1))
        if len(groups) > 1:  # of one task each
            return [task_of(group, 0) for group in groups[start:stop]]
        own: Episode = map_tensors(lambda x: x[start:stop], groups[0])
        return own

    def average(self, learner: FewShotModel, step: Step) -> Step:
        """Replace `.grad` by ∇, and return the step with the mean loss and accuracy of all tasks.

        One message is sent, with all gradients. Running statistics are averaged as well. To be
        called once after `backward` on `share`, in every process, before the optimiser's step. The
        report, hooks of parameters, and gradients in data remain those of the process's own tasks.

        Args:
            learner: The learner.
            step: What its `backward` returned.

        Raises:
            LostRanksError: Another process ended.
        """
        if self.count == 1:
            return step
        statistics = [b for layer in tracked_layers(learner).values() for b in layer.buffers()]
        held = [p.grad for p in learner.parameters() if p.grad is not None]
        held += [buffer for buffer in statistics if buffer.is_floating_point()]
        known = step.loss.new_zeros(()) if step.accuracy is None else step.accuracy
        missing = step.loss.new_tensor(step.accuracy is None)
        measured = [step.loss, known, missing]
        tasks = len(step.report.inner_steps)
        with torch.no_grad():
            means = self._weighted_means([*held, *measured], tasks)
            for tensor, mean in zip(held, means, strict=False):
                tensor.copy_(mean)
        loss, accuracy, missing = means[len(held) :]
        return replace(step, loss=loss, accuracy=None if bool(missing > 0) else accuracy)

    def means(self, numbers: Mapping[str, float | None], tasks: int) -> Numbers:
        """The means of numbers by name, weighted by the tasks of each process.

        A number that is None in one process is None, as if that process had all tasks.

        Raises:
            LostRanksError: Another process ended.

        Example:
            >>> Ranks().means({"loss": 0.5, "accuracy": None}, tasks=4)
            {'loss': 0.5, 'accuracy': None}
        """
        if self.count == 1 or not numbers:
            return dict(numbers)
        own = torch.tensor(
            [(0.0, 1.0) if x is None else (x, 0.0) for x in numbers.values()],
            dtype=torch.float64,
            device=_device(),
        )
        (means,) = self._weighted_means([own], tasks)
        pairs = zip(numbers, means.tolist(), strict=True)
        return {name: None if missing else mean for name, (mean, missing) in pairs}

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes, on which they can agree.

        Raises:
            LostRanksError: Another process ended.

        Example:
            >>> Ranks().largest(0.5, 3)
            [0.5, 3]
        """
        if self.count == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=_device())
        with _explained():
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
            largest: list[float] = values.tolist()
        return largest

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What a function returns in the first process, which alone calls it.

        Args:
            make: Returns plain containers of tensors, numbers and strings. The others get them on
                the CPU.

        Raises:
            LostRanksError: The function raised an error. Its own is raised in the first process.

        Example:
            >>> Ranks().from_first(lambda: {"step": 3})
            {'step': 3}
        """
        if self.count == 1:
            return make()
        message: list[bytes | None] = [None]
        try:
            if self.rank == 0:
                value = make()
                message = [_to_bytes(value)]
        finally:
            with _explained():
                distributed.broadcast_object_list(message, src=0)
        if self.rank == 0:
            return value
        if message[0] is None:
            raise LostRanksError("ranks: the first process failed, whose error says why")
        received: Value = load_plain(message[0], "cpu")
        return received

    def _weighted_means(self, tensors: Sequence[Tensor], tasks: int) -> list[Tensor]:
        """Σ_r n_r x_r / Σ_r n_r of each tensor, by one sum over all processes."""
        dtype = reduce(torch.promote_types, [x.dtype for x in tensors], torch.float32)
        one = torch.ones(1, dtype=dtype, device=tensors[0].device)
        flat = torch.cat([*(x.detach().flatten().to(dtype) for x in tensors), one]) * tasks
        with _explained():
            distributed.all_reduce(flat)
        *sums, _ = (flat / flat[-1]).split([*(x.numel() for x in tensors), 1])
        return [s.view_as(x).to(x.dtype) for s, x in zip(sums, tensors, strict=True)]


@contextmanager
def _explained() -> Iterator[None]:
    """Say of an error of torch's that processes are lost."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise LostRanksError(
            f"ranks: lost another process ({reason}), expected it to take every step; it was "
            "killed, or its own error says why; a run continues with --resume"
        ) from error


def _device() -> torch.device:
    """Where the backend of the default group takes tensors."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
