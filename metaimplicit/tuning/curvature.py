"""What the tuner chooses for a method that leaves it open: the curvature and its batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metaimplicit.methods import Implicit, Method
from metaimplicit.methods.base import UNSET
from metaimplicit.problem import BilevelProblem, Composite


def default_to_gauss_newton(method: Method, problem: BilevelProblem) -> Method:
    """Choose Gauss–Newton for the loss of a network, whose Hessian is indefinite.

    Every other method is returned as it is: one that names a curvature, one with an option of the
    Hessian (`products`), and one that is not implicit.

    Example:
        >>> from torch import nn
        >>> loss = Composite(outputs=..., loss=..., module=nn.Linear(1, 1))
        >>> problem = BilevelProblem(lambda *_: {}, inner_loss=loss, outer_loss=lambda *_: 0.0)
        >>> default_to_gauss_newton(Implicit(), problem).curvature
        'gauss-newton'
    """
    loss = problem.inner_loss
    if not isinstance(loss, Composite) or loss.module is None:
        return method
    if not isinstance(method, Implicit):
        return method
    return method.with_default_curvature("gauss-newton")


def bind_curvature_batch(method: Method, batch: Any) -> Method:
    """Set the field `batch` of a method that has one and leaves it unset.

    Example:
        >>> bind_curvature_batch(Implicit(), "a batch").batch
        'a batch'
    """
    if getattr(method, "batch", None) is not UNSET:
        return method
    unbound: Any = method
    bound: Method = replace(unbound, batch=batch)
    return bound
