"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metaimplicit.learner import EpisodeBatch, MetaLearner, Step
from metaimplicit.solvers import Status
from metaimplicit.training.checkpoint import Progress, Resumable, load_checkpoint, save_checkpoint
from metaimplicit.training.files import write_json
from metaimplicit.training.log import METRICS, RunLog, Values, read_metrics
from metaimplicit.training.metrics import evaluate, to_device

CHECKPOINT, CONFIG = "checkpoint.pt", "config.json"


class Sampler(Resumable, Protocol):
    """A resumable stream of batches of episodes, such as `tasks.EpisodeSampler`."""

    def batches(
        self, count: int, workers: int = 0, pin_memory: bool = False
    ) -> Iterator[EpisodeBatch]: ...


class NonFiniteError(FloatingPointError):
    """NaN or Inf in data, loss or meta-gradient; the parameters and the last checkpoint are from before it."""


@dataclass(frozen=True)
class Budget:
    """How long to train: until `steps` meta-steps or `minutes` of wall clock, whichever is first.

    Args:
        steps: meta-steps, ≥ 1; None, no limit.
        minutes: of wall clock in `fit`, validation included, over all sittings of a run, > 0; None, no limit.

    Raises:
        ValueError: neither is given, or one is out of range.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("budget: got neither steps nor minutes, expected at least one of them")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1 meta-step")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: got {self.minutes}, expected a time > 0")

    def spent(self, progress: Progress) -> float:
        """The share of the budget that is used, max(step/steps, seconds/(60·minutes)); training ends at 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(progress.step / self.steps)
        if self.minutes is not None:
            shares.append(progress.seconds / (60 * self.minutes))
        return min(max(shares), 1.0)


def cosine(spent: float) -> float:
    """(1 + cos π·spent)/2: the outer learning rate's factor, from 1 down to 0 (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * spent))


def constant(spent: float) -> float:
    """No decay."""
    return 1.0


def fit(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    *,
    out: Path,
    budget: Budget,
    config: dict[str, Any] | None = None,
    validation: Callable[[], Iterable[EpisodeBatch]] | None = None,
    validate_every: int = 200,
    checkpoint_every: int = 100,
    schedule: Callable[[float], float] = cosine,
    clip: float | None = None,
    workers: int = 0,
    resume: bool = False,
    bar: bool = True,
) -> Progress:
    """Meta-train, leaving config.json, checkpoint.pt, metrics.jsonl and tensorboard/ in `out`.

    A run that is killed and resumed comes to the same bits as one that is not, except that a budget in minutes makes
    the learning rate follow the clock.

    Args:
        learner, optimizer, sampler: what trains, on what; the learner's device is the run's.
        out: the run's folder, made if need be.
        budget: when to end.
        config: stored as config.json.
        validation: draws the batches to evaluate every `validate_every` steps and at the end.
        checkpoint_every: steps between checkpoints; there is one before the first step and after the last, too.
        schedule: share of the budget spent -> factor on each group's learning rate.
        clip: largest norm of the meta-gradient; None, any.
        workers: processes that draw episodes; 0, this one.
        resume: go on from the checkpoint in `out`, if there is one.
        bar: show progress.

    Returns:
        Steps done and seconds spent.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is off.
        NonFiniteError: NaN or Inf in data, loss or meta-gradient, before they reach the parameters.
        ValueError: a number out of range; a checkpoint of another run.
    """
    for name, number in {
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
    }.items():
        if number < 1:
            raise ValueError(f"{name}: got {number}, expected at least 1 step")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: got {clip}, expected a norm > 0, or None")
    checkpoint, progress = out / CHECKPOINT, Progress()
    require_new_run_folder(out, resume)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    if resume and checkpoint.exists():
        progress = load_checkpoint(checkpoint, learner, optimizer, sampler)
    elif (out / METRICS).exists() and any(line["step"] > 0 for line in read_metrics(out)):
        raise ValueError(
            f"out: {checkpoint} is gone, but {METRICS} holds steps made; restore it, or name another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_json(out / CONFIG, config)
    if not checkpoint.exists():
        save_checkpoint(checkpoint, learner, optimizer, sampler, progress)
    device = next(learner.parameters()).device
    count = 2**40 if budget.steps is None else max(budget.steps - progress.step, 0)
    stream = sampler.batches(count, workers, pin_memory=device.type == "cuda")
    began, before = time.perf_counter(), progress.seconds
    saved = progress.step
    with RunLog(out, progress, total=budget.steps, bar=bar) as log:
        while (spent := budget.spent(progress)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(spent)
            values = _step(learner, optimizer, next(stream), device, progress.step + 1, saved, clip)
            progress.step += 1
            progress.seconds = before + time.perf_counter() - began
            log.write("train", progress, values)
            log.advance(values)
            over = budget.spent(progress) >= 1
            if validation is not None and (over or progress.step % validate_every == 0):
                log.write("validation", progress, _validate(learner, validation()))
                progress.seconds = before + time.perf_counter() - began
            if over or progress.step % checkpoint_every == 0:
                save_checkpoint(checkpoint, learner, optimizer, sampler, progress)
                saved = progress.step
    return progress


def require_new_run_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a run, unless it is to be resumed (FileExistsError)."""
    held = [name for name in (CONFIG, CHECKPOINT) if (out / name).exists()]
    if held and not resume:
        raise FileExistsError(
            f"out: {out} holds a run already ({', '.join(held)}), expected a new or empty folder; name another with "
            "--out, or go on with --resume"
        )


def _step(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    episodes: EpisodeBatch,
    device: torch.device,
    number: int,
    saved: int,
    clip: float | None,
) -> Values:
    """One meta-step, checked before it moves a parameter; what it saw."""
    remains = f"no parameter has moved, and {CHECKPOINT} holds step {saved}"
    for name, pair in {"support": episodes.support, "query": episodes.query}.items():
        for part, values in zip(("inputs", "targets"), pair, strict=True):
            if values.is_floating_point() and not values.isfinite().all():
                raise NonFiniteError(
                    f"step {number}: the {name} {part} hold NaN or Inf; {remains}. Clean the data, then resume"
                )
    optimizer.zero_grad()
    step = learner.backward(to_device(episodes, device))
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    seen = _read(step, norm)
    if not math.isfinite(_number(seen["loss"])):
        raise NonFiniteError(
            f"step {number}: the query loss is {seen['loss']}; {remains}. Lower the inner step size, or raise proximal"
        )
    if not math.isfinite(_number(seen["gradient_norm"])):
        bad = [name for name, g in gradients.items() if not g.isfinite().all()] or [
            "its norm overflows"
        ]
        raise NonFiniteError(
            f"step {number}: the meta-gradient is not finite ({', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}); "
            f"{remains}. Lower the inner or the outer step size, add damping or proximal, or try another method"
        )
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters(), clip, norm)
    optimizer.step()
    return seen | {"learning_rate": float(optimizer.param_groups[0]["lr"])}


def _read(step: Step, norm: Tensor) -> Values:
    """The numbers of a step, in one transfer from the device."""
    report = step.report
    tensors = {
        "loss": step.loss,
        "accuracy": step.accuracy,
        "residual": None if report.residual is None else report.residual.mean(),
        "inner_gradient_norm": report.inner_gradient_norm.mean(),
        "gradient_norm": norm,
        "negative_curvature": None
        if report.status is None
        else (report.status == int(Status.NEGATIVE_CURVATURE)).double().mean(),
    }
    present = {name: t.detach().double() for name, t in tensors.items() if t is not None}
    numbers = dict(zip(present, torch.stack(list(present.values())).tolist(), strict=True))
    return {name: numbers.get(name) for name in tensors}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _validate(learner: MetaLearner, validation: Iterable[EpisodeBatch]) -> Values:
    result = evaluate(learner, validation, steps=[learner.inner.steps])
    accuracy = None if result.accuracies is None else result.accuracies[-1].mean().item()
    return {"loss": result.losses[-1].mean().item(), "accuracy": accuracy}
