"""Inner loops θ₀ → θ_T."""

from collections.abc import Callable

from metaimplicit.inner.base import InnerLoop, Trajectory
from metaimplicit.inner.lbfgs import LBFGS
from metaimplicit.inner.loops import GradientDescent, TorchOptimizer
from metaimplicit.inner.trust_region import NewtonCG

INNER: dict[str, Callable[[], InnerLoop]] = {
    "gradient-descent": GradientDescent,
    "lbfgs": LBFGS,
    "newton-cg": NewtonCG,
}


def make_inner(inner: str | InnerLoop) -> InnerLoop:
    """The inner loop itself, or the one of a flag with its defaults.

    Raises:
        ValueError: an unknown flag.
    """
    if isinstance(inner, InnerLoop):
        return inner
    if inner not in INNER:
        raise ValueError(
            f"inner: got {inner!r}, expected one of {', '.join(INNER)}, or an InnerLoop"
        )
    return INNER[inner]()


__all__ = [
    "INNER",
    "LBFGS",
    "GradientDescent",
    "InnerLoop",
    "NewtonCG",
    "TorchOptimizer",
    "Trajectory",
    "make_inner",
]
