"""The optimiser's state and its derivatives, of tasks that stop while others go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.kept_state import KeptState
from metaimplicit.inner.step import align_tasks
from metaimplicit.iterate import Iterate, OptimizerState, Sensitivity, tensors_of


class KeptSensitivity:
    """What forward mode carries of each task when it stopped, as `KeptState` does of the values.

    Args:
        iterate: θ_0 and the state before the first step.
        slots: The slots that do not start at zero, as `KeptState` takes them.
        tangents: The derivatives of the slots before the first step, where they are not 0.

    Example:
        >>> start = Iterate({"w": torch.zeros(2)})
        >>> kept = KeptSensitivity(start, {}, {})
        >>> z = Sensitivity(("lr",), {"w": torch.ones(1, 2)}, {"w": {"mean": torch.ones(1, 2)}})
        >>> end = Iterate({"w": torch.ones(2)}, {"w": {"mean": torch.ones(2)}})
        >>> kept.update(end, z, torch.tensor([True, False]))
        >>> end, z = kept.finish(end, z, torch.tensor([1, 0]))
        >>> end.state["w"]["mean"], z.state["w"]["mean"]
        (tensor([1., 0.]), tensor([[1., 0.]]))
    """

    def __init__(self, iterate: Iterate, slots: OptimizerState, tangents: OptimizerState) -> None:
        self._params = iterate.params
        self._state = KeptState(iterate.params, iterate.state, slots)
        self._tangents = tangents

    def update(self, iterate: Iterate, z: Sensitivity, active: Tensor) -> None:
        """Note s_t and Z_t after a step that the `active` tasks took."""
        self._state.update(iterate.state, active)
        self._tangents = {
            name: self._chosen(name, slots, align_tasks(active, self._params[name]))
            for name, slots in z.state.items()
        }

    def finish(
        self, iterate: Iterate, z: Sensitivity, taken: Tensor
    ) -> tuple[Iterate, Sensitivity]:
        """S and Z of each task after the steps that it took, `[tasks]`."""
        state = self._state.finish(taken)
        count = len(next(iter(z.params.values())))
        # Numbers that have become tensors, such as a count of steps, have no derivative.
        tangents = {
            name: {key: x.new_zeros(count, *x.shape) for key, x in slots.items()}
            | self._tangents.get(name, {})
            for name, slots in tensors_of(state).items()
        }
        return replace(iterate, state=state), replace(z, state=tangents)

    def _chosen(self, name: str, new: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        """Those of `new` in the tasks of the mask; in the others what was kept, or 0."""
        old = self._tangents.get(name, {})
        p = self._params[name]
        return {
            key: torch.where(mask, _aligned(x, p), _aligned(old.get(key, 0.0), p))
            for key, x in new.items()
        }


def _aligned(tangents: Any, p: Tensor) -> Any:
    """Tangents of a slot, `[dim φ, …]`, with as many axes as those of p: `[dim φ, 1, …, …]`.

    A number stays.
    """
    if not isinstance(tangents, Tensor):
        return tangents
    missing = p.dim() + 1 - tangents.dim()
    return tangents.reshape(len(tangents), *[1] * missing, *tangents.shape[1:])
