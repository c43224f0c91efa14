"""One inner step as a pure function Φ of the training state and the meta-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import OptimizerState
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.shared import dependencies_of_loss
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.random_state import restored_random_state


@dataclass(frozen=True)
class InnerStep:
    """The inner step s_t = Φ_t(s_{t−1}, φ), where s = (θ, optimiser state), as a pure function.

    Attributes:
        problem: The problem, lifted over the task axis.
        inner: The inner loop whose step is taken.
        fixed: The entries of φ that are not arguments of the function.
        unread: The parameters that the loss does not depend on. They stay as they are.
        active: `[tasks]`, False for tasks whose tolerance was met at an earlier step. They stay. It
            is needed if the loop has a tolerance.
        data: What the inner loss sees at this step.
        number: The number of the step in the loop. None stands for a step that belongs to no loop.
    """

    problem: LiftedProblem
    inner: InnerLoop
    fixed: Params
    unread: set[str]
    active: Tensor | None
    data: Any
    number: int | None = None

    def __call__(
        self, params: Params, state: OptimizerState, phi: Params
    ) -> tuple[Params, OptimizerState, Tensor]:
        """Take the step.

        Args:
            params: θ_{t−1}, `{name: [tasks, *shape]}`.
            state: The optimiser's state, by parameter. It may be empty before the first step.
            phi: The entries of φ that are not `fixed`.

        Returns:
            θ_t, the next state of the optimiser, and ‖∂f/∂θ(θ_{t−1})‖ as `[tasks]`.
        """
        meta = {**self.fixed, **phi}

        def total_loss(params: Params) -> Tensor:
            return self.problem.inner(params, meta, self.data).sum()

        gradients = torch.func.grad(total_loss)(params)
        norm = flatten(gradients).norm(dim=-1)

        # torch.func.grad gives zeros for unread parameters, which weight decay would still move.
        used = {name: g for name, g in gradients.items() if name not in self.unread}
        state = {name: state.get(name, {}) for name in params}
        next_params, next_state = self.inner.take_step(params, used, state, meta, step=self.number)
        if self.inner.tol is not None and self.active is not None:
            moves = self.active & ~(norm.detach() <= self.inner.tol)
            for name, p in next_params.items():
                mask = moves.reshape(-1, *[1] * (p.dim() - 1))
                next_params[name] = torch.where(mask, p, params[name])
        return next_params, next_state, norm


def read_by_loss(
    problem: LiftedProblem, params: Params, meta: Params, *, data: Any
) -> tuple[set[str], set[str]]:
    """What the inner loss depends on. It draws no random numbers: those are for the step itself.

    Args:
        problem: The lifted problem.
        params: θ, `{name: [tasks, *shape]}`.
        meta: φ, tensors of which those that require grad are looked for.
        data: What the inner loss sees.

    Returns:
        The names of the meta-parameters that it depends on, and those of the parameters that it
        does not depend on.

    Raises:
        ValueError: It depends on a tensor that requires grad and is not in `meta`.
    """
    variables = leaves(params)
    with restored_random_state(next(iter(params.values())).device):
        losses = problem.inner(variables, meta, data)
    return dependencies_of_loss(problem, losses, variables, meta=meta)


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
