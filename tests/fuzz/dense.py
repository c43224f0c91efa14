"""The implicit hypergradient written out: A built row by row, the system solved densely.

    dg/dφ = ∂g/∂φ − (∂²f/∂θ∂φ)ᵀ u,   A u = ∂g/∂θ,   f with the inner optimiser's weight decay.

A curvature or a solver may have more than one reading that is right, so each function returns
all of them by name. No vmap is used: torch's own batching rules have bugs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from fuzz.case import Case
from fuzz.kronecker import kronecker_matrices
from fuzz.problems import Plain, Task, Values
from fuzz.tolerances import SINGULAR

Readings = dict[str, Tensor]


def decayed_inner(plain: Plain, theta: Values, phi: Values, task: Task) -> Tensor:
    """What the inner loop descends on: f, and δ/2 ‖θ‖² of its optimiser."""
    squares = torch.stack([p.square().sum() for p in theta.values()]).sum()
    return plain.inner(theta, phi, task) + 0.5 * plain.case.coupled_decay * squares


def formula(plain: Plain, thetas: list[Values]) -> tuple[dict[str, Values], float, float]:
    """The readings of dg/dφ at the given θ of each task, g, and the largest condition number."""
    totals: dict[str, Values] = {}
    losses, conditions = [], []
    for task, theta in zip(plain.tasks, thetas, strict=True):
        theta = {name: p.clone().requires_grad_() for name, p in theta.items()}
        phi = {name: m.clone().requires_grad_() for name, m in plain.meta.items()}
        outer = plain.outer(theta, phi, task)
        both = grad(outer, [*theta.values(), *phi.values()], allow_unused=True)
        v = flat(theta, both[: len(theta)])
        direct = both[len(theta) :]
        slope = flat(theta, _gradient(plain, theta, phi, task))
        losses.append(float(outer.detach()))
        for curvature, matrix in curvatures(plain, theta, phi, task).items():
            conditions.append(condition(matrix))
            for solver, u in solutions(plain.case, matrix, v).items():
                mixed = grad(slope @ -u, list(phi.values()), retain_graph=True, allow_unused=True)
                name = f"{curvature} {solver}".strip()
                total = totals.setdefault(name, dict.fromkeys(phi, torch.zeros(())))
                for n, *parts in zip(phi, direct, mixed, strict=True):
                    pieces = [
                        part.detach() / len(plain.tasks) for part in parts if part is not None
                    ]
                    total[n] = sum(pieces, total[n] + torch.zeros_like(phi[n]))
    return totals, sum(losses) / len(losses), max(conditions)


def argmin(plain: Plain, phi: Values, task: Task, theta: Values) -> Values | None:
    """argmin f near θ by Newton's method; None if it does not converge to a minimum."""
    for _ in range(12):
        theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
        slope = flat(theta, _gradient(plain, theta, phi, task)).detach()
        if float(slope.norm()) < 1e-12:
            return theta
        hessian = _hessian(plain, theta, phi, task)
        values = torch.linalg.eigvalsh(hessian)
        if float(values[0]) <= SINGULAR * float(values[-1]):
            return None
        step = split(torch.linalg.solve(hessian, slope), theta)
        theta = {name: p - step[name] for name, p in theta.items()}
    return {name: p.detach() for name, p in theta.items()} if float(slope.norm()) < 1e-10 else None


def curvatures(plain: Plain, theta: Values, phi: Values, task: Task) -> Readings:
    """A at θ: of the case's curvature, its penalty, weight decay and damping included."""
    case = plain.case
    size = sum(p.numel() for p in theta.values())
    eye = torch.eye(size, dtype=torch.float64)
    if case.matrix == "hessian":
        return {"": _hessian(plain, theta, phi, task) + case.damping * eye}

    squared = gauss_newton(plain, theta, phi, task)
    readings = {"": squared}
    if case.matrix == "diagonal":
        readings = {"": squared.diag().diag()}
    elif case.matrix in ("kfac", "ekfac"):
        readings = kronecker_matrices(plain, theta, phi, task, corrected=case.matrix == "ekfac")
    elif case.matrix == "fisher" and case.loss == "mse" and case.variant == "plain":
        # mean squared error is a Gaussian of variance d/2: unit variance is a fair reading, too
        width = task.targets[0].numel()
        readings["unit variance"] = squared * (width / 2)
    shift = float(torch.as_tensor(plain.strength(phi)).detach()) + case.coupled_decay + case.damping
    return {name: core + shift * eye for name, core in readings.items()}


def gauss_newton(plain: Plain, theta: Values, phi: Values, task: Task) -> Tensor:
    """Jᵀ H_z J, z the scores before a log-softmax: elsewhere nll has no curvature."""
    scores = plain.scores(theta, phi, task.inputs)
    flat_scores = scores.flatten()
    rows = [
        grad(z, list(theta.values()), retain_graph=True, allow_unused=True) for z in flat_scores
    ]
    jacobian = torch.stack([flat(theta, row) for row in rows])
    return jacobian.T @ plain.output_hessian(scores, task) @ jacobian


def _gradient(plain: Plain, theta: Values, phi: Values, task: Task) -> tuple[Tensor | None, ...]:
    loss = decayed_inner(plain, theta, phi, task)
    return grad(loss, list(theta.values()), create_graph=True, allow_unused=True)


def _hessian(plain: Plain, theta: Values, phi: Values, task: Task) -> Tensor:
    slope = flat(theta, _gradient(plain, theta, phi, task))
    targets = list(theta.values())
    rows = [grad(s, targets, retain_graph=True, allow_unused=True) for s in slope]
    matrix = torch.stack([flat(theta, row) for row in rows]).detach()
    return 0.5 * (matrix + matrix.T)


def solutions(case: Case, matrix: Tensor, v: Tensor) -> Readings:
    """u with A u = v: exact, or what the solver's K steps give by their definition."""
    rho = case.rho if case.solver in ("nystrom", "factored") else 0.0
    if case.bare and case.solver in ("nystrom", "factored"):
        penalised = case.form == "composite" and (case.proximal > 0 or case.meta == "decay")
        known = penalised or case.coupled_decay > 0  # what σ holds
        rho = 0.0 if known else 0.01
    if case.solver in ("neumann", "t1-t2") and case.scale > 0:
        terms = case.solver_steps if case.solver == "neumann" else 1
        return {"": neumann(matrix, v, terms, case.scale)}
    exact = solve(matrix + rho * torch.eye(len(v), dtype=v.dtype), v)
    readings = {"": exact}
    if case.solver in ("cg", "lanczos", "minres") and case.solver_steps < len(v):
        readings |= krylov(case, matrix, v)
    return readings


def solve(matrix: Tensor, v: Tensor) -> Tensor:
    """A⁺ v."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs() > SINGULAR * values.abs().max()
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    return vectors @ (inverse * (vectors.T @ v))


def neumann(matrix: Tensor, v: Tensor, terms: int, scale: float) -> Tensor:
    """s Σ_{k<K} (I − sA)ᵏ v."""
    term, total = v, torch.zeros_like(v)
    for _ in range(terms):
        total = total + scale * term
        term = term - scale * (matrix @ term)
    return total


def krylov(case: Case, matrix: Tensor, v: Tensor) -> Readings:
    """The best of span{v, Av, …, A^{K−1}v}: by the energy (CG), by the residual (MINRES)."""
    basis = v.unsqueeze(1) / v.norm().clamp(min=1e-300)
    for _ in range(case.solver_steps - 1):
        ahead = matrix @ basis[:, -1]
        for _ in range(2):
            ahead = ahead - basis @ (basis.T @ ahead)
        if float(ahead.norm()) < 1e-10:
            break
        basis = torch.cat([basis, (ahead / ahead.norm()).unsqueeze(1)], dim=1)
    image = matrix @ basis
    by_energy = basis @ torch.linalg.solve(basis.T @ image, basis.T @ v)
    by_residual = basis @ torch.linalg.lstsq(image, v.unsqueeze(1)).solution.squeeze(1)
    if case.solver == "lanczos":  # on an indefinite matrix the latter
        return {"Krylov": by_energy, "Krylov residual": by_residual}
    return {"Krylov": by_residual if case.solver == "minres" else by_energy}


def condition(matrix: Tensor) -> float:
    """The largest eigenvalue over the smallest that is not zero, by size."""
    values = torch.linalg.eigvalsh(matrix).abs()
    return float(values.max() / values[values > SINGULAR * values.max()].min())


def flat(like: Values, parts: tuple[Tensor | None, ...]) -> Tensor:
    """One vector, with zeros for what is None."""
    pairs = zip(like.values(), parts, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]
    )


def split(vector: Tensor, like: Values) -> Values:
    parts = torch.split(vector, [p.numel() for p in like.values()])
    return {n: part.reshape(p.shape) for part, (n, p) in zip(parts, like.items(), strict=True)}
