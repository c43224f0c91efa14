"""Curvature as linear operators on `[tasks, n]`."""

from metaimplicit.operators.base import Identity, LinearOperator, Scaled, Sum
from metaimplicit.operators.curvature import (
    Expectation,
    Fisher,
    GaussNewton,
    Hessian,
    Likelihood,
    Products,
    central_difference,
)
from metaimplicit.operators.kronecker import KFAC

__all__ = [
    "KFAC",
    "Expectation",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Likelihood",
    "LinearOperator",
    "Products",
    "Scaled",
    "Sum",
    "central_difference",
]
