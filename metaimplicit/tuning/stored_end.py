"""Where an inner loop and its model stood, as read from a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metaimplicit.buffers import stored_buffers
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.params import Params, describe_misfit
from metaimplicit.problem import BilevelProblem, Composite
from metaimplicit.tuning.problem import ModelProblem


def read_end(
    stored: Mapping[str, Any] | None, problem: BilevelProblem, meta: Params
) -> Iterate | None:
    """Where the inner loop stood, on the device of the model if the problem is that of one.

    Args:
        stored: The result of `Iterate.to_dict`, or None.
        problem: The problem that goes on from there.
        meta: φ, at which the problem has a starting point.

    Raises:
        ValueError: The problem is that of a model, whose parameters have other names, shapes or
            types.

    Example:
        >>> problem = BilevelProblem(lambda *_: {}, lambda *_: 0.0, lambda *_: 0.0)
        >>> end = Iterate({"w": torch.ones(1)})
        >>> read_end(end.to_dict(), problem, {}).params
        {'w': tensor([1.])}
    """
    if stored is None or not isinstance(problem, ModelProblem):
        return None if stored is None else Iterate.from_dict(stored)
    start = problem.init(meta, None)
    misfit = describe_misfit(Iterate.from_dict(stored).single, like=start)
    if misfit:
        raise ValueError(f"state: {misfit}; build the model as the run did")
    return Iterate.from_dict(moved_tensors(stored, next(iter(start.values())).device))


def check_optimizer(end: Iterate | None, inner: InnerLoop) -> None:
    """Raise ValueError if `end` has the state of another optimiser than that of `inner`.

    Example:
        >>> from metaimplicit import GradientDescent
        >>> check_optimizer(Iterate({"w": torch.ones(1)}, optimizer="SGD"), GradientDescent())
    """
    if end is not None and end.for_optimizer(inner.optimizer_name) is not end:
        raise ValueError(
            f"state: got that of inner steps of {end.optimizer}, expected steps of "
            f"{inner.optimizer_name}; build the inner loop as the run did"
        )


def model_of(problem: BilevelProblem) -> nn.Module:
    """The model of the inner loss, or an empty module if it names none.

    Example:
        >>> model_of(BilevelProblem(lambda *_: {}, lambda *_: 0.0, lambda *_: 0.0))
        Module()
    """
    loss = problem.inner_loss
    model = loss.module if isinstance(loss, Composite) else None
    return nn.Module() if model is None else model


def read_buffers(stored: Params | None, model: nn.Module) -> Params:
    """The stored buffers of a model. There are none in older files, where `stored` is None.

    The model may have fewer, as one that makes a buffer when it is called.

    Raises:
        ValueError: The model has one that was not stored.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> sorted(read_buffers(dict(norm.named_buffers()), norm))
        ['num_batches_tracked', 'running_mean', 'running_var']
    """
    if stored is None:
        return {}
    own = stored_buffers(model)
    if not own.keys() <= stored.keys():
        raise ValueError(
            f"state: got the buffers {sorted(stored)}, expected {sorted(own)}; build the model as "
            "the run did"
        )
    return stored


def moved_tensors(stored: Any, device: torch.device) -> Any:
    """The same containers, with all their tensors on a device.

    Example:
        >>> moved_tensors({"w": torch.ones(1), "steps": 2}, torch.device("cpu"))
        {'w': tensor([1.]), 'steps': 2}
    """
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, stored)
