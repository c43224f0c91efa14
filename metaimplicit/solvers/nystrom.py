"""The Nyström approximation from sampled columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import Solution, Solver, Status, direct


@dataclass(frozen=True)
class Nystrom(Solver):
    """(B_k + sI)⁻¹ b with B_k = B[:,K] B[K,K]⁺ B[:,K]ᵀ, s = σ + ρ and A = B + σI (Hataya & Yamada 2023, eq. 6).

    The core B is sketched, never A: σ is exact. By Woodbury, with C = B[:,K] and G = B[K,K],
    x = b/s − C (sG + CᵀC)⁺ Cᵀb / s. The k×k algebra is float64 and takes a pseudo-inverse, so a sampled unit that is
    dead (a zero column) contributes nothing instead of making the system singular.

    Args:
        rank: k ≥ 1, columns sampled without replacement, the same for all tasks; one batched product. Drawn from
            torch's default CPU generator unless `generator` is given.
        rho: ρ ≥ 0, the damping this solver owns. None: 0 if σ > 0, else 0.01.
        chunk: columns computed at a time; None, all of them.

    Raises:
        ValueError: on solving, if the rank exceeds n or σ + ρ ≤ 0.
    """

    rank: int = 10
    rho: float | None = None
    chunk: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Nystrom rank: got {self.rank}, expected at least 1")
        if self.rho is not None and not self.rho >= 0:
            raise ValueError(f"Nystrom rho: got {self.rho}, expected a number ≥ 0, or None")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"Nystrom chunk: got {self.chunk}, expected at least 1, or None")

    def _solve(self, operator: LinearOperator, b: Tensor) -> Solution:
        tasks, n = operator.shape
        if self.rank > n:
            raise ValueError(f"Nystrom rank: got {self.rank}, expected at most n = {n}, the adapted parameters")
        core, sigma = operator.split()
        shift = float(sigma) + self.damping(float(sigma))
        if not shift > 0:
            raise ValueError(f"Nystrom: got σ + ρ = {shift}, expected > 0; give rho > 0 or a proximal strength")
        chosen = torch.randperm(n, generator=self.generator)[: self.rank].to(b.device)
        basis = torch.nn.functional.one_hot(chosen, n).to(b)[:, None, :].expand(-1, tasks, -1)
        columns = torch.cat([core.matmat(part) for part in torch.split(basis, self.chunk or self.rank)]).transpose(0, 1)

        wide = columns.double()
        gram = 0.5 * (wide[:, :, chosen] + wide[:, :, chosen].mT)
        inner = shift * gram + wide @ wide.mT
        inverse = torch.linalg.pinv(inner.nan_to_num(), hermitian=True)
        correction = (wide.mT @ (inverse @ (wide @ b.double().unsqueeze(-1)))).squeeze(-1)
        x = ((b.double() - correction) / shift).to(b.dtype)
        solution = direct(operator, b, x, products=self.rank)
        values = torch.linalg.eigvalsh(gram.nan_to_num())
        floor = -(torch.finfo(b.dtype).eps ** 0.5) * values.abs().amax(-1)
        indefinite = (values[:, 0] < floor) | (solution.rayleigh <= 0)
        status = torch.where(solution.residual > 1, int(Status.BREAKDOWN), int(Status.MAX_STEPS))
        status = torch.where(indefinite & (b.norm(dim=-1) > 0), int(Status.NEGATIVE_CURVATURE), status)
        status = torch.where(solution.residual <= torch.finfo(b.dtype).eps ** 0.5, solution.status, status)
        return replace(solution, status=status)

    def damping(self, sigma: float) -> float:
        return self.rho if self.rho is not None else (0.0 if sigma > 0 else 0.01)
