"""What a learner adds to a method that leaves it open."""

from __future__ import annotations

from dataclasses import replace

from metaimplicit.methods import Implicit, Method, Unrolled


def with_default_curvature(method: Method) -> Method:
    """The method. If it is implicit and has no curvature, it takes Gauss–Newton.

    The Hessian of a few-shot support loss is indefinite, and Gauss–Newton is semi-definite.

    Example:
        >>> with_default_curvature(Implicit()).curvature
        'gauss-newton'
    """
    if not isinstance(method, Implicit):
        return method
    return method.with_default_curvature("gauss-newton")


def with_default_weights(method: Method, steps: int) -> Method:
    """The method. If it returns all iterates and has no weights, their mean loss counts.

    Args:
        method: The method.
        steps: T, the number of inner steps.

    Example:
        >>> with_default_weights(Unrolled(iterates=True), steps=3).weights
        (0.25, 0.25, 0.25, 0.25)
    """
    if isinstance(method, Unrolled) and method.iterates and method.weights is None:
        return replace(method, weights=(1 / (steps + 1),) * (steps + 1))
    return method
