"""Curvature as linear operators on `[tasks, n]`."""

from metaimplicit.operators.base import Identity, Invertible, LinearOperator, Scaled, Sum
from metaimplicit.operators.curvature import (
    Expectation,
    Fisher,
    GaussNewton,
    Hessian,
    Likelihood,
    Products,
    central_difference,
)
from metaimplicit.operators.diagonal import Diagonal
from metaimplicit.operators.kronecker import KFAC

__all__ = [
    "KFAC",
    "Diagonal",
    "Expectation",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Identity",
    "Invertible",
    "Likelihood",
    "LinearOperator",
    "Products",
    "Scaled",
    "Sum",
    "central_difference",
]
