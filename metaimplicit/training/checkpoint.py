"""Checkpoints: all that a run needs to go on to the same bits."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from metaimplicit.learner import MetaLearner
from metaimplicit.training.files import write_atomically

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
    path: Path, learner: MetaLearner, optimizer: torch.optim.Optimizer, sampler: Resumable, progress: Progress
) -> None:
    """Write learner, optimiser, sampler and random states atomically: a crash leaves the last good file."""
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "learner": learner.state_dict(),
        "vectorize": learner.vectorize,
        "optimizer": optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "cuda": _cuda_states()},
    }
    write_atomically(path, lambda file: torch.save(state, file))


def load_learner(path: Path, learner: MetaLearner) -> Progress:
    """Load what the run learnt (and whether it vmaps or loops) into a learner built as the run built it.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a damaged one, or that of another model.
    """
    return _restore(_read(path, learner), path, learner)


def load_checkpoint(path: Path, learner: MetaLearner, optimizer: torch.optim.Optimizer, sampler: Resumable) -> Progress:
    """Put everything back where `save_checkpoint` found it; raises as `load_learner`, and what the sampler refuses."""
    state = _read(path, learner)
    progress = _restore(state, path, learner)
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    torch.set_rng_state(state["rng"]["torch"].cpu())
    if torch.cuda.is_available() and len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["rng"]["cuda"]])
    return progress


def _read(path: Path, learner: MetaLearner) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: found no {path}; give a folder that scripts/train.py has written to")
    device = next(learner.parameters()).device
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint: {path} is damaged or none of ours ({error}); restore or delete it") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint: {path} has format {found}, expected {FORMAT}; use the version that wrote it")
    return state


def _restore(state: dict[str, Any], path: Path, learner: MetaLearner) -> Progress:
    try:
        learner.load_state_dict(state["learner"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit the learner, build it as the run did: {error}") from error
    learner.vectorize = state["vectorize"]
    return Progress(**state["progress"])


def _cuda_states() -> list[torch.Tensor]:
    """Empty unless CUDA is in use: asking would start it."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda.get_rng_state_all() if used else []
