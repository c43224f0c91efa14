"""Curvature as linear operators on `[tasks, n]`."""

from metaimplicit.operators.base import Identity, LinearOperator, Scaled, Sum
from metaimplicit.operators.curvature import GaussNewton, Hessian

__all__ = ["GaussNewton", "Hessian", "Identity", "LinearOperator", "Scaled", "Sum"]
