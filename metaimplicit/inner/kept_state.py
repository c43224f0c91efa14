"""The optimiser's state of tasks that stop while others go on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.step import align_tasks
from metaimplicit.iterate import OptimizerState, numbers_of, tensors_of
from metaimplicit.params import Params


class KeptState:
    """What the optimiser's state was when each task stopped. The loop itself carries one on.

    Args:
        params: θ_0, `{name: [tasks, *shape]}`.
        state: The state before the first step.
        initial: The slots of each parameter that do not start at zero, as numbers or tensors.

    Example:
        >>> kept = KeptState({"w": torch.zeros(2)}, {}, {})
        >>> for t, active in ((1, [True, True]), (2, [True, False])):
        ...     state = {"w": {"mean": torch.full((2,), float(t)), "step": t}}
        ...     kept.update(state, torch.tensor(active))
        >>> state = kept.finish(torch.tensor([2, 1]))
        >>> state["w"]["mean"], state["w"]["step"]
        (tensor([2., 1.]), tensor([2., 1.], dtype=torch.float64))
    """

    def __init__(self, params: Params, state: OptimizerState, initial: OptimizerState) -> None:
        self._params = params
        self._initial = initial
        self._tensors = tensors_of(state)
        self._numbers = [numbers_of(state)]

    def update(self, state: OptimizerState, active: Tensor) -> None:
        """Note the state after a step.

        Args:
            state: The state, by parameter.
            active: Which tasks took the step, `[tasks]`, bool. The others had stopped.
        """
        self._numbers.append(numbers_of(state))
        for name, slots in tensors_of(state).items():
            mask = align_tasks(active, self._params[name])
            kept = self._tensors.setdefault(name, {})
            for key, new in slots.items():
                kept[key] = torch.where(mask, new.detach(), self._before(name, key, kept))

    def finish(self, taken: Tensor) -> OptimizerState:
        """The state of each task after the steps that it took.

        Args:
            taken: Their numbers, `[tasks]`. If they differ, the numbers in the state, such as a
                count of steps, become tensors, `[tasks, 1, …]`.
        """
        counts: list[int] = taken.tolist()
        state = {name: dict(slots) for name, slots in self._tensors.items()}
        for name, slots in self._numbers[-1].items():
            for key in slots:
                values = [self._number(name, key, count) for count in counts]
                number = values[0] if len(set(values)) == 1 else self._spread(values, name)
                state.setdefault(name, {})[key] = number
        return state

    def _before(self, name: str, key: str, kept: dict[str, Any]) -> Any:
        """A slot before the step. One that did not exist has its initial value."""
        before = kept.get(key, self._initial.get(name, {}).get(key, 0.0))
        return before.detach() if isinstance(before, Tensor) else before

    def _number(self, name: str, key: str, count: int) -> Any:
        default = self._initial.get(name, {}).get(key, 0)
        return self._numbers[count].get(name, {}).get(key, default)

    def _spread(self, values: list[float], name: str) -> Tensor:
        """A number for each task, in double precision where the device has it."""
        p = self._params[name]
        dtype = torch.float32 if p.device.type == "mps" else torch.float64
        return align_tasks(torch.tensor(values, dtype=dtype, device=p.device), p)
