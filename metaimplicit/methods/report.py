"""What happened on the way to a hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metaimplicit.params import Params, flatten
from metaimplicit.solvers import SolverState, Status

LOSS_TOLERANCE = 1e-3  # the largest |leftover| of a solution beside |g|
THETA_TOLERANCE = 1e-4  # the largest `relative_leftover`, which errors of θ exceed by 10 or more
DRIFT_TOLERANCE = 1e-6  # both, for loops that drift


@dataclass(frozen=True)
class Report:
    """What happened on the way to a hypergradient. Its tensors are `[tasks]`.

    The fields from `curvature` on describe the solve. They keep their defaults for methods without
    one.

    Attributes:
        method: The method as it was used, with its solver.
        inner_steps: The steps that each task took.
        inner_gradient_norm: ‖∂f/∂θ‖, at θ_T for `Implicit` (whose theorem requires 0), `FixedPoint`
            and `SAMA`. For the others, where the inner loop took it last: at θ_{T−1} for loops of
            gradient steps.
        drift: What keeps the inner loop from settling where the method assumes it to end, in words,
            such as decoupled weight decay. If empty, nothing does.
        curvature: What A is made of.
        chosen: What the solver `Auto` chose, and why.
        products: The products with A that were executed, each over all tasks.
        residual: ‖v − Au‖/‖v‖. That of `ValueFunction` has u = λ(z − y).
        hessian_residual: ‖v − Hu‖/‖v‖ with the Hessian H = ∂²f/∂θ², whatever A is: the error of
            the curvature, once the `residual` is small. None unless `Implicit(check_curvature)`.
        status: Members of `Status`. `judged` sets NOT_STATIONARY.
        rayleigh: The smallest uᵀAu/uᵀu that the solver met.
        sigma: σ, all of A that is known to be a multiple of the identity.
        rho: ρ, the damping that the solver adds to it.
        error_bound: ‖v − Au‖/σ ≥ ‖u − A⁻¹v‖. It bounds the error of the solve, and says nothing of
            stationarity or of Gauss–Newton against the Hessian. None unless σ > 0 and A − σI is
            positive semi-definite.
        leftover: The first-order change of g if the inner loop went on to its end, −uᵀ ∂f/∂θ. To
            be read beside g. It is 0 at a stationary point.
        relative_leftover: The same beside what g changes by if θ changes by its own length; see
            `relative_leftover`. A constant that is added to g, and the scale of f and g, make no
            difference.
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
    drift: str = ""
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
    relative_leftover: Tensor | None = None
    spectral_radius: Tensor | None = None
    tasks_by: str = ""
    features: str = ""
    state: SolverState = field(default_factory=SolverState, repr=False)

    def judged(self, losses: Tensor | None = None) -> Report:
        """The report in which a solve away from a stationary point is NOT_STATIONARY.

        Such a solve converged, but the inner loop did not, so that the derivative of its end may
        differ by more than g itself would still change. A loop that drifts may be far from its end
        although θ hardly shows it, so it is judged more strictly.

        Args:
            losses: g of each task, `[tasks]`. The leftover is judged beside |g| as well. If None,
                g is unknown.
        """
        if self.status is None or self.relative_leftover is None:
            return self
        # A comparison with NaN is false, so that what is not finite is far.
        near = self.relative_leftover <= (DRIFT_TOLERANCE if self.drift else THETA_TOLERANCE)
        if losses is not None and self.leftover is not None:
            tolerance = DRIFT_TOLERANCE if self.drift else LOSS_TOLERANCE
            near = near & (self.leftover.abs() <= tolerance * losses.abs())
        unsettled = ~near & (self.status == int(Status.CONVERGED))
        status = torch.where(unsettled, int(Status.NOT_STATIONARY), self.status)
        return replace(self, status=status)

    def share(self, status: Status) -> float:
        """The share of tasks whose solve ended with `status`. It is 0 without a solve."""
        if self.status is None:
            return 0.0
        return (self.status == int(status)).double().mean().item()


def relative_leftover(u: Tensor, residual: Tensor, *, v: Tensor, params: Params) -> Tensor:
    """Σᵢ |uᵢ Fᵢ| / (‖v‖ ‖θ‖) for each task, `[tasks]`: how far θ is from F = 0 for a vector v.

    Let δ = −A⁻¹F be the Newton step from θ to the root of F, and A u = v. To first order, the step
    changes a function with the derivative v by

        vᵀδ = −vᵀ A⁻¹ F = −uᵀF.

    A step of length ‖θ‖ changes it by ‖v‖ ‖θ‖ at most, so the quotient |uᵀF| / (‖v‖ ‖θ‖) is at most
    ‖δ‖/‖θ‖, the relative error of θ. In uᵀF the parts of single parameters may cancel, as they do
    where the function is flat along δ, although the derivative of θ* is no more accurate there. So
    their absolute values are added. The quotient does not depend on the scales of F and of v.

    Args:
        u: The solution of A u = v, `[tasks, n]`.
        residual: F at θ, likewise.
        v: The right-hand side, `[tasks, N]`.
        params: θ, `{name: [tasks, *shape]}`.

    Example:
        F = 2 (θ − 1) at θ = 1.1, so that the Newton step is −0.1, 9 % of θ.

        >>> v = torch.ones(1, 1)
        >>> theta = {"w": torch.tensor([[1.1]])}
        >>> relative_leftover(v / 2, torch.tensor([[0.2]]), v=v, params=theta)
        tensor([0.0909])
    """
    reach = v.norm(dim=-1) * flatten(params).detach().norm(dim=-1)
    reach = reach.clamp(min=torch.finfo(reach.dtype).tiny)
    quotient: Tensor = (u * residual).abs().sum(-1) / reach
    return quotient
