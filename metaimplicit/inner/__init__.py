"""Inner loops θ₀ → θ_T."""

from metaimplicit.inner.base import InnerLoop, Trajectory
from metaimplicit.inner.lbfgs import LBFGS
from metaimplicit.inner.loops import GradientDescent, TorchOptimizer

__all__ = ["LBFGS", "GradientDescent", "InnerLoop", "TorchOptimizer", "Trajectory"]
