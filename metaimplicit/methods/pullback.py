"""θ* as a function of φ that autograd differentiates by the pullback of a method."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaimplicit.methods.base import Adaptation, Method
from metaimplicit.params import Params
from metaimplicit.solvers import Status


def attach_pullback(adaptation: Adaptation, method: Method, meta: Params) -> Params:
    """θ* as a function of φ, which autograd differentiates once, by the adaptation's pullback.

    Args:
        adaptation: θ* and its pullback.
        method: The method that made it.
        meta: φ. Gradients flow to the entries that require grad.

    Returns:
        θ*, `{name: [tasks, *shape]}`. Its backward pass raises ValueError for a gradient that the
        method cannot give, and RuntimeError if an entry of φ was changed in place. The backward
        pass of that backward pass raises RuntimeError.
    """
    phi = {name: m for name, m in meta.items() if m.requires_grad}

    def pull_back(vectors: tuple[Tensor, ...]) -> list[Tensor | None]:
        v = {name: x.detach() for name, x in zip(adaptation.params, vectors, strict=True)}
        gradients, report = adaptation.pull_back(v, phi)
        # Other failures have a warning of their own.
        if report.residual is not None and report.share(Status.MAX_STEPS) > 0:
            warnings.warn(
                f"argmin: the linear system was left with a residual of {report.residual.max():.1e}"
                "; take more solver steps",
                RuntimeWarning,
                stacklevel=2,
            )
        for name in phi:
            if gradients[name] is None:
                method.check_reach(name, adaptation.dependencies)
        return [gradients[name] for name in phi]

    theta = tuple(adaptation.params.values())
    values = _WithPullback.apply(theta, pull_back, *phi.values())
    return dict(zip(adaptation.params, values, strict=True))


class _WithPullback(torch.autograd.Function):
    """Given values as a function of inputs, whose backward pass is a given pullback."""

    @staticmethod
    def forward(
        ctx: Any,
        values: tuple[Tensor, ...],
        pull_back: Callable[[tuple[Tensor, ...]], list[Tensor | None]],
        *inputs: Tensor,
    ) -> Any:
        ctx.pull_back = pull_back
        ctx.save_for_backward(*inputs)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        inputs = ctx.saved_tensors  # raises an error if one was changed in place
        second_derivative = torch.is_grad_enabled()
        with torch.enable_grad():
            gradients = ctx.pull_back(vectors)
        if second_derivative:
            gradients = [
                None if g is None else _DifferentiableOnce.apply(g, *inputs, *vectors)
                for g in gradients
            ]
        return None, None, *gradients


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on a gradient. To differentiate it, with respect to any input, is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "argmin is differentiable once under an implicit method; use method='unrolled' for "
            "higher derivatives"
        )
