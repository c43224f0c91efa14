"""Curvature as linear operators on `[tasks, n]`."""

from metaimplicit.operators.base import Identity, Invertible, LinearOperator, Scaled, Sum
from metaimplicit.operators.curvature import (
    GGN,
    Expectation,
    Fisher,
    Hessian,
    Likelihood,
    Products,
    central_difference,
)
from metaimplicit.operators.diagonal import Diagonal
from metaimplicit.operators.kronecker import KroneckerFactored

__all__ = [
    "GGN",
    "Diagonal",
    "Expectation",
    "Fisher",
    "Hessian",
    "Identity",
    "Invertible",
    "KroneckerFactored",
    "Likelihood",
    "LinearOperator",
    "Products",
    "Scaled",
    "Sum",
    "central_difference",
]
