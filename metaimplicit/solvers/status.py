"""How a solve ended, and what to do about it."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """How a task's solve ended.

    Example:
        >>> import torch
        >>> [Status(number).name for number in torch.tensor([0, 2]).tolist()]
        ['CONVERGED', 'NEGATIVE_CURVATURE']
    """

    CONVERGED = 0  # the residual met the tolerance, or the method is direct
    MAX_STEPS = 1  # steps, terms, rank or precision ran out before the tolerance was met
    NEGATIVE_CURVATURE = 2  # vᵀAv ≤ 0 for some v, to working precision
    BREAKDOWN = 3  # it diverged, A is singular or not symmetric, or the result is worse than zero
    NON_FINITE = 4  # NaN or Inf in the operator or the right-hand side
    NOT_STATIONARY = 5  # it converged, but θ does not solve its equation; see `Report.judged`


ADVICE = {
    Status.NEGATIVE_CURVATURE: (
        "the curvature is not positive definite; take curvature='gauss-newton' if it is the "
        "Hessian, add damping= or a larger proximal strength, or solve it as it is with MINRES"
    ),
    Status.BREAKDOWN: (
        "it diverged, the matrix is singular or not symmetric, or the residual is above 1; add "
        "damping=, raise Nystrom's rank or rho, or give Neumann a smaller scale"
    ),
    Status.NON_FINITE: (
        "NaN or Inf in the curvature or the outer gradient; look at the losses and the inner step "
        "size"
    ),
}
