"""Checkpoints: all that a run needs to continue to the same bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from metaimplicit.learner import MetaLearner
from metaimplicit.training.hyperparameters import warned_of_changes
from metaimplicit.training.log import RunLog
from metaimplicit.training.progress import Progress
from metaimplicit.training.rotation import (
    Identity,
    Select,
    read_checkpoint,
    repair,
    write_checkpoint,
)
from metaimplicit.training.run_state import (
    Resumable,
    collect_state,
    random_states,
    restore_learner,
    restore_state,
    set_random_states,
)
from metaimplicit.tuning import Tuner


def save_checkpoint(
    path: str | Path,
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Resumable,
    progress: Progress,
    *,
    identity: Identity | None = None,
    is_best: bool = False,
    log: RunLog | None = None,
) -> None:
    """Save the states of learner, optimiser, sampler and random generators.

    The file is written atomically and ends with a checksum. The checkpoint before it is kept beside
    it, as checkpoint-previous.pt.

    Args:
        path: The file.
        learner: The learner, with its choice between vmap and the loop.
        optimizer: The optimiser of its parameters.
        sampler: What draws the training episodes.
        progress: How far the run is.
        identity: What the run may not change, by name, in types that JSON has.
        is_best: Whether to keep it as checkpoint-best.pt, too.
        log: The run's log, which is on the disk before the checkpoint is. If None, there is none.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> class Sampler:
        ...     def state_dict(self):
        ...         return {"position": 3}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     path = Path(out, "checkpoint.pt")
        ...     save_checkpoint(path, learner, optimizer, Sampler(), Progress(step=3))
        ...     path.exists()
        True
    """
    state = collect_state(learner, optimizer, sampler, progress)
    state["identity"] = dict(identity or {})
    write_checkpoint(Path(path), state, is_best=is_best, log=log)


def load_checkpoint(
    path: str | Path,
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Resumable,
    *,
    identity: Identity | None = None,
) -> Progress:
    """Load the states that `save_checkpoint` saved, to continue the run.

    If the file is damaged or of another run, it is renamed to checkpoint.pt.damaged, and the
    previous or the best checkpoint takes its place. A warning says so.

    Args:
        path: The file.
        learner: A learner built as that of the run.
        optimizer: An optimiser of its parameters, of the same type.
        sampler: A sampler of the same stream of episodes.
        identity: What the saved identity must be. If None, it is not compared.

    Returns:
        How far the run was.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: No checkpoint is whole, or they belong to another run, learner or sampler.

    Example:
        >>> import tempfile
        >>> import tasks
        >>> sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> with tempfile.TemporaryDirectory() as out:
        ...     path = Path(out, "checkpoint.pt")
        ...     save_checkpoint(path, learner, optimizer, sampler, Progress(step=3))
        ...     load_checkpoint(path, learner, optimizer, sampler)
        Progress(step=3, seconds=0.0)
    """
    path = Path(path)
    loaded = read_checkpoint(path, identity, _device(learner))
    progress = restore_state(
        loaded.state,
        learner,
        optimizer,
        sampler=sampler,
        source=str(path),
    )
    repair(path, loaded)
    return progress


def load_learner(
    path: str | Path,
    learner: MetaLearner,
    *,
    identity: Identity | None = None,
    select: Select = "last",
) -> Progress:
    """Load the parameters of a run's learner, and its choice between vmap and the loop.

    If the selected checkpoint is damaged, missing or of another run, another one of the run is read
    instead, with a warning. No file is changed.

    Args:
        path: The run's checkpoint.
        learner: A learner built as that of the run.
        identity: What the saved identity must be. If None, it is not compared.
        select: `"last"`, the state at the end of the run, or `"best"`, that with the best
            validation.

    Returns:
        How far the run was when the checkpoint was saved.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: No checkpoint is whole, they belong to another run or learner, or `select` is
            something else.

    Example:
        >>> import tempfile
        >>> import tasks
        >>> from metaimplicit.training import Budget, fit
        >>> sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> new = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder)
        ...     _ = fit(learner, optimizer, sampler, out=out, budget=Budget(steps=3), bar=False)
        ...     load_learner(out / "checkpoint.pt", new).step
        3
    """
    loaded = read_checkpoint(Path(path), identity, _device(learner), select)
    return restore_learner(loaded.state, learner, source=str(loaded.path))


def save_tuner(
    path: str | Path,
    tuner: Tuner,
    progress: Progress,
    *,
    identity: Identity | None = None,
    log: RunLog | None = None,
) -> None:
    """Save the states of a tuner and of the random generators. See `save_checkpoint`.

    Args:
        path: The file.
        tuner: The tuner.
        progress: How far the run is.
        identity: What the run may not change, by name, in types that JSON has.
        log: The run's log, which is on the disk before the checkpoint is. If None, there is none.

    Example:
        >>> import tempfile
        >>> from torch.nn import functional as F
        >>> from metaimplicit.inner import GradientDescent
        >>> from metaimplicit.tuning import WeightDecay, tuning_problem
        >>> model = torch.nn.Linear(2, 1)
        >>> problem, meta, domains = tuning_problem(model, F.mse_loss, [WeightDecay()])
        >>> tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=1))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     path = Path(out, "checkpoint.pt")
        ...     save_tuner(path, tuner, Progress(step=tuner.steps))
        ...     path.exists()
        True
    """
    state = {
        "progress": asdict(progress),
        "identity": dict(identity or {}),
        "tuner": tuner.state_dict(),
        "rng": random_states(tuner.method),
    }
    write_checkpoint(Path(path), state, log=log)


def load_tuner(path: str | Path, tuner: Tuner, *, identity: Identity | None = None) -> Progress:
    """Load the states that `save_tuner` saved into a tuner built as that of the run.

    What is damaged is set aside as in `load_checkpoint`.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: No checkpoint is whole, or they belong to another run or tuner.

    Example:
        >>> import tempfile
        >>> from torch.nn import functional as F
        >>> from metaimplicit.inner import GradientDescent
        >>> from metaimplicit.tuning import WeightDecay, tuning_problem
        >>> model = torch.nn.Linear(2, 1)
        >>> problem, meta, domains = tuning_problem(model, F.mse_loss, [WeightDecay()])
        >>> tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=1))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     path = Path(out, "checkpoint.pt")
        ...     save_tuner(path, tuner, Progress(step=3))
        ...     load_tuner(path, tuner)
        Progress(step=3, seconds=0.0)
    """
    path = Path(path)
    loaded = read_checkpoint(path, identity, next(iter(tuner.meta.values())).device)
    state = loaded.state
    if "tuner" not in state:
        raise ValueError(f"checkpoint: {path} holds no tuner, but a learner; use load_learner")
    with warned_of_changes(tuner.optimizer, str(path)):
        tuner.load_state_dict(state["tuner"])
    set_random_states(state["rng"], tuner.method)
    repair(path, loaded)
    return Progress(**state["progress"])


def _device(learner: MetaLearner) -> torch.device:
    return next(learner.parameters()).device
