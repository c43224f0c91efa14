"""Operators in half precision, for solvers that work in single precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator

HALF = (torch.float16, torch.bfloat16)


class Widened(LinearOperator):
    """A with vectors in single precision. Its products are still taken in half precision.

    Sums over all parameters, and the factors of small matrices, need more digits than half
    precision has, and torch has no Cholesky factors or eigenvalues in it.

    Args:
        operator: A, in half precision.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> half = Identity(torch.zeros(1, 2, dtype=torch.bfloat16), scale=3.0)
        >>> Widened(half).matvec(torch.ones(1, 2))
        tensor([[3., 3.]])
    """

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self.shape = operator.shape
        self.dtype = torch.float32
        self.device = operator.device
        self.semidefinite = operator.semidefinite
        self.setup_products = operator.setup_products

    def matvec(self, vector: Tensor) -> Tensor:
        """The product Av."""
        return self.operator.matvec(vector.to(self.operator.dtype)).float()

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products AV."""
        return self.operator.matmat(vectors.to(self.operator.dtype)).float()

    def columns(self, index: Tensor) -> Tensor:
        """Columns of A."""
        return self.operator.columns(index).float()

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        """(B, σ) with A = B + σI, where B is widened too."""
        core, shift = self.operator.split()
        return Widened(core), shift

    def check_convex(self) -> None:
        """Check A."""
        self.operator.check_convex()

    def widen(
        self, function: Callable[[Tensor], Tensor] | None
    ) -> Callable[[Tensor], Tensor] | None:
        """A function of vectors in half precision, for vectors in single precision."""
        if function is None:
            return None
        return lambda vector: function(vector.to(self.operator.dtype)).float()
