"""Checkpoints: all that a run needs to continue to the same bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from metaimplicit.learner import MetaLearner, solver_generator
from metaimplicit.methods import Method
from metaimplicit.training.log import RunLog
from metaimplicit.training.progress import Progress
from metaimplicit.training.rotation import (
    Identity,
    Select,
    State,
    read_checkpoint,
    repair,
    write_checkpoint,
)
from metaimplicit.tuning import Tuner


class Resumable(Protocol):
    """Something with a state to save, such as a sampler of episodes."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers of tensors, numbers and strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


def save_checkpoint(
    path: Path,
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

    The file is written atomically and ends with its digest. The checkpoint before it is kept beside
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
    state = {
        "progress": asdict(progress),
        "identity": dict(identity or {}),
        "learner": learner.state_dict(),
        "vectorize": learner.vectorize,
        "optimizer": optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "rng": _random_states(learner.method),
    }
    write_checkpoint(path, state, is_best=is_best, log=log)


def load_checkpoint(
    path: Path,
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
    loaded = read_checkpoint(path, identity, _device(learner))
    state = loaded.state
    progress = _restore_learner(state, path, learner)
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    _set_random_states(state["rng"], learner.method)
    repair(path, loaded)
    return progress


def load_learner(
    path: Path,
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
        ValueError: No checkpoint is whole, or they belong to another run or learner.

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
    loaded = read_checkpoint(path, identity, _device(learner), select)
    return _restore_learner(loaded.state, loaded.path, learner)


def save_tuner(
    path: Path,
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
        "rng": _random_states(tuner.method),
    }
    write_checkpoint(path, state, log=log)


def load_tuner(path: Path, tuner: Tuner, *, identity: Identity | None = None) -> Progress:
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
    loaded = read_checkpoint(path, identity, next(iter(tuner.meta.values())).device)
    state = loaded.state
    if "tuner" not in state:
        raise ValueError(f"checkpoint: {path} holds no tuner, but a learner; use load_learner")
    tuner.load_state_dict(state["tuner"])
    _set_random_states(state["rng"], tuner.method)
    repair(path, loaded)
    return Progress(**state["progress"])


def _restore_learner(state: State, path: Path, learner: MetaLearner) -> Progress:
    if "learner" not in state:
        raise ValueError(f"checkpoint: {path} holds no learner, but a tuner; use load_tuner")
    try:
        learner.load_state_dict(state["learner"])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: {path} does not fit the learner; build it as the run did: {error}"
        ) from error
    learner.vectorize = state["vectorize"]
    return Progress(**state["progress"])


def _device(learner: MetaLearner) -> torch.device:
    return next(learner.parameters()).device


def _random_states(method: Method) -> dict[str, Any]:
    generator = solver_generator(method)
    # Asking for the state of CUDA would initialise it.
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "solver": None if generator is None else generator.get_state(),
    }


def _set_random_states(states: dict[str, Any], method: Method) -> None:
    torch.set_rng_state(states["torch"].cpu())
    generator = solver_generator(method)
    if generator is not None and states.get("solver") is not None:
        generator.set_state(states["solver"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
