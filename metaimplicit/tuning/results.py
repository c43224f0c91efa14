"""What the steps of `Tuner` and `HOAG` return."""

from __future__ import annotations

from dataclasses import dataclass

from metaimplicit.methods import Report


@dataclass(frozen=True)
class TunerStep:
    """What one outer step did.

    Attributes:
        outer_loss: g(θ_T, φ) on the validation batch, before φ moved.
        norm: ‖dg/dφ‖ in the free coordinates.
        report: What the inner loop and the linear solve report.
        applied: False if the hypergradient was not finite and the step was skipped.
        metric: What `Tuner.fit` measured after the step, if a measurement was due.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from metaimplicit import GradientDescent, Tuner, tuning_problem
        >>> from metaimplicit.tuning import WeightDecay
        >>> model = torch.nn.Linear(2, 1)
        >>> problem, meta, domains = tuning_problem(model, F.mse_loss, [WeightDecay()])
        >>> tuner = Tuner(problem, meta, domains=domains, inner=GradientDescent(steps=5))
        >>> batch = (torch.randn(4, 2), torch.randn(4, 1))
        >>> step = tuner.step(train=batch, validation=batch)
        >>> step.applied, step.report.inner_steps
        (True, tensor([5]))
    """

    outer_loss: float
    norm: float
    report: Report
    applied: bool
    metric: float | None = None


@dataclass(frozen=True)
class HOAGStep:
    """What one step of `HOAG` did.

    Attributes:
        outer_loss: g(θ_k, φ_k), at the φ_k that the step started from.
        norm: ‖p_k‖, the norm of the hypergradient in the free coordinates.
        tolerance: ε_k, to which the inner problem and the linear system were solved.
        lipschitz: L after the step. The next step has length ‖p‖/L.
        accepted: Whether φ_k lowered g enough, or was an accepted point solved again. If False, φ
            went back to the accepted point, and L grew.
        report: What the inner loop and the linear solve report.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from metaimplicit.tuning import HOAG, WeightDecay, tuning_problem
        >>> model = torch.nn.Linear(2, 1)
        >>> problem, meta, domains = tuning_problem(model, F.mse_loss, [WeightDecay()])
        >>> batch = (torch.randn(4, 2), torch.randn(4, 1))
        >>> hoag = HOAG(problem, meta, train=batch, validation=batch, domains=domains)
        >>> step = hoag.step()
        >>> step.accepted, step.tolerance
        (True, 0.1)
    """

    outer_loss: float
    norm: float
    tolerance: float
    lipschitz: float
    accepted: bool
    report: Report
