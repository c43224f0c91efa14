"""The hyperparameters of a run's optimiser: its scheduled learning rates, and what a run keeps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

INITIAL_RATE = "initial_lr"  # torch's name for the learning rate that a schedule multiplies
# These say which tensors there are, or how fast a step is. The learning rate follows a schedule.
NOT_COMPARED = {"params", "foreach", "fused", "capturable", "differentiable", "lr", INITIAL_RATE}


@contextmanager
def scheduled_rates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Note each group's learning rate for a schedule, and put it back at the end.

    A scheduler of torch has noted one as well, which is put back, too: it may be another one than
    the present. A group that is added meanwhile is noted by `set_rates`.
    """
    earlier_notes = [group.get(INITIAL_RATE) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group[INITIAL_RATE] = group["lr"]
    try:
        yield
    finally:
        # A later change of "lr" would have no effect if the note stayed.
        for group in optimizer.param_groups:
            if INITIAL_RATE in group:
                group["lr"] = group.pop(INITIAL_RATE)
        for group, note in zip(optimizer.param_groups, earlier_notes, strict=False):
            if note is not None:
                group[INITIAL_RATE] = note


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each group to a multiple of the one that is noted for it."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault(INITIAL_RATE, group["lr"]) * factor


@contextmanager
def unchanged_rates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Refuse a change of a learning rate within the block, which `set_rates` would undo.

    Raises:
        ValueError: A learning rate is another one at the end.
    """
    before = [float(group["lr"]) for group in optimizer.param_groups]
    yield
    for rate, group in zip(before, optimizer.param_groups, strict=False):
        if float(group["lr"]) != rate:
            raise ValueError(
                f"before_step: changed a learning rate from {rate:.6g} to "
                f"{float(group['lr']):.6g}, expected it to stay, as schedule sets it; leave "
                "torch's scheduler out, and give schedule=, such as lambda spent: 0.1**spent"
            )


@contextmanager
def warned_of_changes(optimizer: torch.optim.Optimizer, source: str) -> Iterator[None]:
    """Warn of hyperparameters that a state which is loaded in the block changes.

    Args:
        optimizer: The optimiser.
        source: Where the state comes from.
    """
    given_groups = [dict(group) for group in optimizer.param_groups]
    yield
    changes = []
    for number, given in enumerate(given_groups):
        group = optimizer.param_groups[number]
        if INITIAL_RATE in given:
            group.setdefault(INITIAL_RATE, group["lr"])
        of_group = f" of group {number}" if len(given_groups) > 1 else ""
        stored = _hyperparameters(group)
        for name, value in _hyperparameters(given).items():
            if name in stored and stored[name] != value:
                changes.append(f"{name}{of_group} is {stored[name]} there, {value} here")
    if changes:
        warnings.warn(
            f"optimizer: its hyperparameters are not those of {source}, with which the run "
            f"continues ({'; '.join(changes)}); start a new run to change them",
            stacklevel=4,
        )


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers and choices of a group by name, with the learning rate before its schedule."""
    rate = group.get(INITIAL_RATE, group.get("lr"))
    others = {name: value for name, value in group.items() if name not in NOT_COMPARED}
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in ({"lr": rate} | others).items()
    }
