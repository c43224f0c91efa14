"""Inner loops θ₀ → θ_T. A new inner loop is one file and one row of `INNER_LOOPS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from metaimplicit.inner.base import InnerLoop, Trajectory
from metaimplicit.inner.convex_losses import (
    ConvexLoss,
    Logistic,
    SmoothHinge,
    SoftmaxCrossEntropy,
    SquaredError,
)
from metaimplicit.inner.exact import Newton, Ridge
from metaimplicit.inner.known import KnownSolution, NoSteps
from metaimplicit.inner.lbfgs import LBFGS
from metaimplicit.inner.linear_head import LinearHead
from metaimplicit.inner.loops import GradientDescent, TorchOptimizer
from metaimplicit.inner.optimizers import SGDW
from metaimplicit.inner.proximal_gradient import ProximalGradient
from metaimplicit.inner.regularizers import (
    BoxConstraint,
    GroupLasso,
    L1Norm,
    Regularizer,
    SimplexConstraint,
)
from metaimplicit.inner.trust_region import NewtonCG

# A row is called when its loop is needed, since making a torch optimiser imports torch's compiler.
INNER_LOOPS: dict[str, Callable[[], InnerLoop]] = {
    "gradient-descent": GradientDescent,
    "momentum": partial(GradientDescent, momentum=0.9),
    "adam": partial(TorchOptimizer, torch.optim.Adam),
    "adamw": partial(TorchOptimizer, torch.optim.AdamW),
    "rmsprop": partial(TorchOptimizer, torch.optim.RMSprop),
    "adagrad": partial(TorchOptimizer, torch.optim.Adagrad),
    "lbfgs": LBFGS,
    "newton-cg": NewtonCG,
    "ridge": Ridge,
    "newton": Newton,
    "none": NoSteps,
}


def make_inner(inner: str | InnerLoop) -> InnerLoop:
    """The inner loop that a flag names, with its defaults. An `InnerLoop` is returned as it is.

    Raises:
        ValueError: The flag is unknown.

    Example:
        >>> make_inner("momentum").momentum
        0.9
    """
    if isinstance(inner, InnerLoop):
        return inner
    if not isinstance(inner, str) or inner not in INNER_LOOPS:
        known = ", ".join(INNER_LOOPS)
        raise ValueError(f"inner: got {inner!r}, expected one of {known}, or an InnerLoop")
    return INNER_LOOPS[inner]()


__all__ = [
    "INNER_LOOPS",
    "LBFGS",
    "SGDW",
    "BoxConstraint",
    "ConvexLoss",
    "GradientDescent",
    "GroupLasso",
    "InnerLoop",
    "KnownSolution",
    "L1Norm",
    "LinearHead",
    "Logistic",
    "Newton",
    "NewtonCG",
    "NoSteps",
    "ProximalGradient",
    "Regularizer",
    "Ridge",
    "SimplexConstraint",
    "SmoothHinge",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "TorchOptimizer",
    "Trajectory",
    "make_inner",
]
