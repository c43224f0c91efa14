"""The state of a run: all that it needs to continue to the same bits."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from metaimplicit.learner import MetaLearner, solver_generator
from metaimplicit.methods import Method
from metaimplicit.optimizer_state import (
    check_optimizer_type,
    load_optimizer_state,
    optimizer_state,
)
from metaimplicit.training.hyperparameters import warned_of_changes
from metaimplicit.training.progress import Progress
from metaimplicit.training.rotation import State


class Resumable(Protocol):
    """Something with a state to save, such as a sampler of episodes."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers of tensors, numbers and strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


def collect_state(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    sampler: Resumable,
    progress: Progress,
) -> dict[str, Any]:
    """The states of learner, optimiser, sampler and random generators, and how far the run is."""
    return {
        "progress": asdict(progress),
        "learner": learner.state_dict(),
        "vectorize": learner.vectorize,
        "optimizer": optimizer_state(optimizer),
        "sampler": sampler.state_dict(),
        "rng": random_states(learner.method),
    }


def restore_state(
    state: State,
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    *,
    sampler: Resumable,
    source: str,
) -> Progress:
    """Continue from what `collect_state` returned, and return how far the run was.

    Args:
        state: The state.
        learner: A learner built as that of the run.
        optimizer: An optimiser of its parameters, of the same type.
        sampler: A sampler of the same stream of episodes.
        source: Where the state comes from, for errors.

    Raises:
        ValueError: The state belongs to another learner, optimiser or sampler.
    """
    check_optimizer_type(optimizer, state["optimizer"])
    progress = restore_learner(state, learner, source)
    with warned_of_changes(optimizer, source):
        load_optimizer_state(optimizer, state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    set_random_states(state["rng"], learner.method)
    return progress


def restore_learner(state: State, learner: MetaLearner, source: str) -> Progress:
    """Restore the learner alone, with its choice between vmap and the loop."""
    if "learner" not in state:
        raise ValueError(f"checkpoint: {source} holds no learner, but a tuner; use load_tuner")
    try:
        learner.load_state_dict(state["learner"])
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint: {source} does not fit the learner; build it as the run did: {error}"
        ) from error
    learner.vectorize = state["vectorize"]
    return Progress(**state["progress"])


def random_states(method: Method) -> dict[str, Any]:
    """The states of the generators of torch, NumPy and Python, and of that of a method's solver."""
    generator = solver_generator(method)
    # Asking for the state of CUDA would initialise it.
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": tree_map_only(np.ndarray, np.ndarray.tolist, np.random.get_state(legacy=False)),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "solver": None if generator is None else generator.get_state(),
    }


def set_random_states(states: dict[str, Any], method: Method) -> None:
    """Make the states that `random_states` returned the present ones."""
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:  # not in the states of earlier versions
        np.random.set_state(states["numpy"])
        python = states["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    generator = solver_generator(method)
    if generator is not None and states.get("solver") is not None:
        generator.set_state(states["solver"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
