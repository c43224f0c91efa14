"""What the training loop leaves in the folder of a run, and takes from it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from metaimplicit.learner import MetaLearner, Ranks
from metaimplicit.training.checkpoint import load_checkpoint, save_checkpoint
from metaimplicit.training.log import RunLog, Values
from metaimplicit.training.progress import Budget, Progress
from metaimplicit.training.rotation import Identity
from metaimplicit.training.run_folder import RunFolder
from metaimplicit.training.run_state import Resumable, collect_state, restore_state


class RunRecord:
    """The checkpoints and metrics of a run. Use it as a context manager.

    Of several processes, the first one alone reads and writes. The others begin with the state of
    the learner, the optimiser, the sampler and the random generators that the first one has.

    Args:
        out: The run's folder.
        learner: The learner.
        optimizer: The optimiser of its parameters.
        sampler: The stream of training episodes.
        budget: When the run ends.
        ranks: The processes.
        config: As for `RunFolder`.
        identity: As for `RunFolder`.
        resume: Whether to continue from the checkpoint in `out`, if there is one.
        bar: Whether to show how far the run is.

    Attributes:
        progress: How far the run is.
    """

    progress: Progress

    def __init__(
        self,
        out: Path,
        learner: MetaLearner,
        optimizer: torch.optim.Optimizer,
        *,
        sampler: Resumable,
        budget: Budget,
        ranks: Ranks,
        config: dict[str, Any] | None,
        identity: Identity | None,
        resume: bool,
        bar: bool,
    ) -> None:
        self._out = out
        self._parts = (learner, optimizer, sampler)
        self._budget = budget
        self._ranks = ranks
        self._settings: Any = {"config": config, "identity": identity, "resume": resume}
        self._bar = bar
        self._writer: tuple[RunFolder, RunLog] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> RunRecord:
        """Open the folder, and load its checkpoint or save the first one."""
        learner, optimizer, sampler = self._parts
        with ExitStack() as stack:
            state = self._ranks.from_first(lambda: self._open(stack))
            if self._writer is None:
                self.progress = restore_state(
                    state,
                    learner,
                    optimizer,
                    sampler=sampler,
                    source="the first process",
                )
            self._saved = self._position
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files, and let go of the folder."""
        self._stack.__exit__(kind, error, trace)

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint."""
        return self._saved[0]

    @property
    def is_saved(self) -> bool:
        """Whether the last checkpoint holds the present step and its validation."""
        return self._saved == self._position

    def save(self, *, is_best: bool) -> None:
        """Save a checkpoint, also as the best one if it `is_best`."""
        self._saved = self._position
        if self._writer is not None:
            folder, log = self._writer
            save_checkpoint(
                folder.checkpoint,
                *self._parts,
                self.progress,
                identity=folder.identity,
                is_best=is_best,
                log=log,
            )

    def write_step(self, values: Values) -> None:
        """Write what a step measured, and show that it is done."""
        if self._writer is not None:
            _, log = self._writer
            log.write("train", self.progress, values)
            log.advance(values)

    def write_validation(self, values: Values) -> None:
        """Write what a validation measured."""
        if self._writer is not None:
            _, log = self._writer
            log.write("validation", self.progress, values)
        self.progress.validated = self.progress.step

    @property
    def _position(self) -> tuple[int, int]:
        return (self.progress.step, self.progress.validated)

    def _open(self, stack: ExitStack) -> dict[str, Any]:
        folder = stack.enter_context(RunFolder(self._out, **self._settings))
        self.progress = self._start(folder)
        log = RunLog(
            self._out,
            self.progress,
            folder.run,
            total=self._budget.steps,
            minutes=self._budget.minutes,
            bar=self._bar,
        )
        self._writer = (folder, stack.enter_context(log))
        return collect_state(*self._parts, self.progress)

    def _start(self, folder: RunFolder) -> Progress:
        """Load the checkpoint of the folder, or save its first one."""
        progress = Progress()
        if folder.has_checkpoint:
            progress = load_checkpoint(folder.checkpoint, *self._parts, identity=folder.identity)
        device = next(self._parts[0].parameters()).device
        folder.begin_sitting(progress, device, processes=self._ranks.count)
        if not folder.has_checkpoint:
            save_checkpoint(
                folder.checkpoint,
                *self._parts,
                progress,
                identity=folder.identity,
            )
        return progress
