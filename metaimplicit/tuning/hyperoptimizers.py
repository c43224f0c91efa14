"""Towers: optimisers whose hyperparameters are moved by optimisers, to any height."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from metaimplicit.tuning.free_meta import FreeMeta
from metaimplicit.tuning.levels import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Granularity,
    Level,
    Numbers,
    RMSProp,
)

__all__ = ["SGD", "AdaGrad", "Adam", "AdamW", "Hyperoptimizer", "Level", "RMSProp"]


class Hyperoptimizer(torch.optim.Optimizer):
    """An optimiser that learns its own hyperparameters (Chandra et al. 2022), by the ordinary training loop.

    With θ_{t+1} = Φ(θ_t, g_t; h_t), `step` finds in g_t, the gradient at θ_t, the derivative of the loss in the
    hyperparameters of the step before,

        dℓ/dh_{t−1} = (∂Φ(θ_{t−1}, g_{t−1}; h_{t−1})/∂h)ᵀ g_t,

    θ_{t−1}, g_{t−1} and the state held constant: reverse mode one step deep. The level above steps h along it, and
    learns its own hyperparameters in the same way; then θ steps, with the new h. The loop is the usual one,
    `loss.backward(); optimizer.step()`: parameters stay the module's leaves, no graph is kept, and gradients may be
    clipped, or averaged over processes, before the step.

    ```python
    optimizer = Hyperoptimizer(model.parameters(), Adam(optimizer=SGD(1e-5)))           # Adam's lr, β₁, β₂ by SGD
    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(optimizer=SGD())))
    ```

    Each parameter group has a tower of its own, and may start elsewhere (`{"params": …, "lr": 0.1}`). `group["lr"]` and
    its like are the present values, tensors where they are learnt; what is written there, as by a scheduler, is taken
    up by the next step.

    Args:
        params: tensors, or groups of them, as of any optimiser of torch.
        tower: the optimiser of the parameters, with the level above as its `optimizer`, and so on.

    Raises:
        ValueError: no parameter of a group requires grad; a group on several devices or of several types.
    """

    def __init__(self, params: Iterable[Any], tower: Level) -> None:
        self.tower = tower
        self._towers: list[_Running] = []
        super().__init__(params, dict(tower.initial_values))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, where = self.param_groups.pop(), f"param group {len(self.param_groups)}"
        if not any(p.requires_grad for p in group["params"]):
            raise ValueError(f"{where}: got no parameter that requires grad, expected one or more")
        if not all(p.is_floating_point() for p in group["params"]):
            raise ValueError(
                f"{where}: got parameters that are no real floating-point numbers; use torch.view_as_real"
            )
        if foreign := sorted(
            name for name in _FOREIGN & set(group) - set(self.tower.initial_values) if group[name]
        ):
            raise ValueError(
                f"{where}: got {foreign}, expected some of the tower's own {sorted(self.tower.initial_values)}"
            )
        if len(kinds := {f"{p.dtype} on {p.device}" for p in group["params"]}) > 1:
            raise ValueError(
                f"{where}: got parameters of {', '.join(sorted(kinds))}; give each its own group"
            )
        tower = _Running(
            self.tower,
            group["params"],
            {name: float(group[name]) for name in self.tower.initial_values},
        )
        self.param_groups.append(group)
        self._towers.append(tower)
        tower.tell(group)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        self._hear()
        return {**super().__getstate__(), "tower": self.tower, "_towers": self._towers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group, tower in zip(self.param_groups, state.get("_towers", ()), strict=False):
            tower.tell(group)  # whose copies look as if they had been written

    @property
    def hyperparameters(self) -> list[list[Numbers]]:
        """What is learnt, its present values: for each group, for each level from the parameters' up, by name."""
        self._hear()
        return [[level.values for level in tower.upwards()] for tower in self._towers]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the hyperparameters, then the parameters.

        Args:
            closure: evaluates the loss anew and calls `backward()`, as of any optimiser of torch.

        Raises:
            ValueError: no parameter has a gradient (one without stays, and counts as zero in the averages), or one has
                a sparse one.
            FloatingPointError: a hyperparameter turned non-finite, negative, or a β 1; no parameter was moved. On CUDA
                it is looked at every 8 steps, and up to 8 were made with it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = zip(self.param_groups, self._towers, strict=True)
        moved = [
            (group, tower)
            for group, tower in pairs
            if any(p.grad is not None for p in group["params"])
        ]
        if not moved:
            raise ValueError(
                "step: got no gradient in any parameter, expected loss.backward() before step()"
            )
        if any(
            p.grad is not None and p.grad.layout != torch.strided
            for group, _ in moved
            for p in group["params"]
        ):
            raise ValueError(
                "step: got a sparse gradient, expected dense ones; build the embedding with sparse=False"
            )
        self._hear()
        for (
            group,
            tower,
        ) in moved:  # all the hyperparameters first: where one fails, no parameter has moved
            tower.learn(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]]
            )
        for group, tower in moved:
            tower.move(group["params"], [p.grad is not None for p in group["params"]])
            tower.tell(group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The whole tower: groups, values, states, and what the next derivative needs of the last step."""
        self._hear()
        return {**super().state_dict(), "towers": [tower.state() for tower in self._towers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`, to the same bits.

        Raises:
            ValueError: it is another tower's, or of other parameters.
        """
        towers = state_dict.get("towers", ())
        if len(towers) != len(self._towers):
            raise ValueError(
                f"state_dict: got {len(towers)} towers, expected {len(self._towers)}, one a param group"
            )
        for tower, state in zip(self._towers, towers, strict=True):
            tower.check(state)
        super().load_state_dict(
            {name: part for name, part in state_dict.items() if name != "towers"}
        )
        for group, tower, state in zip(self.param_groups, self._towers, towers, strict=True):
            tower.hear(group, tower.fixed)
            tower.load(state)
            tower.tell(group)

    def _hear(self) -> None:
        for group, tower in zip(self.param_groups, self._towers, strict=True):
            tower.hear(group)


class _Running:
    """A level at work on some tensors, its variables."""

    def __init__(
        self, level: Level, variables: Sequence[Tensor], numbers: dict[str, float]
    ) -> None:
        self.level, self.steps, self._names = level, 0, tuple(numbers)
        self._slots: dict[str, Any] = {}
        self._told: dict[str, tuple[Any, int]] = {}
        self._h: Numbers = {}  # of the last step
        self._moved = [True] * len(variables)  # in it
        self._counts = [p.numel() for p in variables]
        self._like = variables[0].new_zeros(
            (), dtype=torch.promote_types(variables[0].dtype, torch.float32)
        )
        self._gradient = self._like
        self._buffers = [
            self._like.new_zeros(sum(self._counts)) for _ in range(2)
        ]  # of gradients, now and before
        for name, number in numbers.items():
            level.check(name, number)
        self.fixed = {
            n: torch.full_like(self._like, x)
            for n, x in numbers.items()
            if n not in level.granularity
        }
        self._absent = {n for n, x in self.fixed.items() if numbers[n] == 0 and n in level.optional}
        shapes: dict[Granularity, tuple[int, ...]] = {
            "scalar": (), "per-tensor": (len(variables),), "per-element": (sum(self._counts),),
        }  # fmt: skip
        start = {
            name: torch.tensor(numbers[name], dtype=self._like.dtype) for name in level.granularity
        }
        self._free = FreeMeta(start, {name: level.domain(name) for name in start})
        self._free.tensors = {
            name: free.detach()
            .expand(shapes[level.granularity[name]])
            .to(self._like.device, copy=True)
            for name, free in self._free.tensors.items()
        }
        self.values = self._free.values()
        above, free = level.optimizer, list(self._free.tensors.values())
        self.above = None if above is None else _Running(above, free, above.initial_values)

    def upwards(self) -> Iterator[_Running]:
        """The levels from this one to the top."""
        yield self
        if self.above is not None:
            yield from self.above.upwards()

    def tell(self, group: dict[str, Any]) -> None:
        """Write the present values of what is learnt into the group."""
        group.update({name: value.clone() for name, value in self.values.items()})
        self._told = {name: (group[name], _version(group[name])) for name in self._names}

    def hear(self, group: dict[str, Any], names: Collection[str] | None = None) -> None:
        """Take up the values, those of `names` or all, written into the group since it was told."""
        for name in self._names if names is None else tuple(names):
            told, version = self._told[name]
            if group[name] is told and _version(told) == version:
                continue
            value = torch.as_tensor(
                group[name], dtype=self._like.dtype, device=self._like.device
            ).detach()
            for bound in value.aminmax():
                self.level.check(name, bound.item())
            if name in self.fixed:
                self.fixed[name] = value.clone()
                self._absent -= {name}
            else:
                free = self._free.tensors[name]
                free.copy_(self.level.domain(name).free(value).expand_as(free))
                self.values = self._free.values()

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Have the level above step the hyperparameters of the last step along the derivative of the loss in them."""
        self._gradient = g = self._buffers[self.steps % 2]
        if len(gradients) == 1:
            g.copy_(gradients[0].reshape(-1))
        else:
            torch.cat([x.reshape(-1) for x in gradients], out=g)
        if self.above is None or self.steps == 0:
            return
        if not all(self._moved):  # those that stayed depend on nothing of the last step
            g = torch.cat(
                [part * on for part, on in zip(g.split(self._counts), self._moved, strict=True)]
            )
        lr, names = self._h["lr"], [name for name in self.values if name != "lr"]
        slopes = {}
        if names:
            a, factor = (g, -lr) if lr.dim() == 0 else (g * self._spread(lr), -1.0)
            found = self.level.pullback(names, self._h, self._slots, a)
            slopes = {name: factor * found[name] for name in names}
        if "lr" in self.values:
            slopes["lr"] = -self._summed(g, self._slots["direction"])
        pulled = self._free.pull_back(slopes, self.values)
        self.above.learn(list(pulled.values()))
        self.above.move(list(self._free.tensors.values()))
        self._free.project()
        self.values = self._free.values()
        if self.steps % (1 if g.device.type == "cpu" else 8) == 0:
            self._look(self.above.level)

    def move(self, variables: Sequence[Tensor], moving: Sequence[bool] | None = None) -> None:
        """θ ← θ − lr ∘ u, of the gradient last learnt from, where `moving` (None: everywhere)."""
        h = self._h = self._numbers()
        point = (
            torch.cat([x.reshape(-1) for x in variables]).to(self._like.dtype)
            if "weight_decay" in h
            else None
        )
        self._slots["direction"] = u = self.level.direction(h, self._slots, self._gradient, point)
        lr, self.steps, self._moved = (
            h["lr"],
            self.steps + 1,
            list(moving or [True] * len(variables)),
        )
        factors = [lr] * len(variables) if lr.dim() == 0 else self._cut(self._spread(lr), variables)
        if len(variables) == 1:  # a hyperparameter, as a rule
            variables[0].addcmul_(u.view_as(variables[0]), factors[0], value=-1)
            return
        parts = zip(variables, self._cut(u, variables), factors, self._moved, strict=True)
        points, along, by = map(list, zip(*(part[:3] for part in parts if part[3]), strict=True))
        torch._foreach_addcmul_(points, along, by, value=-1)

    def state(self) -> dict[str, Any]:
        """All that the next step reads, tensors and numbers."""
        above = None if self.above is None else self.above.state()
        return {
            "level": self.level.name, "free": self._free.tensors, "h": self._h, "slots": self._slots,
            "moved": self._moved, "steps": self.steps, "above": above,
        }  # fmt: skip

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a state that is not of such a tower."""
        if (found := state.get("level")) != self.level.name:
            raise ValueError(
                f"state_dict: got a level {found}, expected {self.level.name}; build it as the run did"
            )
        if (self.above is None) != (state["above"] is None):
            raise ValueError(
                "state_dict: got a tower of another height, expected this one's; build it as the run did"
            )
        self._free.check(state["free"])
        got = {x.numel() for x in state["slots"].values() if isinstance(x, Tensor) and x.dim()}
        if got - {sum(self._counts)}:
            raise ValueError(
                f"state_dict: got states of {sorted(got)} numbers, expected {sum(self._counts)}"
            )
        if self.above is not None:
            self.above.check(state["above"])

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that was checked."""
        self._free.load(state["free"])
        self.values, self.steps, self._moved = (
            self._free.values(),
            state["steps"],
            list(state["moved"]),
        )
        self._h, self._slots = (
            {
                n: x.to(self._like, copy=True) if isinstance(x, Tensor) else x
                for n, x in state[part].items()
            }
            for part in ("h", "slots")
        )
        if self.above is not None:
            self.above.load(state["above"])

    def _cut(self, flat: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
        return [
            part.view_as(p) for part, p in zip(flat.split(self._counts), variables, strict=True)
        ]

    def _numbers(self) -> Numbers:
        return {n: x for n, x in (self.fixed | self.values).items() if n not in self._absent}

    def _spread(self, lr: Tensor) -> Tensor:
        """lr as it multiplies the flat direction."""
        if self.level.granularity.get("lr") != "per-tensor":
            return lr
        return torch.cat([each.expand(n) for each, n in zip(lr, self._counts, strict=True)])

    def _summed(self, g: Tensor, u: Tensor) -> Tensor:
        """gᵀu, over what shares a step size."""
        match self.level.granularity["lr"]:
            case "scalar":
                return g.dot(u)
            case "per-element":
                return g * u
        return torch.stack(
            [a.dot(b) for a, b in zip(g.split(self._counts), u.split(self._counts), strict=True)]
        )

    def _look(self, above: Level) -> None:
        """Raise FloatingPointError for a value that no step can be made with."""
        for name, value in self.values.items():
            least, most = (
                (x.item() for x in value.aminmax()) if value.dim() else (value.item(),) * 2
            )
            limit = 1.0 if name in self.level.unit_interval else math.inf
            if not (least >= 0 and most < limit):
                late = (
                    ""
                    if value.device.type == "cpu"
                    else " by this step, but it may have been by the last 7"
                )
                raise FloatingPointError(
                    f"{self.level.name} {name}: turned {most if least >= 0 else least} after {self.steps} steps, "
                    f"expected a number in [0, {limit:g}); the loss is not finite, or the step size of the "
                    f"{above.name} above it too large: lower it, or give that an optimizer. No parameter was "
                    f"moved{late}"
                )


_FOREIGN = {  # options of torch's optimisers that no tower reads
    "amsgrad", "betas", "centered", "dampening", "decoupled_weight_decay", "initial_accumulator_value", "lr_decay",
    "maximize", "momentum", "nesterov", "weight_decay", "alpha",
}  # fmt: skip


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0
