"""The dense solve, for small n and as the reference for the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.base import LinearSystem, Solution, Solver
from metaimplicit.solvers.direct import direct_solution, solve_by_eigenvalues
from metaimplicit.solvers.iteration import is_asymmetric
from metaimplicit.solvers.power_iteration import fixed_direction
from metaimplicit.solvers.status import Status


@dataclass(frozen=True)
class Dense(Solver):
    """A⁻¹b with A built column by column: by Cholesky's factor, or else by eigenvalues.

    Where A is positive definite, its Cholesky factor solves the system. Elsewhere its eigenvalues
    do: indefinite systems exactly, and singular ones by the pseudo-inverse. A singular system that
    has a solution is solved by the shortest one. One that has none is a BREAKDOWN, and the residual
    is the smallest. An A that is not symmetric is a BREAKDOWN as well; its symmetric part is used.

    Args:
        max_size: The largest n that it accepts. A task's matrix takes n² numbers, and n³/3
            operations.
        chunk: The columns of A that are computed at a time, ≥ 1.

    Raises:
        ValueError: The chunk is below 1. On a solve: n exceeds `max_size`.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 2.0]])
        >>> Dense().solve(Identity(b, scale=2.0), b).value
        tensor([[0.5000, 1.0000]])
    """

    max_size: int = 4096
    chunk: int = 256

    def __post_init__(self) -> None:
        check_count("Dense chunk", self.chunk)

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve for right-hand sides of norm one or zero."""
        b = system.b
        n = b.shape[1]
        matrix = self.matrix(system.operator)
        skew = (matrix - matrix.mT).norm(dim=(1, 2))
        asymmetric = is_asymmetric(skew, matrix.norm(dim=(1, 2)))
        matrix = 0.5 * (matrix + matrix.mT)
        finite = matrix.isfinite().all(-1).all(-1)
        eye = torch.eye(n, dtype=b.dtype, device=b.device)
        matrix = torch.where(finite[:, None, None], matrix, eye)

        factor, info = torch.linalg.cholesky_ex(matrix)
        # Only the eigenvalues tell exactly which matrices are singular to working precision.
        least = _smallest_eigenvalue(factor)
        regular = least > n * torch.finfo(b.dtype).eps * matrix.norm(dim=(1, 2))
        failed = (info > 0) | ~regular
        x = torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)
        smallest = None
        deficient = torch.zeros_like(finite)
        if bool(failed.any()):
            x_by_eigenvalues, values, nonzero = solve_by_eigenvalues(matrix, b)
            x = torch.where(failed.unsqueeze(-1), x_by_eigenvalues, x)
            smallest = values[:, 0]
            deficient = failed & ~nonzero.all(-1)

        solution = direct_solution(system, x, products=n, rayleigh=smallest)
        # A b in the range of A leaves round-off, times the condition of A on its range.
        unsolved = ~(solution.residual <= torch.finfo(b.dtype).eps ** 0.75)
        broken = deficient & unsolved | asymmetric
        status = torch.where(broken, int(Status.BREAKDOWN), solution.status)
        residual = torch.where(finite, solution.residual, torch.nan)
        return replace(solution, status=status, residual=residual)

    def matrix(self, operator: LinearOperator) -> Tensor:
        """A of each task, `[tasks, n, n]`, by n products.

        Raises:
            ValueError: n exceeds `max_size`.
        """
        core, sigma = operator.split()
        tasks, n = operator.shape
        if n > self.max_size:
            raise ValueError(
                f"Dense: got n = {n} adapted parameters, expected at most max_size = "
                f"{self.max_size}; adapt fewer of them, use an iterative solver, or raise max_size"
            )
        eye = torch.eye(n, dtype=operator.dtype, device=operator.device)
        units = torch.split(eye[:, None, :].expand(-1, tasks, -1), self.chunk)
        columns = torch.cat([core.matmat(part) for part in units])
        return columns.transpose(0, 1) + sigma * eye


def _smallest_eigenvalue(factor: Tensor) -> Tensor:
    """λ_min of A = LLᵀ, `[tasks]`, slightly above it, by two steps of inverse iteration.

    The pivots of L may all be far above λ_min.
    """
    v = fixed_direction(factor[..., 0]).expand_as(factor[..., 0]).unsqueeze(-1)
    for _ in range(2):
        v = torch.cholesky_solve(v / v.norm(dim=1, keepdim=True), factor)
    least: Tensor = 1 / v.norm(dim=(1, 2))
    return least
