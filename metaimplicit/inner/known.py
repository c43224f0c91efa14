"""Inner loops that take no steps: they end where they start, or at a given point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaimplicit.inner.base import InnerLoop, StepLoss, Trajectory, gradient_norm
from metaimplicit.iterate import OptimizerState
from metaimplicit.params import Params, detached


def read_solution(solution: Any, like: Tensor) -> Params:
    """A copy of a solution as tensors without a graph.

    The backward pass reads it, whatever a solver has written to its own by then.

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
        tensor = numbers.detach().clone() if is_tensor else torch.tensor(numbers, device="cpu")
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
        norm = gradient_norm(loss, self.solution)
        steps = torch.zeros(len(norm), dtype=torch.int64, device=norm.device)
        return Trajectory(detached(self.solution), steps, norm)


@dataclass(frozen=True)
class NoSteps(InnerLoop):
    """A loop of no steps: θ_T = θ_0, with its graph.

    To those who count steps it is one, which does nothing. It is for an initialisation that depends
    on the data, such as that of a prototypical network (Snell et al. 2017).

    Example:
        >>> def loss(params, t):
        ...     return params["w"].square().sum(1)
        >>> NoSteps().run(loss, {"w": torch.ones(1, 1)}, {}, differentiated_steps=0).params
        {'w': tensor([[1.]])}
    """

    steps: int = field(default=1, init=False, repr=False)
    tol: float | None = field(default=None, init=False, repr=False)

    def with_steps(self, steps: int) -> InnerLoop:
        """The loop itself."""
        return self

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
        """The start, and ‖∂f/∂θ‖ there; see `InnerLoop.run`."""
        norm = gradient_norm(loss, start)
        steps = torch.zeros(len(norm), dtype=torch.int64, device=norm.device)
        return Trajectory(
            start,
            steps,
            norm,
            iterates=(start,) if keep_iterates else (),
        )
