"""What happened on the way to a hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metaimplicit.solvers import SolverState, Status


@dataclass(frozen=True)
class Report:
    """What happened on the way to a hypergradient. Its tensors are `[tasks]`.

    The fields from `curvature` on describe the solve. They keep their defaults for methods without
    one.

    Attributes:
        method: The method as it was used, with its solver.
        inner_steps: The steps that each task took.
        inner_gradient_norm: ‖∂f/∂θ‖, at θ_T for `Implicit` (whose theorem requires 0) and `SAMA`,
            at θ_{T−1} for all others.
        curvature: What A is made of.
        chosen: What the solver `Auto` chose, and why.
        products: The products with A that were executed, each over all tasks.
        residual: ‖v − Au‖/‖v‖.
        hessian_residual: ‖v − Hu‖/‖v‖ with the Hessian H = ∂²f/∂θ², whatever A is: the error of
            the curvature, once the `residual` is small. None unless `Implicit(check_curvature)`.
        status: Members of `Status`. `hypergradient` sets NOT_STATIONARY.
        rayleigh: The smallest uᵀAu/uᵀu that the solver met.
        sigma: σ, all of A that is known to be a multiple of the identity.
        rho: ρ, the damping that the solver adds to it.
        error_bound: ‖v − Au‖/σ ≥ ‖u − A⁻¹v‖. It bounds the error of the solve, and says nothing of
            stationarity or of Gauss–Newton against the Hessian. None unless σ > 0 and A − σI is
            positive semi-definite.
        leftover: The first-order change of g if the inner loop went on to its end, −uᵀ ∂f/∂θ. To
            be read beside g. It is 0 at a stationary point.
        spectral_radius: That of one step of the inner loop, estimated by `FixedPoint`. The loop
            converges if it is below 1.
        tasks_by: How the tasks were batched, `"vmap"` or `"loop"`. If vmap was found to be wrong or
            impossible, the reason stands behind it.
        features: How the part of a model that does not adapt was evaluated: "once", or the reason
            why it was evaluated at every inner step. Empty if there is no such part.
        state: What makes the next solve of a nearby problem cheaper: the solution, a sketch. Pass
            it to the next call of `hypergradient`, or save it with a checkpoint.

    Example:
        >>> report = Report("cg", torch.tensor([5]), torch.tensor([0.1]), status=torch.tensor([0]))
        >>> report.share(Status.CONVERGED)
        1.0
    """

    method: str
    inner_steps: Tensor
    inner_gradient_norm: Tensor
    curvature: str | None = None
    chosen: str = ""
    products: int = 0
    residual: Tensor | None = None
    hessian_residual: Tensor | None = None
    status: Tensor | None = None
    rayleigh: Tensor | None = None
    sigma: float = 0.0
    rho: float = 0.0
    error_bound: Tensor | None = None
    leftover: Tensor | None = None
    spectral_radius: Tensor | None = None
    tasks_by: str = ""
    features: str = ""
    state: SolverState = field(default_factory=SolverState, repr=False)

    def judged_by(self, losses: Tensor, tolerance: float) -> Report:
        """The report in which a solve away from a stationary point is NOT_STATIONARY.

        Such a solve converged, but the inner loop did not, so that the derivative of its end may
        differ by more than g itself would still change.

        Args:
            losses: g of each task, `[tasks]`.
            tolerance: The largest |leftover| beside |g|.
        """
        if self.leftover is None or self.status is None:
            return self
        far = self.leftover.abs() > tolerance * losses.abs()
        unsettled = far & (self.status == int(Status.CONVERGED))
        status = torch.where(unsettled, int(Status.NOT_STATIONARY), self.status)
        return replace(self, status=status)

    def share(self, status: Status) -> float:
        """The share of tasks whose solve ended with `status`. It is 0 without a solve."""
        if self.status is None:
            return 0.0
        return (self.status == int(status)).double().mean().item()
