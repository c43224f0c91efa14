"""Where an inner loop stood, as read from a state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.iterate import Iterate
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem
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
    _check_params(Iterate.from_dict(stored).single, like=start)
    return Iterate.from_dict(moved_tensors(stored, next(iter(start.values())).device))


def moved_tensors(stored: Any, device: torch.device) -> Any:
    """The same containers, with all their tensors on a device.

    Example:
        >>> moved_tensors({"w": torch.ones(1), "steps": 2}, torch.device("cpu"))
        {'w': tensor([1.]), 'steps': 2}
    """
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, stored)


def _check_params(params: Params, *, like: Params) -> None:
    """Raise ValueError unless θ has the names, shapes and types of `like`."""
    for name in params | like:
        got, expected = (
            f"{p.dtype} {list(p.shape)}" if p is not None else "nothing"
            for p in (params.get(name), like.get(name))
        )
        if got != expected:
            raise ValueError(
                f"state: got {got} for the parameter {name!r}, expected {expected}; build the "
                "model as the run did"
            )
