"""A tower at work: each level with the tensors that it moves, its values and its state."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metaimplicit.tuning.flat_layout import FlatLayout
from metaimplicit.tuning.free_meta import FreeMeta
from metaimplicit.tuning.levels import Hyperparameters, Level, Slots


class RunningLevel:
    """A level at work on some tensors, with the running levels above it.

    A step is `update_hyperparameters`, which steps the level above, then `update_parameters`.
    Gradients, directions and states are flat, `[n]`: all elements of all the tensors.

    Args:
        level: The optimiser.
        variables: The tensors that it moves, of one dtype on one device: the parameters of a group,
            or the free coordinates of the level below.
        initial_values: Every hyperparameter's value to start from, by name.

    Attributes:
        level: The optimiser.
        above: The running level that moves the hyperparameters, or None.
        values: The present values of the hyperparameters that are learnt.
        constants: The present values of the others.
        steps: The number of steps taken.

    Raises:
        ValueError: A value is out of range or outside its domain.

    Example:
        >>> from metaimplicit.tuning.hyperoptimizers import SGD
        >>> level = SGD(0.5, optimizer=SGD(0.1))
        >>> tower = RunningLevel(level, [torch.ones(1)], level.initial_values)
        >>> [running.values for running in tower.levels()]
        [{'lr': tensor(0.5000)}, {}]
    """

    def __init__(
        self, level: Level, variables: Sequence[Tensor], initial_values: dict[str, float]
    ) -> None:
        for name, value in initial_values.items():
            level.check_value(name, value)
        dtype = torch.promote_types(variables[0].dtype, torch.float32)

        self.level = level
        self.steps = 0
        self._names = tuple(initial_values)
        self._granularity = level.granularity
        self._layout = FlatLayout(variables)
        self._prototype = variables[0].new_zeros((), dtype=dtype)
        self.constants = {
            name: torch.full_like(self._prototype, value)
            for name, value in initial_values.items()
            if name not in self._granularity
        }
        # A decay that is a constant zero is left out of h, so that no step computes with it.
        self._omitted = {
            name
            for name in self.constants
            if initial_values[name] == 0 and name in level.omitted_at_zero
        }
        self._free = self._free_coordinates(initial_values)
        self.values = self._free.values()
        self.above: RunningLevel | None = None
        if level.optimizer is not None:
            free = list(self._free.tensors.values())
            self.above = RunningLevel(level.optimizer, free, level.optimizer.initial_values)

        self._last_written: dict[str, tuple[Any, int]] = {}
        self._slots: Slots = {}
        # Of the last step: its hyperparameters, and which variables it moved.
        self._h: Hyperparameters = {}
        self._moved = [True] * len(variables)
        # u may be the gradient itself, and is needed one step later: two buffers take turns.
        self._buffers = [self._prototype.new_zeros(self._layout.n) for _ in range(2)]
        self._gradient = self._buffers[0]

    def levels(self) -> Iterator[RunningLevel]:
        """The running levels from this one to the top."""
        yield self
        if self.above is not None:
            yield from self.above.levels()

    def write_group(self, group: dict[str, Any]) -> None:
        """Write copies of the learnt values into a param group."""
        group.update({name: value.clone() for name, value in self.values.items()})
        self._last_written = {name: (group[name], _version(group[name])) for name in self._names}

    def read_group(self, group: dict[str, Any], names: Collection[str] | None = None) -> None:
        """Take the values that were written into a param group since `write_group`.

        Args:
            group: The param group, which a scheduler may have changed.
            names: The hyperparameters to read. If None, all.

        Raises:
            ValueError: A value is out of range or outside its domain.
        """
        for name in self._names if names is None else tuple(names):
            written, version = self._last_written[name]
            if group[name] is written and _version(written) == version:
                continue
            like = self._prototype
            value = torch.as_tensor(group[name], dtype=like.dtype, device=like.device).detach()
            for bound in value.aminmax():
                self.level.check_value(name, bound.item())
            if name in self.constants:
                self.constants[name] = value.clone()
                self._omitted -= {name}
            else:
                free = self._free.tensors[name]
                free.copy_(self.level.domain(name).free(value).expand_as(free))
                self.values = self._free.values()

    def update_hyperparameters(self, gradients: Sequence[Tensor]) -> None:
        """Let the level above take a step in the hyperparameters.

        Their gradient is the derivative of the present loss ℓ in the values that made the last
        step. With g = ∂ℓ/∂θ, and the direction u of the last step,

            dℓ/dlr = −gᵀu,    dℓ/dh = −(∂u/∂h)ᵀ(lr ∘ g).

        Before the first step, and without a level above, nothing moves.

        Args:
            gradients: ∂ℓ/∂θ, one tensor for each variable. `update_parameters` uses them, too.

        Raises:
            FloatingPointError: A hyperparameter leaves its range.
        """
        g = self._gradient = self._buffers[self.steps % 2]
        self._layout.flatten(gradients, out=g)
        if self.above is None or self.steps == 0:
            return
        if not all(self._moved):
            # A variable that stayed does not depend on the hyperparameters of the last step.
            g = self._layout.mask(g, self._moved)
        derivatives = self._free.pull_back(self._derivatives(g), self.values)
        self.above.update_hyperparameters(list(derivatives.values()))
        self.above.update_parameters(list(self._free.tensors.values()))
        self._free.project()
        self.values = self._free.values()
        if self.steps % (1 if g.device.type == "cpu" else 8) == 0:  # it waits for the device
            self._check_values(self.above.level)

    def update_parameters(
        self, variables: Sequence[Tensor], moving: Sequence[bool] | None = None
    ) -> None:
        """θ ← θ − lr ∘ u, with the gradients that `update_hyperparameters` received last.

        Args:
            variables: θ, changed in place.
            moving: Which of them move. If None, all.
        """
        present = self.constants | self.values
        h = {name: value for name, value in present.items() if name not in self._omitted}
        params = None
        if "weight_decay" in h:
            params = self._layout.flatten(variables).to(self._prototype.dtype)
        u = self.level.direction(h, self._slots, self._gradient, params=params)
        self._slots["direction"] = u
        self._h = h
        self._moved = list(moving or [True] * len(variables))
        self.steps += 1

        lr = h["lr"]
        if lr.dim() == 0:
            scales = [lr] * len(variables)
        else:
            scales = self._layout.split(self._expand_lr(lr), variables)
        if len(variables) == 1:
            variables[0].addcmul_(u.view_as(variables[0]), scales[0], value=-1)
            return
        directions = self._layout.split(u, variables)
        moved = [i for i, moves in enumerate(self._moved) if moves]
        torch._foreach_addcmul_(
            [variables[i] for i in moved],
            [directions[i] for i in moved],
            [scales[i] for i in moved],
            value=-1,
        )

    def state(self) -> dict[str, Any]:
        """All that the next step reads, as plain containers of tensors and numbers."""
        return {
            "level": self.level.name,
            "free": self._free.tensors,
            "h": self._h,
            "slots": self._slots,
            "moved": self._moved,
            "steps": self.steps,
            "above": None if self.above is None else self.above.state(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError for the state of another tower, or of other tensors."""
        got = state.get("level")
        expected = self.level.name
        remedy = "build it as the run did"
        if got != expected:
            raise ValueError(f"state_dict: got a level {got}, expected {expected}; {remedy}")
        if (self.above is None) != (state["above"] is None):
            raise ValueError(
                f"state_dict: got a tower of another height, expected this one's; {remedy}"
            )
        self._free.check(state["free"])
        tensors = [x for x in state["slots"].values() if isinstance(x, Tensor) and x.dim()]
        sizes = {x.numel() for x in tensors}
        if sizes - {self._layout.n}:
            raise ValueError(
                f"state_dict: got states of {sorted(sizes)} numbers, expected {self._layout.n}; "
                f"{remedy}"
            )
        if self.above is not None:
            self.above.check(state["above"])

    def load(self, state: dict[str, Any]) -> None:
        """Take over a copy of a state that `check` has accepted."""
        self._free.load(state["free"])
        self.values = self._free.values()
        self.steps = state["steps"]
        self._moved = list(state["moved"])
        self._h = self._copies(state["h"])
        self._slots = self._copies(state["slots"])
        if self.above is not None:
            self.above.load(state["above"])

    def _free_coordinates(self, initial_values: dict[str, float]) -> FreeMeta:
        """The learnt hyperparameters, each of the shape of its granularity."""
        start = {
            name: torch.tensor(initial_values[name], dtype=self._prototype.dtype, device="cpu")
            for name in self._granularity
        }
        free = FreeMeta(start, {name: self.level.domain(name) for name in start})
        for name, kind in self._granularity.items():
            expanded = free.tensors[name].detach().expand(self._layout.shape(kind))
            free.tensors[name] = expanded.to(self._prototype.device, copy=True)
        return free

    def _derivatives(self, g: Tensor) -> Hyperparameters:
        """dℓ/dh of the last step for every h that is learnt, where g = ∂ℓ/∂θ now."""
        derivatives: Hyperparameters = {}
        others = [name for name in self.values if name != "lr"]
        if others:
            # A scalar lr multiplies the result, which has fewer numbers than g.
            lr = self._h["lr"]
            scalar = lr.dim() == 0
            vector = g if scalar else g * self._expand_lr(lr)
            factor = -lr if scalar else -1.0
            pulled = self.level.pull_back(others, self._h, self._slots, vector=vector)
            derivatives = {name: factor * pulled[name] for name in others}
        if "lr" in self.values:
            kind = self._granularity["lr"]
            derivatives["lr"] = -self._layout.dot(g, self._slots["direction"], kind)
        return derivatives

    def _expand_lr(self, lr: Tensor) -> Tensor:
        """The step size of each element, `[n]`."""
        per_tensor = self._granularity.get("lr") == "per-tensor"
        return self._layout.expand(lr) if per_tensor else lr

    def _copies(self, stored: dict[str, Any]) -> dict[str, Any]:
        return {
            name: x.to(self._prototype, copy=True) if isinstance(x, Tensor) else x
            for name, x in stored.items()
        }

    def check_device(self, variable: Tensor) -> None:
        """Raise ValueError for a variable on another device than the state of this tower."""
        device = self._prototype.device
        if variable.device != device:
            raise ValueError(
                f"step: got parameters on {variable.device}, expected them on {device}, where they "
                "were when the optimiser was made; make it after model.to(device)"
            )

    def _check_values(self, above: Level) -> None:
        """Raise FloatingPointError for a value with which no step can be made."""
        for name, value in self.values.items():
            if value.dim() == 0:
                least = most = value.item()
            else:
                least, most = (bound.item() for bound in value.aminmax())
            limit = 1.0 if name in self.level.unit_interval else math.inf
            if least >= 0 and most < limit:
                continue
            moved = "No parameter was moved"
            if value.device.type != "cpu":
                moved += " by this step, but it may have been by the last 7"
            raise FloatingPointError(
                f"{self.level.name} {name}: got {most if least >= 0 else least} after "
                f"{self.steps} steps, expected a number in [0, {limit:g}). The loss is not finite, "
                f"or the step size of the {above.name} above is too large: lower it, or give that "
                f"{above.name} an optimizer. {moved}"
            )


def _version(value: Any) -> int:
    """The number of in-place changes of a tensor, or 0 for a number."""
    return value._version if isinstance(value, Tensor) else 0
