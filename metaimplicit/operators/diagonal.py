"""The diagonal of an operator, as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaimplicit.operators.base import Curvature, Invertible, LinearOperator, LossParts
from metaimplicit.operators.curvature import GGN
from metaimplicit.params import Params


class Diagonal(Curvature, Invertible):
    """diag(B) of another operator: exact, or the mean of z ⊙ Bz over vectors z of random signs (Bekas et al. 2007).

    The mean is unbiased; the variance of an entry is the sum of squares of its row off the diagonal, over `samples`.

    Args:
        operator: B.
        samples: products, taken in one batch. None: n of them, 256 at a time, for the exact diagonal.
        semidefinite: B ⪰ 0: what is estimated below zero is zero.
        generator: the CPU generator of the signs; None, torch's default.

    Attributes:
        values: `[tasks, n]`.
        gradient: the operator's own, if it carries one.
        setup_products: with B, that it took.
    """

    def __init__(
        self,
        operator: LinearOperator,
        samples: int | None = 10,
        semidefinite: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if samples is not None and samples < 1:
            raise ValueError(f"Diagonal samples: got {samples}, expected at least 1, or None")
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.gradient: Params = getattr(operator, "gradient", {})
        tasks, n = operator.shape
        self.setup_products = n if samples is None else samples
        if samples is None:
            parts = [
                operator.columns(index)[torch.arange(len(index)), :, index]
                for index in torch.arange(n).split(256)
            ]
            self.values = torch.cat(parts).T
        else:
            signs = 1 - 2 * torch.randint(2, (samples, 1, n), generator=generator).to(
                self.device, self.dtype
            )
            signs = signs.expand(-1, tasks, -1)
            self.values = (signs * operator.matmat(signs)).mean(0)
        self.semidefinite = semidefinite
        if semidefinite:
            self.values = self.values.clamp(min=0)

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Diagonal:
        """The diagonal of the Gauss–Newton matrix."""
        return cls(GGN.from_loss(parts), semidefinite=True, **options)

    @classmethod
    def preconditioner(cls, core: LinearOperator, parts: LossParts, **options: Any) -> Diagonal:
        """The diagonal of `core` itself (Jacobi)."""
        return cls(core, **options)

    def matvec(self, vector: Tensor) -> Tensor:
        return self.values * vector

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.values * vectors

    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(D₊ + sI)⁻¹ v with s > 0 and D₊ = max(D, 0)."""
        return vector / (self.values.clamp(min=0) + shift)
