"""A solution that was found elsewhere, in the place of an inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, flatten, leaves


def read_solution(solution: Any, like: Tensor) -> Params:
    """A solution as tensors without a graph.

    Args:
        solution: `{name: numbers}`. Tensors of floating-point numbers keep their type. Arrays of
            numpy, numbers, lists and integers take that of `like`.
        like: A tensor of the wanted type, on the wanted device.

    Raises:
        ValueError: It is no dict, or an entry of it is not made of real and finite numbers.

    Example:
        >>> read_solution({"w": [1, 2]}, like=torch.zeros(()))
        {'w': tensor([1., 2.])}
    """
    if not isinstance(solution, Mapping) or not solution:
        raise ValueError(
            f"solution: got {type(solution).__name__}, expected a dict of tensors by name"
        )
    return {name: _read_tensor(name, numbers, like) for name, numbers in solution.items()}


def _read_tensor(name: str, numbers: Any, like: Tensor) -> Tensor:
    is_tensor = isinstance(numbers, Tensor)
    try:
        tensor = numbers.detach() if is_tensor else torch.tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"solution[{name!r}]: got {type(numbers).__name__}, expected a tensor or an array of "
            "real numbers"
        ) from error
    if tensor.is_complex():
        raise ValueError(
            f"solution[{name!r}]: got {tensor.dtype}, expected real numbers; use "
            "torch.view_as_real, and write the equation for the real and the imaginary parts"
        )
    if not is_tensor:
        tensor = tensor.to(like)
    elif not tensor.is_floating_point():
        tensor = tensor.to(like.dtype)
    if not bool(tensor.isfinite().all()):
        raise ValueError(
            f"solution[{name!r}]: got numbers that are not finite, expected the solution; look at "
            "what the solver returned"
        )
    return tensor


@dataclass(frozen=True)
class KnownSolution(InnerLoop):
    """A loop of no steps that ends at a given point, wherever it starts.

    Args:
        solution: θ*, `{name: [tasks, *shape]}`, a stationary point of the inner loss.

    Example:
        >>> loop = KnownSolution({"w": torch.tensor([[2.0]])})
        >>> def loss(params, t):
        ...     return (params["w"] - 2).square().sum(1)
        >>> end = loop.run(loss, {"w": torch.zeros(1, 1)}, {}, differentiated_steps=0)
        >>> end.params["w"], end.gradient_norm
        (tensor([[2.]]), tensor([0.]))
    """

    solution: Params
    steps: int = field(default=1, init=False, repr=False)
    tol: float | None = field(default=None, init=False, repr=False)

    differentiable = False

    def run(
        self,
        loss: StepLoss,
        start: Params,
        meta: Params,
        *,
        differentiated_steps: int,
        keep_iterates: bool = False,
        state: OptimizerState | None = None,
    ) -> Trajectory:
        """The solution, and ‖∂f/∂θ‖ there; see `InnerLoop.run`."""
        if differentiated_steps or keep_iterates:
            raise ValueError(
                "solution: got one with a method that differentiates the way to it, which is "
                "unknown; expected an implicit method, such as 'cg'"
            )
        got = {name: list(p.shape) for name, p in self.solution.items()}
        expected = {name: list(p.shape) for name, p in start.items()}
        if got != expected:
            raise ValueError(f"solution: got the shapes {got}, expected {expected}, those of init")
        params = leaves(self.solution)
        total = loss(params, 0).sum()
        gradients = torch.autograd.grad(
            total, list(params.values()), allow_unused=True, materialize_grads=True
        )
        norm = flatten(dict(zip(params, gradients, strict=True))).norm(dim=-1)
        steps = torch.zeros(len(norm), dtype=torch.int64, device=norm.device)
        solution = {name: p.detach() for name, p in params.items()}
        return Trajectory(solution, steps, norm)
