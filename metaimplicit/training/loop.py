"""The training loop of a `MetaLearner`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from metaimplicit.learner import EpisodeBatch, MetaLearner
from metaimplicit.learner.vectorization import preserve_random_state
from metaimplicit.training.checkpoint import Resumable, load_checkpoint, save_checkpoint
from metaimplicit.training.log import RunLog, Values
from metaimplicit.training.meta_step import take_step
from metaimplicit.training.metrics import evaluate
from metaimplicit.training.progress import Budget, Progress, Stopwatch, cosine
from metaimplicit.training.rotation import Identity
from metaimplicit.training.run_folder import CHECKPOINT, RunFolder
from metaimplicit.training.signals import DeferredSignals

ENDLESS = 2**40  # batches to draw where only the time is limited


class Sampler(Resumable, Protocol):
    """A resumable stream of batches of episodes, such as `tasks.EpisodeSampler`."""

    def batches(
        self, count: int, workers: int = 0, pin_memory: bool = False
    ) -> Iterator[EpisodeBatch]:
        """The next `count` batches.

        Args:
            count: The number of batches.
            workers: The number of processes that draw them. If 0, this one does.
            pin_memory: Whether the tensors are in page-locked memory, for faster copies to CUDA.
        """


def fit(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    *,
    out: Path,
    budget: Budget,
    config: dict[str, Any] | None = None,
    identity: Identity | None = None,
    validation: Callable[[], Iterable[EpisodeBatch]] | None = None,
    validate_every: int = 200,
    checkpoint_every: int = 100,
    before_step: Callable[[float], None] | None = None,
    schedule: Callable[[float], float] = cosine,
    clip: float | None = None,
    workers: int = 0,
    resume: bool = False,
    bar: bool = True,
) -> Progress:
    """Meta-train a learner, and leave config, checkpoints, metrics and TensorBoard files in `out`.

    A run that is killed and resumed ends at the same bits as one that is not. The exception is a
    budget in minutes, with which the learning rate follows the clock. SIGINT, SIGTERM and SIGHUP
    take effect when the present step is finished and saved, and end a validation, which is repeated
    when the run is resumed; a second signal takes effect at once.

    The last two checkpoints are kept, and the one with the best validation. When a run is resumed,
    all files are verified. `RunFolder` says what config.json holds, `load_checkpoint` what happens
    to damaged checkpoints, and `RunLog` what happens to damaged metrics.

    Args:
        learner: The learner, on the device to train on.
        optimizer: The optimiser of its parameters.
        sampler: The stream of training episodes.
        out: The run's folder. It is made if it does not exist.
        budget: When to end.
        config: What config.json holds beside what every run has there.
        identity: What a resumed run may not change, such as options and a digest of the data, by
            name, in types that JSON has.
        validation: Draws the batches to validate on. If None, there is no validation.
        validate_every: The number of steps between validations, ≥ 1. The last step is validated
            as well.
        checkpoint_every: The number of steps between checkpoints, ≥ 1. There is one before the
            first step and one after the last as well.
        before_step: Is called with the share of the budget that is spent, to change the learner as
            training goes on. If None, nothing is called.
        schedule: Maps the share of the budget that is spent to a factor on the learning rate of
            each group of the optimiser.
        clip: The largest norm of the meta-gradient, > 0. If None, it is not clipped.
        workers: The number of processes that draw episodes. If 0, this one does.
        resume: Whether to continue from the checkpoint in `out`, if there is one.
        bar: Whether to show how far the run is: a bar on a terminal, else a line in a while.

    Returns:
        The number of steps taken and the time spent, over all sittings of the run.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is False. Or another process writes to it.
        NonFiniteError: The data, the loss or the meta-gradient holds NaN or Inf. No parameter has
            moved at this step, and the last checkpoint stands.
        ValueError: A number is out of range. The checkpoints are damaged or belong to another run.
            Or `out` holds the metrics of a run whose checkpoint is gone.

    Example:
        >>> import tempfile
        >>> import tasks
        >>> from metaimplicit.training import read_metrics
        >>> sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder)
        ...     _ = fit(learner, optimizer, sampler, out=out, budget=Budget(steps=3), bar=False)
        ...     [line["step"] for line in read_metrics(out)]
        [1, 2, 3]
    """
    _check_numbers(validate_every, checkpoint_every, clip)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    device = next(learner.parameters()).device
    folder = RunFolder(out, resume=resume, config=config, identity=identity)
    with DeferredSignals() as signals, folder:
        progress = _start(folder, learner, optimizer, sampler)
        count = ENDLESS if budget.steps is None else max(budget.steps - progress.step, 0)
        stream = sampler.batches(count, workers, pin_memory=device.type == "cuda")
        stopwatch = Stopwatch(progress)
        saved = (progress.step, progress.validated)
        log = RunLog(out, progress, folder.run, total=budget.steps, minutes=budget.minutes, bar=bar)
        with log, warnings.catch_warnings():
            # Such a step ends in NonFiniteError, or is clipped.
            warnings.filterwarnings("ignore", message="the meta-gradient", category=RuntimeWarning)
            while True:
                done = budget.spent(progress) >= 1
                is_due = done or progress.step % validate_every == 0
                is_best = False
                # A signal ends a validation, too. The run that is resumed begins with it.
                if validation is not None and is_due and progress.validated < progress.step:
                    is_best = _validate(learner, validation(), signals, log=log, progress=progress)
                    stopwatch.update()
                stops = done or signals.received is not None
                is_saved = (progress.step, progress.validated) == saved
                if is_best or (not is_saved and (stops or progress.step % checkpoint_every == 0)):
                    save_checkpoint(
                        folder.checkpoint,
                        learner,
                        optimizer,
                        sampler,
                        progress,
                        identity=folder.identity,
                        is_best=is_best,
                        log=log,
                    )
                    saved = (progress.step, progress.validated)
                if stops:
                    break

                spent = budget.spent(progress)
                if before_step is not None:
                    before_step(spent)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * schedule(spent)
                number = progress.step + 1
                context = f"no parameter has moved, and {CHECKPOINT} holds step {saved[0]}"
                values = take_step(
                    learner, optimizer, next(stream), clip=clip, step=number, context=context
                )
                progress.step = number
                stopwatch.update()
                log.write("train", progress, values)
                log.advance(values)
    return progress


def _start(
    folder: RunFolder,
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
) -> Progress:
    """Load the checkpoint of the folder, or save its first one."""
    progress = Progress()
    if folder.has_checkpoint:
        progress = load_checkpoint(
            folder.checkpoint, learner, optimizer, sampler, identity=folder.identity
        )
    folder.begin_sitting(progress, next(learner.parameters()).device)
    if not folder.has_checkpoint:
        save_checkpoint(
            folder.checkpoint, learner, optimizer, sampler, progress, identity=folder.identity
        )
    return progress


def _check_numbers(validate_every: int, checkpoint_every: int, clip: float | None) -> None:
    for name, number in (
        ("validate_every", validate_every),
        ("checkpoint_every", checkpoint_every),
    ):
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1 step")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: got {clip}, expected a norm > 0, or None")


def _validate(
    learner: MetaLearner,
    batches: Iterable[EpisodeBatch],
    signals: DeferredSignals,
    *,
    log: RunLog,
    progress: Progress,
) -> bool:
    """Validate, unless a signal ends it, and return whether the result is the best so far."""
    if signals.received is not None:
        return False
    is_on_cuda = next(learner.parameters()).is_cuda
    with preserve_random_state(learner.method, cuda=is_on_cuda):
        result = evaluate(learner, _until_stopped(batches, signals), steps=[learner.inner.steps])
    if signals.received is not None:
        return False
    accuracy = None if result.accuracies is None else result.accuracies[-1].mean().item()
    values: Values = {"loss": result.losses[-1].mean().item(), "accuracy": accuracy}
    log.write("validation", progress, values)
    progress.validated = progress.step
    return progress.note_score(_score(values))


def _until_stopped(
    batches: Iterable[EpisodeBatch], signals: DeferredSignals
) -> Iterator[EpisodeBatch]:
    for batch in batches:
        yield batch
        if signals.received is not None:
            return


def _score(validation: Values) -> float:
    """The accuracy, or else the negative loss, of which more is better."""
    accuracy = validation["accuracy"]
    loss = validation["loss"]
    if accuracy is not None:
        return accuracy
    return -math.inf if loss is None else -loss
