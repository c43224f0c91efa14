"""One inner step as a pure function Φ of the training state and the meta-parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import check_twice_differentiable
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import OptimizerState
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.shared import dependencies_of_loss
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.random_state import restored_random_state


def take_inner_step(
    params: Params,
    state: OptimizerState,
    phi: Params,
    *,
    problem: LiftedProblem,
    inner: InnerLoop,
    fixed: Params,
    unread: set[str],
    data: Any,
    active: Tensor | None = None,
    number: int | None = None,
) -> tuple[Params, OptimizerState, Tensor]:
    """The inner step s_t = Φ_t(s_{t−1}, φ), where s = (θ, optimiser state), as a pure function.

    Args:
        params: θ_{t−1}, `{name: [tasks, *shape]}`.
        state: The optimiser's state, by parameter. It may be empty before the first step.
        phi: The entries of φ that are not `fixed`.
        problem: The problem, lifted over the task axis.
        inner: The inner loop whose step is taken.
        fixed: The other entries of φ.
        unread: The parameters that the loss does not depend on. They stay as they are.
        data: What the inner loss sees at this step.
        active: `[tasks]`, False for tasks whose tolerance was met at an earlier step. They stay. It
            is needed if the loop has a tolerance.
        number: The number of the step in the loop. None stands for a step that belongs to no loop.

    Returns:
        θ_t, the next state of the optimiser, and ‖∂f/∂θ(θ_{t−1})‖ as `[tasks]`.
    """
    meta = {**fixed, **phi}

    def total_loss(params: Params) -> Tensor:
        return problem.inner(params, meta, data).sum()

    gradients = torch.func.grad(total_loss)(params)
    norm = flatten(gradients).norm(dim=-1)

    # torch.func.grad gives zeros for unread parameters, which weight decay would still move.
    used = {name: g for name, g in gradients.items() if name not in unread}
    state = {name: state.get(name, {}) for name in params}
    next_params, next_state = inner.take_step(
        params,
        used,
        state,
        meta,
        step=number,
    )
    if inner.tol is not None and active is not None:
        moves = active & ~(norm.detach() <= inner.tol)
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
        ValueError: It depends on a tensor that requires grad and is not in `meta`. Or it has no
            second derivative in θ.
    """
    variables = leaves(params)
    with restored_random_state(next(iter(params.values())).device):
        losses = problem.inner(variables, meta, data)
    check_twice_differentiable([losses], variables.values(), ends=meta.values())
    return dependencies_of_loss(problem, losses, variables, meta=meta)
