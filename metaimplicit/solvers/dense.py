"""The dense solve, for small n and as the yardstick of the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import (
    Apply,
    Solution,
    Solver,
    SolverState,
    Status,
    direct_solution,
    is_asymmetric,
)


@dataclass(frozen=True)
class Dense(Solver):
    """A⁻¹b with A built column by column: Cholesky where A is positive definite, else by its eigenvalues.

    The eigenvalue route solves indefinite systems exactly and takes the pseudo-inverse of singular ones (reported
    as a breakdown, since then A x = b has no unique solution). So is an A that is not symmetric, of which the
    symmetric part is taken.

    Args:
        max_size: the largest n it accepts; a task's matrix takes n² numbers and n³/3 operations.
        chunk: columns computed at a time.
    """

    max_size: int = 4096
    chunk: int = 256

    def _solve(
        self, operator: LinearOperator, b: Tensor, state: SolverState, preconditioner: Apply | None
    ) -> Solution:
        self._takes_no(preconditioner)
        n = operator.shape[1]
        matrix = self.matrix(operator)
        skewed = is_asymmetric((matrix - matrix.mT).norm(dim=(1, 2)), matrix.norm(dim=(1, 2)))
        matrix = 0.5 * (matrix + matrix.mT)
        eye = torch.eye(n, dtype=b.dtype, device=b.device)
        finite = matrix.isfinite().all(-1).all(-1)
        matrix = torch.where(finite[:, None, None], matrix, eye)
        factor, info = torch.linalg.cholesky_ex(matrix)
        pivots = factor.diagonal(
            dim1=1, dim2=2
        ).square()  # the least is ≥ λ_min, the largest ≤ λ_max
        failed = (info > 0) | (pivots.amin(-1) <= n * torch.finfo(b.dtype).eps * pivots.amax(-1))
        x = torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)
        smallest, singular = None, torch.zeros_like(finite)
        if bool(failed.any()):
            by_values, values, kept = by_eigenvalues(matrix, b)
            x = torch.where(failed.unsqueeze(-1), by_values, x)
            smallest, singular = values[:, 0], ~kept.all(-1) & failed
        solution = direct_solution(operator, b, x, products=n, rayleigh=smallest)
        status = torch.where(singular | skewed, int(Status.BREAKDOWN), solution.status)
        residual = torch.where(finite, solution.residual, torch.nan)
        return replace(solution, status=status, residual=residual)

    def matrix(self, operator: LinearOperator) -> Tensor:
        """A, `[tasks, n, n]`; ValueError if n > max_size."""
        core, sigma = operator.split()
        tasks, n = operator.shape
        if n > self.max_size:
            raise ValueError(
                f"Dense: got n = {n} adapted parameters, expected at most max_size = {self.max_size}; "
                "adapt fewer of them, use an iterative solver, or raise max_size"
            )
        eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
        columns = torch.split(eye[:, None, :].expand(-1, tasks, -1), self.chunk)
        matrix = torch.cat([core.matmat(part) for part in columns]).transpose(0, 1)
        return matrix + sigma * eye


def by_eigenvalues(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A⁺b, the eigenvalues of A, and which of them are not zero to working precision."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs() > b.shape[1] * torch.finfo(b.dtype).eps * values.abs().amax(
        -1, keepdim=True
    )
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    x = (vectors @ (inverse * (vectors.mT @ b.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
    return x, values, kept
