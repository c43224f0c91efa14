"""Where an inner loop stands, as values that can be continued from and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.params import Params, detached

OptimizerState = dict[str, dict[str, Any]]  # by parameter: its slots, tensors and numbers


@dataclass(frozen=True)
class Sensitivity:
    """Z = ∂(θ, optimiser state)/∂φ, one tangent for every number of φ, which forward mode carries.

    Args:
        meta: The names of the entries of φ, in the order of the tangents.
        params: ∂θ/∂φ, `{name: [dim φ, tasks, *shape]}`.
        state: The derivatives of the optimiser's tensors, likewise.
    """

    meta: tuple[str, ...]
    params: Params
    state: OptimizerState

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and strings, which `torch.load(weights_only=True)` reads."""
        return {"meta": list(self.meta), "params": self.params, "state": self.state}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`."""
        return cls(tuple(stored["meta"]), stored["params"], stored["state"])


@dataclass(frozen=True)
class Iterate:
    """s_t = (θ_t, the optimiser's state): all that an inner loop needs to continue.

    Pass it to the next call of `hypergradient` as `start`, instead of starting at `init`.

    Args:
        params: θ_t, `{name: [tasks, *shape]}`. The task axis comes first, batched or not.
        state: The optimiser's state, by parameter.
        sensitivity: The derivative that the method `Forward` carries along.
        companion: The second iterate that the method `ValueFunction` carries along.
        optimizer: The name of the optimiser that left the state, empty if it is not known.
    """

    params: Params
    state: OptimizerState = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    companion: Iterate | None = None
    optimizer: str = ""

    @property
    @torch.inference_mode(False)
    def single(self) -> Params:
        """A copy of θ_t of one problem, without the task axis, `{name: [*shape]}`."""
        return {name: p.squeeze(0).clone() for name, p in self.params.items()}

    @property
    def _has_state(self) -> bool:
        """Whether an optimiser has left anything here."""
        z = self.sensitivity
        states = [self.state, {} if z is None else z.state]
        below = self.companion is not None and self.companion._has_state
        return below or any(slots for state in states for slots in state.values())

    def for_optimizer(self, name: str) -> Iterate:
        """Where an optimiser of this name can start: without the state of another one.

        Example:
            >>> end = Iterate({"w": torch.ones(1)}, {"w": {"step": 3}}, optimizer="Adam")
            >>> end.for_optimizer("Adam") is end, end.for_optimizer("SGD").state
            (True, {})
        """
        if name == self.optimizer or not name or not self.optimizer or not self._has_state:
            return self
        z = self.sensitivity
        y = self.companion
        return Iterate(
            params=self.params,
            sensitivity=None if z is None else replace(z, state={}),
            companion=None if y is None else Iterate(y.params),
        )

    def detach(self) -> Iterate:
        """The same values without a graph."""
        sensitivity = None
        if self.sensitivity is not None:
            sensitivity = Sensitivity.from_dict(tree_map(_detach, self.sensitivity.to_dict()))
        return Iterate(
            params=detached(self.params),
            state={name: _detach_slots(slots) for name, slots in self.state.items()},
            sensitivity=sensitivity,
            companion=None if self.companion is None else self.companion.detach(),
            optimizer=self.optimizer,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors and numbers, which `torch.load(weights_only=True)` reads."""
        return {
            "params": self.params,
            "state": self.state,
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_dict(),
            "companion": None if self.companion is None else self.companion.to_dict(),
            "optimizer": self.optimizer,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Iterate:
        """The inverse of `to_dict`."""
        sensitivity = stored["sensitivity"]
        companion = stored["companion"]
        return cls(
            params=stored["params"],
            state=stored["state"],
            sensitivity=None if sensitivity is None else Sensitivity.from_dict(sensitivity),
            companion=None if companion is None else Iterate.from_dict(companion),
            optimizer=stored.get("optimizer", ""),  # which older files do not have
        )


def _detach_slots(slots: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _detach(x) for name, x in slots.items()}


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def tensors_of(state: OptimizerState) -> OptimizerState:
    """The tensors of an optimiser's state."""
    return {
        name: {key: x for key, x in slots.items() if isinstance(x, Tensor)}
        for name, slots in state.items()
    }


def numbers_of(state: OptimizerState) -> OptimizerState:
    """What is no tensor in an optimiser's state, such as a count of steps."""
    return {
        name: {key: x for key, x in slots.items() if not isinstance(x, Tensor)}
        for name, slots in state.items()
    }


def merge_state(numbers: OptimizerState, tensors: OptimizerState) -> OptimizerState:
    """The state that `numbers_of` and `tensors_of` split."""
    names = {**numbers, **tensors}
    return {name: {**numbers.get(name, {}), **tensors.get(name, {})} for name in names}
