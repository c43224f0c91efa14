"""The tridiagonal matrix of Lanczos's process, factored while it grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.solvers.arithmetic import divisor


@dataclass(frozen=True)
class Column:
    """Column k of R in T = QR, with the rotation that made it. All are `[tasks, 1]`.

    Attributes:
        epsilon: R[k−2, k].
        delta: R[k−1, k].
        gamma: R[k, k] > 0, or 1 where it is zero.
        cosine: c_k. The least-squares coordinates of ‖r‖e₁ grow by c_k times the residual before.
        sine: s_k. The least-squares residual shrinks by this factor.
        slope: ‖Ar‖/‖r‖ of the least-squares residual r before this column.
    """

    epsilon: Tensor
    delta: Tensor
    gamma: Tensor
    cosine: Tensor
    sine: Tensor
    slope: Tensor


class GivensQR:
    """The QR factorisation of the (k+1) × k tridiagonal matrix T, one column at a time.

    Column k of T is (β_k, α_k, β_{k+1}). The rotation before turns it, and a new one removes
    β_{k+1} (Paige & Saunders 1975):

        δ_k = c_{k−1} δ̄_k + s_{k−1} α_k,    γ̄_k = s_{k−1} δ̄_k − c_{k−1} α_k,
        ε_{k+1} = s_{k−1} β_{k+1},          δ̄_{k+1} = −c_{k−1} β_{k+1},
        γ_k = √(γ̄_k² + β_{k+1}²),           c_k = γ̄_k/γ_k,    s_k = β_{k+1}/γ_k.

    Args:
        like: A `[tasks, 1]` tensor of the type and device wanted.

    Example:
        >>> qr = GivensQR(torch.zeros(1, 1))
        >>> column = qr.append(alpha=torch.tensor([[3.0]]), beta=torch.tensor([[4.0]]))
        >>> column.gamma, column.sine
        (tensor([[5.]]), tensor([[0.8000]]))
    """

    def __init__(self, like: Tensor) -> None:
        self._cosine = -torch.ones_like(like)
        self._sine = torch.zeros_like(like)
        self._delta_bar = torch.zeros_like(like)
        self._epsilon = torch.zeros_like(like)

    def append(self, alpha: Tensor, beta: Tensor) -> Column:
        """Add a column with α_k and β_{k+1}, both `[tasks, 1]`."""
        delta = self._cosine * self._delta_bar + self._sine * alpha
        gamma_bar = self._sine * self._delta_bar - self._cosine * alpha
        epsilon = self._epsilon

        self._epsilon = self._sine * beta
        self._delta_bar = -self._cosine * beta
        slope = torch.hypot(gamma_bar, self._delta_bar)

        gamma = divisor(torch.hypot(gamma_bar, beta))
        self._cosine = gamma_bar / gamma
        self._sine = beta / gamma
        return Column(
            epsilon,
            delta,
            gamma,
            cosine=self._cosine,
            sine=self._sine,
            slope=slope,
        )


class GalerkinResidual:
    """‖b − Ax‖ of Galerkin's x = V T⁻¹ Vᵀb, from the factors T = L D Lᵀ.

    With the pivots d of D,

        d_k = α_k − β_k²/d_{k−1},    (T⁻¹e₁)_k = ± (1/d_k) Π_{j<k} β_{j+1}/d_j,

    and the residual is β_{k+1} ‖b‖ times the size of that last entry. T is as definite as D.

    Args:
        length: ‖b‖, `[tasks, 1]`.

    Attributes:
        pivot: d_k, `[tasks, 1]`, or 1 where it is zero.

    Example:
        >>> galerkin = GalerkinResidual(torch.ones(1, 1))
        >>> galerkin.add_pivot(alpha=torch.tensor([[4.0]]))
        tensor([[4.]])
        >>> galerkin.norm(beta=torch.tensor([[2.0]]))
        tensor([[0.5000]])
    """

    def __init__(self, length: Tensor) -> None:
        self.pivot = torch.ones_like(length)
        self._beta = torch.zeros_like(length)
        self._product = length  # ‖b‖ Π β_{j+1}/d_j

    def add_pivot(self, alpha: Tensor) -> Tensor:
        """Add the row of α_k. Returns d_k, `[tasks, 1]`."""
        pivot = alpha - self._beta * (self._beta / self.pivot)
        self.pivot = torch.where(pivot.abs() > 0, pivot, 1.0)
        return pivot

    def norm(self, beta: Tensor) -> Tensor:
        """The residual after the step that ended with β_{k+1}, `[tasks, 1]`."""
        residual = beta * (self._product / self.pivot).abs()
        self._beta = beta
        self._product = beta / self.pivot * self._product
        return residual
