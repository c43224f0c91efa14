"""Is this hypergradient right? A method against finite differences and against the dense solve, with a verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.hypergradient import hypergradient
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import FirstOrder, Implicit, Method, Unrolled, make_method
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem
from metaimplicit.solvers import Dense, Status


@dataclass(frozen=True)
class Check:
    """What `check_hypergradient` found; errors are relative.

    Attributes:
        slopes: d outer_loss along each direction by the method, `[directions]`.
        differences: the same by finite differences of the whole procedure, inner loop included.
        error: ‖slopes − differences‖ / ‖differences‖.
        noise: what two step sizes of the differences disagree by: no error below it means anything.
        dense_error: of the gradient against that of a dense solve of the same system; None where n is too large, or
            for methods without a system.
        cosine: of the angle between those two; None likewise.
        residual: the worst of the tasks', of the solve; None without one.
        inner_gradient_norm: the largest of the tasks'.
        negative_curvature: the share of tasks whose solve met it.
        verdict: in words, and what to do.
    """

    slopes: Tensor
    differences: Tensor
    error: float
    noise: float
    dense_error: float | None
    cosine: float | None
    residual: float | None
    inner_gradient_norm: float
    negative_curvature: float
    verdict: str

    def __str__(self) -> str:
        lines = [f"against finite differences  {self.error:.1e} (known to {self.noise:.1e})"]
        if self.dense_error is not None:
            lines.append(
                f"against the dense solve     {self.dense_error:.1e}, cosine {self.cosine:.6f}"
            )
        if self.residual is not None:
            lines.append(f"residual of the solve       {self.residual:.1e}")
            lines.append(f"negative curvature          {self.negative_curvature:.0%} of the tasks")
        lines.append(f"inner gradient norm         {self.inner_gradient_norm:.1e}")
        return "\n".join([*lines, self.verdict])


def check_hypergradient(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop,
    method: str | Method,
    batched: bool = False,
    directions: int = 3,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Check:
    """Hold a hypergradient against central differences of the procedure, and against the dense solve if n allows it.

    The differences are of φ ↦ mean_tasks g(θ_T(φ), φ) along random unit directions, at two steps, ε^⅓ (1 + ‖φ‖) with ε
    the unit round-off, and half of it, extrapolated. An implicit method differentiates the argmin and not θ_T, so far
    from a stationary point the two disagree; the verdict says which of the reasons it is. Give it float64 tensors:
    in float32 the differences themselves are known to a few digits.

    Args:
        problem, meta, data, inner, method, batched: as for `hypergradient`; the problem must be deterministic.
        directions: how many, ≥ 1.
        tolerance: the relative error up to which the verdict is "right".
        seed: of the directions.

    Raises:
        ValueError: as `hypergradient`; no direction; a problem whose losses are others in a second call.
    """
    if directions < 1:
        raise ValueError(f"directions: got {directions}, expected at least 1")
    if isinstance(method, Unrolled) and method.iterates:
        raise ValueError(
            "method: got Unrolled(iterates=True), whose outer loss has no θ_T to be compared at"
        )
    method, loop = make_method(method), make_inner(inner)

    lifted = LiftedProblem(problem, data, batched=batched)

    def outer_loss(phi: Params) -> Tensor:
        params = FirstOrder().adapt(lifted, loop, phi).params
        return lifted.outer(params, phi, lifted.at(loop.steps))[0].mean().detach()

    result = hypergradient(problem, meta, data, inner=loop, method=method, batched=batched)
    values = {name: m.detach() for name, m in meta.items()}
    theta = {name: p if batched else p.unsqueeze(0) for name, p in result.params.items()}
    if not torch.equal(*(lifted.inner(theta, values, lifted.at(0)).detach() for _ in range(2))):
        raise ValueError(
            "inner loss: got two values in two calls, expected one; fix the seed, or switch dropout off"
        )
    if not torch.equal(outer_loss(values), outer_loss(values)):
        raise ValueError(
            "outer loss: got two values in two calls, expected one; fix the seed, or switch dropout off"
        )
    entries = {name: m for name, m in values.items() if m.is_floating_point()}
    draw = torch.Generator().manual_seed(seed)
    size = torch.stack([m.norm() for m in entries.values()]).norm()
    dtype = next(iter(entries.values())).dtype
    h = torch.finfo(dtype).eps ** (1 / 3) * (1 + float(size))
    slopes: list[Tensor] = []
    wholes: list[Tensor] = []
    halves: list[Tensor] = []
    for _ in range(directions):
        d = {name: torch.randn(m.shape, generator=draw).to(m) for name, m in entries.items()}
        norm = torch.stack([part.norm() for part in d.values()]).norm()
        d = {name: part / norm for name, part in d.items()}
        slopes.append(
            torch.stack([(result.grads[name] * part).sum() for name, part in d.items()]).sum()
        )
        for step, found in ((h, wholes), (h / 2, halves)):
            ahead, behind = (
                outer_loss(values | {n: m + sign * step * d[n] for n, m in entries.items()})
                for sign in (1, -1)
            )
            found.append((ahead - behind) / (2 * step))
    slope, half, whole = (torch.stack(x) for x in (slopes, halves, wholes))
    differences = (4 * half - whole) / 3
    error, noise = _relative(slope, differences), _relative(half, differences)
    dense_error, cosine = None, None
    report = result.report
    if (
        isinstance(method, Implicit)
        and sum(p[0].numel() for p in _stacked(result.params, batched)) <= Dense().max_size
    ):
        dense = replace(method, solver=Dense())
        exact = hypergradient(problem, meta, data, inner=loop, method=dense, batched=batched)
        got, want = (
            torch.cat([r.grads[name].flatten() for name in entries]) for r in (result, exact)
        )
        dense_error, cosine = (
            _relative(got, want),
            float(torch.nn.functional.cosine_similarity(got, want, dim=0)),
        )
    residual = None if report.residual is None else float(report.residual.max())
    stationarity = float(report.inner_gradient_norm.max())
    bent = report.share(Status.NEGATIVE_CURVATURE)
    words = _verdict(method, error, noise, dense_error, residual, stationarity, bent, tolerance)
    return Check(
        slope, differences, error, noise, dense_error, cosine, residual, stationarity, bent, words
    )


def _verdict(
    method: Method,
    error: float,
    noise: float,
    dense_error: float | None,
    residual: float | None,
    stationarity: float,
    bent: float,
    tolerance: float,
) -> str:
    if error <= tolerance:
        return "Right: it agrees with finite differences."
    if noise > tolerance:
        return (
            f"Undecided: the finite differences are known to {noise:.1e} only; use float64, or a smoother problem, "
            "where their steps cross no kinks."
        )
    if not isinstance(method, Implicit):
        cut = (
            ""
            if "loop" in method.reach and "loss" in method.reach
            else ", as this method leaves out part of it"
        )
        return f"Wrong by {error:.1e}{cut}; 'unrolled' is exact."
    if bent > 0:
        return "Wrong: the curvature is not positive definite; use curvature='gauss-newton', more damping, or MINRES."
    if (dense_error if dense_error is not None else residual or 0.0) > tolerance:
        return "Wrong: the linear system is not solved; more solver steps, more rank, or NystromCG."
    if stationarity > tolerance:
        return (
            f"Wrong: the solve is fine, but θ_T is no stationary point (‖∂f/∂θ‖ = {stationarity:.1e}); more inner "
            "steps, a larger step size, or 'unrolled', which differentiates θ_T as it is."
        )
    if method.curvature_name != "hessian" or method.damping > 0:
        return f"Wrong by {error:.1e}: solved and stationary, so it is A ({method.curvature_name}, damping {method.damping})."
    return f"Wrong by {error:.1e}, and solve, stationarity and A are in order: look at the losses for what they hide."


def _relative(got: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((got - expected).norm()) / (size if size > 0 else 1.0)


def _stacked(params: Params, batched: bool) -> list[Tensor]:
    return [p if batched else p.unsqueeze(0) for p in params.values()]
