"""The training loop of a `MetaLearner`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from metaimplicit.counts import check_count
from metaimplicit.functions import needs_closure
from metaimplicit.learner import EpisodeBatch, MetaLearner, Ranks
from metaimplicit.learner.vectorization import preserve_random_state
from metaimplicit.training.hyperparameters import scheduled_rates, set_rates, unchanged_rates
from metaimplicit.training.log import Values
from metaimplicit.training.meta_step import moved_parameters, take_step
from metaimplicit.training.metrics import Evaluation, evaluate, measure_name, require_several
from metaimplicit.training.progress import Budget, Progress, Stopwatch, cosine
from metaimplicit.training.rotation import Identity
from metaimplicit.training.run_folder import CHECKPOINT
from metaimplicit.training.run_record import RunRecord
from metaimplicit.training.run_state import Resumable
from metaimplicit.training.selection import Best, score, selection_rule
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
    out: str | Path,
    budget: Budget,
    config: dict[str, Any] | None = None,
    identity: Identity | None = None,
    validation: Callable[[], Iterable[EpisodeBatch]] | None = None,
    validate_every: int = 200,
    best: Best | None = None,
    checkpoint_every: int = 100,
    before_step: Callable[[float], None] | None = None,
    schedule: Callable[[float], float] = cosine,
    clip: float | None = None,
    workers: int = 0,
    resume: bool = False,
    bar: bool = True,
    ranks: Ranks | None = None,
) -> Progress:
    """Meta-train a learner, and leave config, checkpoints, metrics and TensorBoard files in `out`.

    A run that is killed and resumed ends at the same bits as one that is not. The exception is a
    budget in minutes, with which the learning rate follows the clock. SIGINT, SIGTERM and SIGHUP
    take effect when the present step is finished and saved, and end a validation, which is repeated
    when the run is resumed; a second signal takes effect at once.

    The last two checkpoints are kept, and the one with the best validation. When a run is resumed,
    all files are verified. `RunFolder` says what config.json holds, `load_checkpoint` what happens
    to damaged checkpoints, and `RunLog` what happens to damaged metrics.

    Several processes (`ranks`) take the same steps, each on its share of the tasks, from the state
    of the first one, which alone writes. What one process would do holds up to round-off. They stop
    together: at a signal to any of them, and by the clock that shows the longest time. A run is
    resumed with any number of processes.

    Args:
        learner: The learner, on the device to train on.
        optimizer: The optimiser of its parameters, or of some of them. Its learning rates at the
            end are those at the start. A run that is resumed keeps its own hyperparameters, and a
            warning says so if those of the optimiser differ.
        sampler: The stream of training episodes.
        out: The run's folder. It is made if it does not exist.
        budget: When to end.
        config: What config.json holds beside what every run has there.
        identity: What a resumed run may not change, such as options and a digest of the data, by
            name, in types that JSON has.
        validation: Draws the batches to validate on, which leaves torch's random state as it is. If
            None, there is no validation.
        validate_every: The number of steps between validations, ≥ 1. The last step is validated
            as well.
        best: Which validation is the best: that with the `"lowest loss"`, the `"highest metric"`
            or the `"lowest metric"`. Without a metric of the learner, the metric is the accuracy.
            If None, it is the highest accuracy, or else, and for a learner with a metric, the
            lowest loss. A resumed run with another `best` selects among its further validations.
        checkpoint_every: The number of steps between checkpoints, ≥ 1. There is one before the
            first step and one after the last as well.
        before_step: Is called with the share of the budget that is spent, to change the learner as
            training goes on. If None, nothing is called. Learning rates are not for it to change.
        schedule: Maps the share of the budget that is spent to a factor on the learning rate of
            each group of the optimiser.
        clip: The largest norm of the meta-gradient of what the optimiser moves, > 0. If None, it is
            not clipped.
        workers: The number of processes that draw episodes. If 0, this one does.
        resume: Whether to continue from the checkpoint in `out`, if there is one.
        bar: Whether to show how far the run is: a bar on a terminal, else a line in a while.
        ranks: The processes that call this function, with equal arguments. If None, this one alone.

    Returns:
        The number of steps taken and the time spent, over all sittings of the run.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is False. Or another process writes to it.
        LostRanksError: Another process ended. The last checkpoint stands.
        NonFiniteError: The data, the loss or the meta-gradient holds NaN or Inf. No parameter has
            moved at this step, and the last checkpoint stands.
        ValueError: A number is out of range, or an argument is of another kind. The optimiser moves
            no parameter of the learner, or needs a closure. The sampler's batches end before the
            budget. `before_step` changes a learning rate. `best` asks for a metric, and there is
            neither a metric nor an accuracy. The checkpoints are damaged or belong to another run.
            Or `out` holds the metrics of a run whose checkpoint is gone.

    Warns:
        RuntimeWarning: The loss of a validation is not finite.

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
    _check_parts(learner, optimizer, sampler, budget=budget, config=config, ranks=ranks)
    _check_functions(validation=validation, before_step=before_step, schedule=schedule)
    _check_numbers(validate_every, checkpoint_every, workers, clip)
    rule = selection_rule(learner, best)
    ranks = Ranks() if ranks is None else ranks
    record = RunRecord(
        Path(out),
        learner,
        optimizer,
        sampler=sampler,
        budget=budget,
        ranks=ranks,
        config=config,
        identity=identity,
        resume=resume,
        bar=bar,
    )
    with (
        DeferredSignals() as signals,
        scheduled_rates(optimizer),
        record,
        warnings.catch_warnings(),
    ):
        # Such a step ends in NonFiniteError, or is clipped.
        warnings.filterwarnings("ignore", message="the meta-gradient", category=RuntimeWarning)
        progress = record.progress
        count = ENDLESS if budget.steps is None else max(budget.steps - progress.step, 0)
        on_cuda = next(learner.parameters()).is_cuda
        stream = iter(sampler.batches(count, workers, pin_memory=on_cuda))
        stopwatch = Stopwatch(progress)
        while True:
            stops = _agree(ranks, progress, signals)
            done = budget.spent(progress) >= 1
            is_due = done or progress.step % validate_every == 0
            is_best = False
            if validation is not None and is_due and progress.validated < progress.step:
                # A signal ends a validation, too. The run that is resumed begins with it.
                try:
                    result = None if stops else _validate(learner, validation, signals, ranks=ranks)
                except Exception:
                    if not record.is_saved:
                        record.save(is_best=False)
                    raise
                stopwatch.update()
                stops = _agree(ranks, progress, signals)
                if result is not None and not stops:
                    values = _read_values(result, ranks, measure=measure_name(learner))
                    _warn_if_not_finite(values)
                    value = score(values, rule)
                    record.write_validation(values)
                    is_best = progress.note_score(value, rule)
            stops = stops or done
            is_due = stops or progress.step % checkpoint_every == 0
            if is_best or (is_due and not record.is_saved):
                record.save(is_best=is_best)
            if stops:
                break

            spent = budget.spent(progress)
            if before_step is not None:
                with unchanged_rates(optimizer):
                    before_step(spent)
            set_rates(optimizer, schedule(spent))
            episodes = next(stream, None)
            if episodes is None:
                if not record.is_saved:
                    record.save(is_best=False)
                raise ValueError(
                    f"sampler: its batches ended at step {progress.step}, which {CHECKPOINT} "
                    "holds, expected as many as it is asked for; begin again where they end"
                )
            number = progress.step + 1
            values = take_step(
                learner,
                optimizer,
                episodes,
                ranks=ranks,
                clip=clip,
                step=number,
                context=f"no parameter has moved, and {CHECKPOINT} holds step {record.saved_step}",
            )
            progress.step = number
            stopwatch.update()
            record.write_step(values)
    return progress


def _agree(ranks: Ranks, progress: Progress, signals: DeferredSignals) -> bool:
    """Give all processes the latest time and signal of any, and return whether there is a signal.

    What they decide by these is the same in all of them.
    """
    progress.seconds, number = ranks.largest(progress.seconds, signals.received or 0)
    if number:
        signals.adopt(int(number))
    return number > 0


def _check_parts(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Any,
    *,
    budget: Any,
    config: Any,
    ranks: Any,
) -> None:
    if not moved_parameters(learner, optimizer):
        raise ValueError(
            "optimizer: got one that moves no parameter of the learner, expected some of them; "
            "build it from learner.parameters()"
        )
    own = {id(p) for p in learner.parameters()}
    moved = [p for group in optimizer.param_groups for p in group["params"]]
    others = [p for p in moved if id(p) not in own]
    if others:
        raise ValueError(
            f"optimizer: got {len(others)} parameters that are not the learner's, of shapes "
            f"{[tuple(p.shape) for p in others[:3]]}, expected none, because a checkpoint would "
            "not hold them; make them parameters of the model or of the loss"
        )
    if needs_closure(optimizer):
        raise ValueError(
            f"optimizer: got {type(optimizer).__name__}, which evaluates the loss several times a "
            "step, expected one that steps by a gradient, such as torch.optim.Adam"
        )
    needed = ("batches", "state_dict", "load_state_dict")
    missing = [name for name in needed if not hasattr(sampler, name)]
    if missing:
        raise ValueError(
            f"sampler: got {type(sampler).__name__}, which has no {' and no '.join(missing)}, "
            "expected a stream that can be resumed; take a tasks.EpisodeSampler, or write a class "
            "with batches, state_dict and load_state_dict"
        )
    if not isinstance(budget, Budget):
        raise ValueError(f"budget: got {budget!r}, expected a Budget, such as Budget(steps=1000)")
    if not isinstance(config, Mapping | None):
        raise ValueError(f"config: got {type(config).__name__}, expected a dict, or None")
    if not isinstance(ranks, Ranks | None):
        raise ValueError(f"ranks: got {type(ranks).__name__}, expected Ranks.of_group(), or None")


def _check_functions(**functions: Any) -> None:
    expected = {
        "validation": "that draws the batches, such as lambda: batches",
        "before_step": "of the share of the budget that is spent",
        "schedule": "of the share of the budget that is spent, such as cosine",
    }
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "schedule"):
            got = type(function).__name__
            raise ValueError(f"{name}: got {got}, expected a function {expected[name]}")


def _check_numbers(
    validate_every: int, checkpoint_every: int, workers: int, clip: float | None
) -> None:
    for name, number in (
        ("validate_every", validate_every),
        ("checkpoint_every", checkpoint_every),
    ):
        check_count(name, number, unit=" step")
    check_count("workers", workers, least=0)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: got {clip}, expected a norm > 0, or None")


def _validate(
    learner: MetaLearner,
    validation: Callable[[], Any],
    signals: DeferredSignals,
    *,
    ranks: Ranks,
) -> Evaluation:
    """Evaluate this process's share of the tasks, until a signal ends it.

    Raises:
        ValueError: There is no batch, or one that is not in a list.
    """
    is_on_cuda = next(learner.parameters()).is_cuda
    with preserve_random_state(learner.method, cuda=is_on_cuda):
        batches = validation()
        require_several(batches, name="validation")
        if not isinstance(batches, Iterable):
            name = type(batches).__name__
            raise ValueError(f"validation: got {name}, expected batches of episodes")
        own = (ranks.share(batch) for batch in _until_stopped(batches, signals))
        return evaluate(learner, own, steps=[learner.inner.steps])


def _read_values(result: Evaluation, ranks: Ranks, measure: str) -> Values:
    """The mean loss and measure of the tasks of all processes."""
    losses = result.losses[-1]
    accuracies = None if result.accuracies is None else result.accuracies[-1]
    own: Values = {
        "loss": losses.mean().item(),
        measure: None if accuracies is None else accuracies.mean().item(),
    }
    return ranks.means(own, tasks=len(losses))


def _warn_if_not_finite(validation: Values) -> None:
    loss = validation["loss"]
    if loss is None or not math.isfinite(loss):
        warnings.warn(
            "the validation loss is not finite, so that the validation may say nothing; clean its "
            "data, or lower the inner step size",
            RuntimeWarning,
            stacklevel=3,
        )


def _until_stopped(
    batches: Iterable[EpisodeBatch], signals: DeferredSignals
) -> Iterator[EpisodeBatch]:
    batch = None
    for batch in batches:
        yield batch
        if signals.received is not None:
            return
    if batch is None:
        raise ValueError("validation: got no batch; return a new iterator at each call")
