"""Closed forms in float64 that everything else is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit import BilevelProblem, Composite, FromMeta, Proximal
from metaimplicit.operators import LinearOperator


class Matrix(LinearOperator):
    """A dense `[tasks, n, n]` matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return (self.matrix @ vector.unsqueeze(-1)).squeeze(-1)


def dense(operator: LinearOperator) -> Tensor:
    """The matrix of an operator, `[tasks, n, n]`, by products with unit vectors."""
    tasks, n = operator.shape
    units = torch.eye(n, dtype=operator.dtype)[:, None, :].expand(-1, tasks, -1)
    return operator.matmat(units).transpose(0, 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def symmetric(spectra: Sequence[Sequence[float]] | Tensor, seed: int = 0) -> Tensor:
    """One symmetric matrix for each row of eigenvalues, in random orthogonal bases: `[tasks, n, n]`."""
    values = torch.as_tensor(spectra, dtype=torch.float64)
    basis = torch.linalg.qr(randn(values.shape[0], values.shape[1], values.shape[1], seed=seed)).Q
    return basis @ torch.diag_embed(values) @ basis.mT


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def krylov_basis(matrix: Tensor, b: Tensor, steps: int) -> Tensor:
    """An orthonormal basis of span{b, Ab, …, A^{steps−1}b} for one task, by Arnoldi's process run twice over."""
    basis = (b / b.norm()).unsqueeze(1)
    for _ in range(steps - 1):
        ahead = matrix @ basis[:, -1]
        for _ in range(2):
            ahead = ahead - basis @ (basis.T @ ahead)
        basis = torch.cat([basis, (ahead / ahead.norm()).unsqueeze(1)], dim=1)
    return basis


def krylov_minimiser(matrix: Tensor, b: Tensor, steps: int) -> Tensor:
    """argmin ½xᵀAx − bᵀx over the Krylov space for one task."""
    basis = krylov_basis(matrix, b, steps)
    return basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)


def finite_difference(
    function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float = 1e-3
) -> Tensor:
    """The derivative along `direction` by central differences, Richardson-extrapolated: error O(step⁴)."""

    def central(h: float) -> Tensor:
        return (function(at + h * direction) - function(at - h * direction)) / (2 * h)

    return (4 * central(step / 2) - central(step)) / 3


@dataclass(frozen=True)
class Oracle:
    """A problem whose hypergradient is known.

    Attributes:
        exact: d mean_tasks g/dφ at θ*, by name.
        shifted: the same with A + ρI in place of A, for a given ρ.
    """

    problem: BilevelProblem
    meta: dict[str, Tensor]
    data: tuple[Tensor, ...]
    exact: dict[str, Tensor]
    shifted: Callable[[float], dict[str, Tensor]]


def quadratic(spectra: Sequence[Sequence[float]], d: int = 3, seed: int = 0) -> Oracle:
    """f = ½θᵀHθ − θᵀBφ, g = ½‖θ − t‖² + ½‖φ‖²:  θ* = H⁻¹Bφ,  dg/dφ = φ + BᵀH⁻¹(θ* − t)."""
    h = symmetric(spectra, seed)
    tasks, n = h.shape[:2]
    b, t, phi = (
        randn(tasks, n, d, seed=seed + 1),
        randn(tasks, n, seed=seed + 2),
        randn(d, seed=seed + 3),
    )
    problem = BilevelProblem(
        init=lambda meta, data: {"theta": torch.zeros(n, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (
            0.5 * params["theta"] @ data[0] @ params["theta"]
            - params["theta"] @ data[1] @ meta["phi"]
        ),
        outer_loss=lambda params, meta, data: (
            0.5 * (params["theta"] - data[2]).square().sum() + 0.5 * meta["phi"].square().sum()
        ),
    )

    def gradient(rho: float) -> dict[str, Tensor]:
        star = torch.linalg.solve(h, b @ phi)
        shifted = h + rho * torch.eye(n, dtype=torch.float64)
        return {
            "phi": phi
            + (b.mT @ torch.linalg.solve(shifted, star - t).unsqueeze(-1)).squeeze(-1).mean(0)
        }

    return Oracle(problem, {"phi": phi}, (h, b, t), gradient(0.0), gradient)


def ridge(tasks: int = 3, m: int = 20, n: int = 6, seed: int = 0) -> Oracle:
    """f = ‖Xw − y‖²/2m + eᵠ‖w‖²/2, g the validation loss:  dg/dφ = −eᵠ w*ᵀA⁻¹∇g,  A = XᵀX/m + eᵠI."""
    x, y = randn(tasks, m, n, seed=seed), randn(tasks, m, seed=seed + 1)
    x_val, y_val = randn(tasks, m, n, seed=seed + 2), randn(tasks, m, seed=seed + 3)
    log_decay = torch.tensor(-1.0, dtype=torch.float64)
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(n, dtype=torch.float64)},
        inner_loss=Composite(
            outputs=lambda params, meta, data: data[0] @ params["w"],
            loss=lambda z, data: 0.5 * (z - data[1]).square().mean(),
            penalty=Proximal(FromMeta("log_decay", torch.exp), center="zero"),
        ),
        outer_loss=lambda params, meta, data: (
            0.5 * (data[2] @ params["w"] - data[3]).square().mean()
        ),
    )

    def gradient(rho: float) -> dict[str, Tensor]:
        eye, decay = torch.eye(n, dtype=torch.float64), log_decay.exp()
        a = x.mT @ x / m + decay * eye
        w = torch.linalg.solve(a, (x.mT @ y.unsqueeze(-1)).squeeze(-1) / m)
        slope = (x_val.mT @ (x_val @ w.unsqueeze(-1) - y_val.unsqueeze(-1))).squeeze(-1) / m
        u = torch.linalg.solve(a + rho * eye, slope)
        return {"log_decay": -decay * (w * u).sum(-1).mean()}

    return Oracle(problem, {"log_decay": log_decay}, (x, y, x_val, y_val), gradient(0.0), gradient)
