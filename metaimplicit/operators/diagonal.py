"""The diagonal of an operator, as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.operators.base import Invertible, LinearOperator
from metaimplicit.operators.curvature import Curvature, LossParts
from metaimplicit.operators.gauss_newton import GGN
from metaimplicit.params import Params

CHUNK = 256  # columns that the exact diagonal takes at a time


class Diagonal(Curvature, Invertible):
    """diag(B) of an operator B, exact or estimated as the mean of z ⊙ Bz over random signs z.

    The mean is unbiased. The variance of an entry is the sum of the squares of the other entries of
    its row, divided by `samples` (Bekas et al. 2007).

    Args:
        operator: B, shape `(tasks, n)`.
        samples: The number of products with B, in one batch, ≥ 1. If None, the diagonal is exact
            and takes n products, 256 at a time.
        semidefinite: Whether B is positive semi-definite. If so, estimates below zero become zero.
        generator: The CPU generator of the signs. If None, torch's default.

    Attributes:
        values: The diagonal, `[tasks, n]`.
        gradient: The gradient that `operator` carries. It is empty if there is none.
        setup_products: The products with B that the construction took.

    Raises:
        ValueError: `samples` is below 1.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> Diagonal(Identity(torch.zeros(1, 2), scale=3.0)).values
        tensor([[3., 3.]])
    """

    looks_into_layers = False

    def __init__(
        self,
        operator: LinearOperator,
        samples: int | None = 10,
        semidefinite: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if samples is not None:
            check_count("Diagonal samples", samples, unit=", or None")
        self.shape = operator.shape
        self.dtype = operator.dtype
        self.device = operator.device
        self.gradient: Params = getattr(operator, "gradient", {})
        self.semidefinite = semidefinite
        self.setup_products = self.shape[1] if samples is None else samples
        if samples is None:
            self.values = _exact(operator)
        else:
            self.values = _estimate(operator, samples, generator)
        if semidefinite:
            self.values = self.values.clamp(min=0)

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Diagonal:
        """The diagonal of the Gauss–Newton matrix; `options` may hold `samples` and `generator`."""
        return cls(GGN.from_loss(parts), semidefinite=True, **options)

    @classmethod
    def preconditioner(cls, core: LinearOperator, parts: LossParts, **options: Any) -> Diagonal:
        """The diagonal of `core` itself (Jacobi's preconditioner). It does not look at `parts`."""
        return cls(core, **options)

    def matvec(self, vector: Tensor) -> Tensor:
        """The product diag(B) v, `[tasks, n] -> [tasks, n]`."""
        return self.values * vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with k vectors, `[k, tasks, n] -> [k, tasks, n]`."""
        return self.values * vectors

    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(D₊ + sI)⁻¹ v with s = `shift` > 0 and D₊ = max(D, 0), `[tasks, n] -> [tasks, n]`."""
        return vector / (self.values.clamp(min=0) + shift)


def _exact(operator: LinearOperator) -> Tensor:
    parts = []
    for index in torch.arange(operator.shape[1], device="cpu").split(CHUNK):
        columns = operator.columns(index)
        parts.append(columns[torch.arange(len(index), device="cpu"), :, index])
    return torch.cat(parts).T


def _estimate(
    operator: LinearOperator,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    tasks, n = operator.shape
    device = "cpu" if generator is None else generator.device
    bits = torch.randint(2, (samples, 1, n), generator=generator, device=device)
    signs = 1 - 2 * bits.to(operator.device, operator.dtype)
    signs = signs.expand(-1, tasks, -1)
    return (signs * operator.matmat(signs)).mean(0)
