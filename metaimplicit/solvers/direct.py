"""What the methods without iterations share."""

from __future__ import annotations

import torch
from torch import Tensor

from metaimplicit.solvers.arithmetic import (
    norm,
    rayleigh_quotient,
    reciprocal,
)
from metaimplicit.solvers.base import LinearSystem, Solution
from metaimplicit.solvers.status import Status


def direct_solution(
    system: LinearSystem, x: Tensor, *, products: int, rayleigh: Tensor | None = None
) -> Solution:
    """The solution x of a method without iterations, with the status CONVERGED.

    One product more gives its residual.

    Args:
        system: The system.
        x: `[tasks, n]`.
        products: The products that x took.
        rayleigh: The smallest quotient that the method saw, `[tasks]`. If None, that of x counts
            alone.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> b = torch.tensor([[1.0, 0.0]])
        >>> solution = direct_solution(LinearSystem(Identity(b, 2.0), b), b / 2, products=0)
        >>> solution.residual, solution.products
        (tensor([0.]), 1)
    """
    ax = system.operator.matvec(x)
    seen = rayleigh_quotient(x, ax).squeeze(-1)
    status = torch.full((len(x),), int(Status.CONVERGED), device=x.device)
    return Solution(
        value=x,
        status=status,
        residual=norm(system.b - ax).squeeze(-1),
        products=products + 1,
        needed=torch.full_like(status, products + 1),
        rayleigh=seen if rayleigh is None else torch.minimum(seen, rayleigh),
    )


def solve_by_eigenvalues(
    matrix: Tensor,
    b: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A⁺b for symmetric matrices, with the pseudo-inverse of those that are singular.

    Args:
        matrix: A, `[tasks, n, n]`.
        b: `[tasks, n]`.

    Returns:
        A⁺b, the eigenvalues of A in ascending order, and which of them are not zero to working
        precision. All are `[tasks, n]`.

    Example:
        >>> x, values, nonzero = solve_by_eigenvalues(torch.diag(torch.tensor([0.0, 2.0]))[None],
        ...     torch.ones(1, 2))
        >>> x.abs(), nonzero
        (tensor([[0.0000, 0.5000]]), tensor([[False,  True]]))
    """
    values, vectors = torch.linalg.eigh(matrix)
    size = values.abs()
    nonzero = size > b.shape[1] * torch.finfo(b.dtype).eps * size.amax(-1, keepdim=True)
    coordinates = (vectors.mT @ b.unsqueeze(-1)).squeeze(-1)
    scaled = reciprocal(values, where=nonzero) * coordinates
    return (vectors @ scaled.unsqueeze(-1)).squeeze(-1), values, nonzero
