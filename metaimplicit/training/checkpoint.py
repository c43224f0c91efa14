"""Checkpoints: all that a run needs to go on to the same bits."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from metaimplicit.learner import MetaLearner
from metaimplicit.methods import Method
from metaimplicit.training.files import write_atomically
from metaimplicit.tuning import Tuner

FORMAT = 1


class Resumable(Protocol):
    """A sampler, as far as a checkpoint cares."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """How far a run is: meta-steps done, and seconds of wall clock spent in `fit` over all its sittings."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: Path,
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Resumable,
    progress: Progress,
) -> None:
    """Write learner, optimiser, sampler and random states atomically: a crash leaves the last good file."""
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "learner": learner.state_dict(),
        "vectorize": learner.vectorize,
        "optimizer": optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "rng": _rng(learner.method),
    }
    write_atomically(path, lambda file: torch.save(state, file))


def save_tuner(path: Path, tuner: Tuner, progress: Progress) -> None:
    """Write a tuner and the random states atomically."""
    rng = _rng(tuner.method)
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "tuner": tuner.state_dict(),
        "rng": rng,
    }
    write_atomically(path, lambda file: torch.save(state, file))


def load_tuner(path: Path, tuner: Tuner) -> Progress:
    """Put everything back where `save_tuner` found it.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a damaged one, or that of another tuner.
    """
    state = _read(path, next(iter(tuner.meta.values())).device)
    if "tuner" not in state:
        raise ValueError(f"checkpoint: {path} holds no tuner, but a learner; use load_learner")
    tuner.load_state_dict(state["tuner"])
    _set_rng(state["rng"], tuner.method)
    return Progress(**state["progress"])


def load_learner(path: Path, learner: MetaLearner) -> Progress:
    """Load what the run learnt (and whether it vmaps or loops) into a learner built as the run built it.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a damaged one, or that of another model.
    """
    return _restore(_read(path, _device(learner)), path, learner)


def load_checkpoint(
    path: Path, learner: MetaLearner, optimizer: torch.optim.Optimizer, sampler: Resumable
) -> Progress:
    """Put everything back where `save_checkpoint` found it; raises as `load_learner`, and what the sampler refuses."""
    state = _read(path, _device(learner))
    progress = _restore(state, path, learner)
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    _set_rng(state["rng"], learner.method)
    return progress


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint: found no {path}; give a folder that a run has written to"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"checkpoint: {path} is damaged or none of ours ({error}); restore or delete it"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"checkpoint: {path} has format {found}, expected {FORMAT}; use the version that wrote it"
        )
    return state


def _restore(state: dict[str, Any], path: Path, learner: MetaLearner) -> Progress:
    if "learner" not in state:
        raise ValueError(f"checkpoint: {path} holds no learner, but a tuner; use load_tuner")
    try:
        learner.load_state_dict(state["learner"])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: {path} does not fit the learner, build it as the run did: {error}"
        ) from error
    learner.vectorize = state["vectorize"]
    return Progress(**state["progress"])


def _device(learner: MetaLearner) -> torch.device:
    return next(learner.parameters()).device


def _own_generator(method: Method) -> torch.Generator | None:
    """The generator that a solver draws its sketches from, if it has one of its own."""
    own: torch.Generator | None = getattr(getattr(method, "solver", None), "generator", None)
    return own


def _rng(method: Method) -> dict[str, Any]:
    own = _own_generator(method)
    used = torch.cuda.is_available() and torch.cuda.is_initialized()  # asking would start it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if used else [],
        "solver": None if own is None else own.get_state(),
    }


def _set_rng(state: dict[str, Any], method: Method) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if (own := _own_generator(method)) is not None and state.get("solver") is not None:
        own.set_state(state["solver"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda"]])
