"""The state of an optimiser, which says of what optimiser it is."""

from __future__ import annotations

from typing import Any

import torch

TYPE = "type"


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its `state_dict` and the name of its class.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> optimizer_state(torch.optim.SGD([weight]))["type"]
        'SGD'
    """
    return optimizer.state_dict() | {TYPE: type(optimizer).__qualname__}


def check_optimizer_type(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError if a state is that of an optimiser of another class.

    Torch loads the state of any class with groups of these sizes. The numbers of one class make no
    sense to another, which fails at its next step, or takes steps of neither. A state without a
    name is taken as it is.
    """
    own = type(optimizer).__qualname__
    stored = state.get(TYPE, own)
    if stored != own:
        raise ValueError(
            f"optimizer: got {own}, expected {stored}, whose state this is; build it as the run did"
        )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned.

    Raises:
        ValueError: It is that of an optimiser of another class. Nothing changes.
    """
    check_optimizer_type(optimizer, state)
    optimizer.load_state_dict({name: part for name, part in state.items() if name != TYPE})
