"""What the solvers share that approximate the core B of A = B + σI and invert that with a shift."""

from __future__ import annotations

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import Solver


class CoreSolver(Solver):
    """A solver that approximates B of A = B + σI, and inverts the approximation plus (σ + ρ)I.

    Attributes:
        rho: ρ ≥ 0, the damping that the solver adds. If None, it is 0 where σ > 0, else 0.01.
    """

    rho: float | None

    def damping(self, sigma: float) -> float:
        """The damping ρ that is used beside a shift σ."""
        if self.rho is not None:
            return self.rho
        return 0.0 if sigma > 0 else 0.01

    def check_rho(self) -> None:
        """Raise ValueError if ρ is negative."""
        if self.rho is not None and not self.rho >= 0:
            name = type(self).__name__
            raise ValueError(f"{name} rho: got {self.rho}, expected a number ≥ 0, or None")

    def split(self, operator: LinearOperator) -> tuple[LinearOperator, float]:
        """The core B and the shift s = σ + ρ.

        Raises:
            ValueError: The shift is not positive.
        """
        core, sigma = operator.split()
        shift = float(sigma) + self.damping(float(sigma))
        if not shift > 0:
            raise ValueError(
                f"{type(self).__name__}: got σ + ρ = {shift}, expected > 0; give rho > 0 or a "
                "proximal strength"
            )
        return core, shift
