"""A `Tuner`'s run on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaimplicit.params import Params
from metaimplicit.solvers import Status
from metaimplicit.training.checkpoint import Progress, load_tuner, save_tuner
from metaimplicit.training.files import write_json
from metaimplicit.training.log import RunLog, Values
from metaimplicit.training.loop import CHECKPOINT, CONFIG, require_new_run_folder
from metaimplicit.tuning import Tuner, TunerStep
from metaimplicit.tuning.batches import Source


def fit_tuner(
    tuner: Tuner,
    train: Source,
    validation: Source,
    *,
    out: Path,
    steps: int,
    config: dict[str, Any] | None = None,
    metric: Callable[[Params, Params], float] | None = None,
    every: int = 1,
    patience: int | None = None,
    callback: Callable[[TunerStep], None] | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    bar: bool = True,
) -> Progress:
    """`Tuner.fit`, leaving config.json, checkpoint.pt, metrics.jsonl and tensorboard/ in `out`.

    A run that is killed and resumed comes to the same bits as one that is not, if its batches are functions of their
    number.

    Args:
        tuner, train, validation, steps, metric, every, patience, callback: see `Tuner.fit`.
        out: the run's folder, made if need be.
        config: stored as config.json.
        checkpoint_every: outer steps between checkpoints; there is one after the last step, too.
        resume: go on from the checkpoint in `out`, if there is one.
        bar: show progress.

    Returns:
        Outer steps done and seconds spent.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is off.
        FloatingPointError: a hypergradient that is not finite, unless the tuner skips such.
        ValueError: a number out of range; a checkpoint of another run.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: got {checkpoint_every}, expected at least 1 step")
    checkpoint, progress = out / CHECKPOINT, Progress()
    require_new_run_folder(out, resume)
    if resume and checkpoint.exists():
        progress = load_tuner(checkpoint, tuner)
    out.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_json(out / CONFIG, config)
    began, before = time.perf_counter(), progress.seconds
    with RunLog(out, progress, total=steps, bar=bar) as log:

        def told(step: TunerStep) -> None:
            progress.step, progress.seconds = tuner.steps, before + time.perf_counter() - began
            values = _values(step)
            log.write("train", progress, values)
            log.advance(values)
            if step.metric is not None:
                log.write("validation", progress, {"metric": step.metric})
            if tuner.steps % checkpoint_every == 0:
                save_tuner(checkpoint, tuner, progress)
            if callback is not None:
                callback(step)

        tuner.fit(
            train,
            validation,
            steps=steps,
            metric=metric,
            every=every,
            patience=patience,
            callback=told,
        )
        save_tuner(checkpoint, tuner, progress)
    return progress


def _values(step: TunerStep) -> Values:
    report = step.report
    return {
        "loss": step.outer_loss,
        "gradient_norm": step.norm,
        "inner_gradient_norm": report.inner_gradient_norm.mean().item(),
        "residual": None if report.residual is None else report.residual.mean().item(),
        "negative_curvature": None
        if report.status is None
        else report.share(Status.NEGATIVE_CURVATURE),
        "applied": float(step.applied),
    }
