"""Inner loops θ₀ → θ_T."""

from metaimplicit.inner.base import InnerLoop, Trajectory
from metaimplicit.inner.loops import GradientDescent, TorchOptimizer

__all__ = ["GradientDescent", "InnerLoop", "TorchOptimizer", "Trajectory"]
