"""Towers: optimisers whose hyperparameters are moved by optimisers, to any height."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from metaimplicit.tuning.levels import Hyperparameters, Level
from metaimplicit.tuning.tower import RunningLevel
from metaimplicit.tuning.update_rules import SGD, AdaGrad, Adam, AdamW, RMSProp

__all__ = ["SGD", "AdaGrad", "Adam", "AdamW", "Hyperoptimizer", "Level", "RMSProp"]

# Options of torch's optimisers, which a tower refuses in a param group unless they are its own.
TORCH_OPTIONS = frozenset(
    {
        "alpha",
        "amsgrad",
        "betas",
        "centered",
        "dampening",
        "decoupled_weight_decay",
        "initial_accumulator_value",
        "lr_decay",
        "maximize",
        "momentum",
        "nesterov",
        "weight_decay",
    }
)


class Hyperoptimizer(torch.optim.Optimizer):
    """An optimiser that learns its own hyperparameters h (Chandra et al. 2022).

    Let θ_{t+1} = Φ(θ_t, g_t; h_t), where g_t = ∂ℓ/∂θ(θ_t). From g_t, `step` computes the derivative
    of the loss in the hyperparameters that made the step before,

        dℓ/dh_{t−1} = (∂Φ(θ_{t−1}, g_{t−1}; h_{t−1})/∂h)ᵀ g_t,

    where θ_{t−1}, g_{t−1} and the optimiser's state are constants: reverse mode, one step deep. The
    level above moves h along it, and learns its own hyperparameters in the same way. Then θ moves,
    with the new h.

    It is used as any optimiser of torch: `loss.backward(); optimizer.step()`. Parameters remain the
    leaves of the module, no graph is kept, and gradients may be clipped, or averaged over
    processes, before the step.

    Each param group has its own tower, and may start at its own values
    (`{"params": …, "lr": 0.1}`). `group["lr"]` and the other entries hold the present values, which
    are tensors if they are learnt. Values that a scheduler writes there take effect at the next
    step.

    Args:
        params: The parameters, or param groups, as for any optimiser of torch.
        tower: The optimiser of the parameters. Its `optimizer` is the level above, and so on.

    Attributes:
        tower: The optimiser of the parameters, with its values at the start.

    Raises:
        ValueError: A group has no parameter that requires grad, has parameters of several dtypes
            or devices or that are complex, or sets an option that its tower does not have.

    Example:
        Both gradients point in one direction, so the second step comes after a rise of lr.

        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = Hyperoptimizer([w], SGD(0.1, optimizer=SGD(0.5)))
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     w.backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        tensor(0.6000)
    """

    @torch.inference_mode(False)
    def __init__(self, params: Iterable[Any], tower: Level) -> None:
        self.tower = tower
        self._towers: list[RunningLevel] = []  # one for each param group
        super().__init__(params, dict(tower.initial_values))

    @torch.inference_mode(False)
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its own tower.

        Args:
            param_group: `{"params": …}`, and values of hyperparameters that start elsewhere than
                those of the tower.

        Raises:
            ValueError: See the class. The group is then not added.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        self._check_group(group, name=f"param group {len(self.param_groups)}")
        values = {name: float(group[name]) for name in self.tower.initial_values}
        tower = RunningLevel(self.tower, group["params"], values)
        self.param_groups.append(group)
        self._towers.append(tower)
        tower.write_group(group)

    @property
    def hyperparameters(self) -> list[list[Hyperparameters]]:
        """The present values of all that is learnt.

        `optimizer.hyperparameters[group][level][name]` is a tensor; level 0 is that of the
        parameters.
        """
        self._read_groups()
        return [[level.values for level in tower.levels()] for tower in self._towers]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the hyperparameters, then the parameters.

        A parameter without a gradient does not move, and counts as zero in the averages.

        Args:
            closure: Evaluates the loss again and calls `backward()`, as for any optimiser of torch.

        Returns:
            What the closure returns; None without one.

        Raises:
            ValueError: No parameter has a gradient, one has a sparse gradient, the model was moved
                to another device, or a value that was written into a group is out of range.
            FloatingPointError: A hyperparameter is not finite, is negative, or is a decay of 1. No
                parameter has moved. On CUDA the check is made every 8 steps, so up to 7 steps may
                have used the value.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [
            (group, tower)
            for group, tower in zip(self.param_groups, self._towers, strict=True)
            if any(p.grad is not None for p in group["params"])
        ]
        if not moving:
            raise ValueError(
                "step: got no gradient in any parameter, expected loss.backward() before step()"
            )
        for group, tower in moving:
            _check_dense(group["params"])
            tower.check_device(group["params"][0])

        self._read_groups()
        # All hyperparameters before any parameter: if one fails, no parameter has moved.
        for group, tower in moving:
            params = group["params"]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            tower.update_hyperparameters(gradients)
        for group, tower in moving:
            params = group["params"]
            tower.update_parameters(params, [p.grad is not None for p in params])
            tower.write_group(group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The groups, and every level's values, state, and what the next derivative needs."""
        self._read_groups()
        return {**super().state_dict(), "towers": [tower.state() for tower in self._towers]}

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, to the same bits.

        Raises:
            ValueError: The state is that of another tower or of other parameters. Nothing changes.
        """
        states = state_dict.get("towers", ())
        if len(states) != len(self._towers):
            raise ValueError(
                f"state_dict: got {len(states)} towers, expected {len(self._towers)}, "
                "one for each param group"
            )
        for tower, state in zip(self._towers, states, strict=True):
            tower.check(state)
        groups = {name: part for name, part in state_dict.items() if name != "towers"}
        super().load_state_dict(groups)
        for group, tower, state in zip(self.param_groups, self._towers, states, strict=True):
            tower.read_group(group, tower.constants)
            tower.load(state)
            tower.write_group(group)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has to hold what was written into the groups.
        self._read_groups()
        return {**super().__getstate__(), "tower": self.tower, "_towers": self._towers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group, tower in zip(self.param_groups, state.get("_towers", ()), strict=False):
            # Otherwise the copied entries would pass for newly written ones.
            tower.write_group(group)

    def _read_groups(self) -> None:
        for group, tower in zip(self.param_groups, self._towers, strict=True):
            tower.read_group(group)

    def _check_group(self, group: dict[str, Any], *, name: str) -> None:
        """Raise ValueError for a param group that no tower can move."""
        params = group["params"]
        if not any(p.requires_grad for p in params):
            raise ValueError(f"{name}: got no parameter that requires grad, expected one or more")
        if not all(p.is_floating_point() for p in params):
            raise ValueError(
                f"{name}: got parameters that are not real floating-point numbers; "
                "use torch.view_as_real"
            )
        known = self.tower.initial_values
        foreign = TORCH_OPTIONS & set(group) - set(known)
        unknown = sorted(option for option in foreign if group[option])
        if unknown:
            raise ValueError(
                f"{name}: got {unknown}, expected some of the tower's own {sorted(known)}"
            )
        kinds = sorted({f"{p.dtype} on {p.device}" for p in params})
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: got parameters of {', '.join(kinds)}; give each kind its own group"
            )


def _check_dense(params: Iterable[torch.Tensor]) -> None:
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        raise ValueError(
            "step: got a sparse gradient, expected dense ones; "
            "build the embedding with sparse=False"
        )
