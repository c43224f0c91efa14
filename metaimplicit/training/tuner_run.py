"""The training loop of a `Tuner`, with its files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from metaimplicit.counts import check_count
from metaimplicit.params import Params
from metaimplicit.solvers import Status
from metaimplicit.training.checkpoint import load_tuner, save_tuner
from metaimplicit.training.log import RunLog, Values
from metaimplicit.training.progress import Progress, Stopwatch
from metaimplicit.training.rotation import Identity
from metaimplicit.training.run_folder import RunFolder
from metaimplicit.training.signals import DeferredSignals
from metaimplicit.training.unsettled import leftover_share
from metaimplicit.tuning import Tuner, TunerStep
from metaimplicit.tuning.batches import Source


def fit_tuner(
    tuner: Tuner,
    train: Source,
    validation: Source,
    *,
    out: str | Path,
    steps: int,
    config: dict[str, Any] | None = None,
    identity: Identity | None = None,
    metric: Callable[[Params, Params], float] | None = None,
    every: int = 1,
    patience: int | None = None,
    callback: Callable[[TunerStep], None] | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    bar: bool = True,
) -> Progress:
    """Run `Tuner.fit`, and leave config, checkpoints, metrics and TensorBoard files in `out`.

    If the batches are functions of their number, a run that is killed and resumed ends at the same
    bits as one that is not. Signals and damaged files have the same effects as in `fit`. The last
    two checkpoints are kept; each holds the best measurement.

    Args:
        tuner: The tuner.
        train: Batches for the inner loss; see `Tuner.fit`.
        validation: Batches for the outer loss; see `Tuner.fit`.
        out: The run's folder. It is made if it does not exist.
        steps: The number of outer steps; see `Tuner.fit`.
        config: What config.json holds beside what every run has there, and what it held before.
        identity: What a resumed run may not change; see `fit`.
        metric: What to measure; see `Tuner.fit`.
        every: The number of steps between measurements; see `Tuner.fit`.
        patience: When to stop early; see `Tuner.fit`.
        callback: Called with each step; see `Tuner.fit`.
        checkpoint_every: The number of outer steps between checkpoints, ≥ 1. There is one before
            the first step and one after the last as well.
        resume: Whether to continue from the checkpoint in `out`, if there is one.
        bar: Whether to show how far the run is; see `fit`.

    Returns:
        The number of outer steps taken and the time spent, over all sittings of the run.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is False. Or another process writes to it.
        FloatingPointError: A hypergradient is not finite, and the tuner does not skip those.
        ValueError: A number is out of range, or the checkpoints are damaged or belong to another
            run.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from metaimplicit.inner import GradientDescent
        >>> from metaimplicit.tuning import WeightDecay, tuning_problem
        >>> model = torch.nn.Linear(2, 1)
        >>> problem, meta, domains = tuning_problem(model, F.mse_loss, [WeightDecay()])
        >>> tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=1))
        >>> loader = [(torch.randn(4, 2), torch.randn(4, 1))]
        >>> with tempfile.TemporaryDirectory() as out:
        ...     fit_tuner(tuner, loader, loader, out=Path(out), steps=3, bar=False).step
        3
    """
    check_count("checkpoint_every", checkpoint_every, unit=" step")
    out = Path(out)
    folder = RunFolder(out, resume=resume, config=config, identity=identity)
    with DeferredSignals() as signals, folder:
        progress = _start(folder, tuner)
        stopwatch = Stopwatch(progress)
        with RunLog(out, progress, folder.run, total=steps, bar=bar) as log:

            def save() -> None:
                save_tuner(folder.checkpoint, tuner, progress, identity=folder.identity, log=log)

            def record(step: TunerStep) -> None:
                progress.step = tuner.steps
                stopwatch.update()
                values = _read_values(step)
                log.write("train", progress, values)
                log.advance(values)
                if step.metric is not None:
                    log.write("validation", progress, {"metric": step.metric})
                if tuner.steps % checkpoint_every == 0:
                    save()
                if callback is not None:
                    callback(step)
                if signals.received is not None:
                    raise _StopError

            with suppress(_StopError):
                tuner.fit(
                    train,
                    validation,
                    steps=steps,
                    metric=metric,
                    every=every,
                    patience=patience,
                    callback=record,
                )
            save()
    return progress


class _StopError(Exception):
    """Ends `Tuner.fit` after a step."""


def _start(folder: RunFolder, tuner: Tuner) -> Progress:
    """Load the checkpoint of the folder, or save its first one."""
    progress = Progress()
    if folder.has_checkpoint:
        progress = load_tuner(folder.checkpoint, tuner, identity=folder.identity)
    folder.begin_sitting(progress, next(iter(tuner.meta.values())).device)
    if not folder.has_checkpoint:
        save_tuner(folder.checkpoint, tuner, progress, identity=folder.identity)
    return progress


def _read_values(step: TunerStep) -> Values:
    report = step.report
    residual = None if report.residual is None else report.residual.mean().item()
    negative = None if report.status is None else report.share(Status.NEGATIVE_CURVATURE)
    left = leftover_share(report, torch.tensor(step.outer_loss))
    return {
        "loss": step.outer_loss,
        "gradient_norm": step.norm,
        "inner_gradient_norm": report.inner_gradient_norm.mean().item(),
        "leftover": None if left is None else left.item(),
        "residual": residual,
        "negative_curvature": negative,
        "applied": float(step.applied),
    }
