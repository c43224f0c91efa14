"""Low-rank approximations of a symmetric operator from its products with a few vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator

Sketch = Literal["columns", "gaussian"]


_BLOCK = 2**14  # of entries that are float64 at a time


class Probes:
    """The columns of Ω `[n, k]`, unit vectors, of the basis or Gaussian; the same whenever asked for."""

    def __init__(
        self,
        sketch: Sketch,
        n: int,
        generator: torch.Generator | None,
        like: Tensor,
        most: int | None = None,
    ) -> None:
        self._n, self._like, self._chosen, self._seed = n, like, None, 0
        if sketch == "columns":
            self._chosen = torch.randperm(n, generator=generator)[
                :most
            ].clone()  # not all n of them, for most columns
        else:
            self._seed = int(torch.randint(2**62, (), generator=generator))

    def rows(self, a: int, z: int) -> Tensor:
        """Rows a … z − 1 of Ωᵀ, `[z − a, n]`."""
        if self._chosen is not None:
            return torch.nn.functional.one_hot(self._chosen[a:z], self._n).to(self._like)
        draws = [torch.Generator().manual_seed(self._seed + i) for i in range(a, z)]
        rows = torch.stack([torch.randn(self._n, generator=draw) for draw in draws]).to(self._like)
        return torch.nn.functional.normalize(rows)

    def coordinates(self, v: Tensor, a: int, z: int) -> Tensor:
        """Ωᵀ v for `[tasks, m, n]`, in float64: `[tasks, m, z − a]`."""
        if self._chosen is not None:
            found: Tensor = v[..., self._chosen[a:z].to(v.device)].double()
            return found
        parts = zip(v.split(_BLOCK, -1), self.rows(a, z).split(_BLOCK, -1), strict=True)
        return torch.stack([v_.double() @ row.double().mT for v_, row in parts]).sum(0)

    def add(self, total: Tensor, c: Tensor, a: int, z: int) -> None:
        """Add Ω c to `total` `[tasks, n]`, c `[tasks, z − a]`."""
        if self._chosen is not None:
            total[:, self._chosen[a:z].to(total.device)] += c.to(total)
        else:
            total += c.to(total) @ self.rows(a, z)

    def images(self, operator: LinearOperator, a: int, z: int) -> Tensor:
        """B ω for each such row ω and each task: `[tasks, z − a, n]`."""
        if self._chosen is not None:
            return operator.columns(self._chosen[a:z]).transpose(0, 1)
        spread = self.rows(a, z)[:, None, :].expand(-1, operator.shape[0], -1)
        return operator.matmat(spread).transpose(0, 1)


@dataclass(frozen=True)
class LowRank:
    """B_k = Y (ΩᵀY)⁺ Yᵀ = Σ_j d_j u_j u_jᵀ for each task, Y = BΩ (Nyström).

    Attributes:
        basis: u_j, `[tasks, k, n]`, orthonormal; zero for directions that Y does not span to working precision.
        inverse: 1/d_j, `[tasks, k]`, float64; 0 where `basis` is zero.
        rayleigh: the smallest ωᵀBω/ωᵀω of the columns of Ω, `[tasks]`.
    """

    basis: Tensor
    inverse: Tensor
    rayleigh: Tensor

    @staticmethod
    def from_products(rows: Tensor, images: Tensor) -> LowRank:
        """From Ωᵀ `[k, n]` and (BΩ)ᵀ `[tasks, k, n]`: Y = QR, then the eigenvalues of R⁻ᵀ(ΩᵀY)R⁻¹, which are 1/d.

        The QR decomposition does what a shift does for a Cholesky factor (Frangella et al. 2021, alg. 2.1), and
        serves indefinite B as well.
        """
        y = images.double().nan_to_num(0.0, 0.0, 0.0)
        gram = y @ rows.double().mT
        q, r = torch.linalg.qr(y.mT)
        weights, inverse = whitened(
            r, gram, len(rows) * torch.finfo(images.dtype).eps
        )  # below is round-off
        basis = (q @ (r @ weights)).mT
        quotients = gram.diagonal(dim1=-2, dim2=-1) / rows.double().square().sum(-1)
        return LowRank(basis.to(images), inverse, quotients.amin(-1).to(images))

    @property
    def indefinite(self) -> Tensor:
        """Whether some d_j is clearly negative, `[tasks]`."""
        return indefinite(self.inverse, self.basis.dtype)

    def damped_inverse(self, b: Tensor, shift: float) -> Tensor:
        """(|B_k| + sI)⁻¹ b, |B_k| with |d_j| in place of d_j; s > 0."""
        weights = 1 / (1 + shift * self.inverse.abs())
        return ((b.double() - self._expand(weights * self._coordinates(b))) / shift).to(b.dtype)

    def precondition(self, r: Tensor, shift: float) -> Tensor:
        """(d_min + s)(|B_k| + sI)⁻¹ r on the span of the basis, r itself off it (Frangella et al. 2021, eq. 5.1)."""
        inverse = self.inverse.abs()
        largest = inverse.amax(-1, keepdim=True)
        least = torch.where(largest > 0, 1 / torch.where(largest > 0, largest, 1.0), 0.0)
        inverse = inverse.clamp(min=torch.finfo(r.dtype).eps * largest)
        weights = 1 - (least + shift) * inverse / (1 + shift * inverse)
        return r - self._expand(weights * self._coordinates(r)).to(r.dtype)

    def error(self, operator: LinearOperator, steps: int = 4) -> tuple[Tensor, int]:
        """An estimate, from below, of ‖B − B_k‖ for each task by as many power iterations, and their number."""
        v = torch.randn(self.basis.shape[-1], generator=torch.Generator().manual_seed(0)).to(
            self.basis
        )
        v = (v / v.norm()).expand(operator.shape)
        values = torch.where(
            self.inverse != 0, 1 / torch.where(self.inverse != 0, self.inverse, 1.0), 0.0
        )
        norm = torch.zeros_like(v[:, :1])
        for _ in range(steps):
            v = operator.matvec(v) - self._expand(values * self._coordinates(v)).to(v)
            norm = v.norm(dim=-1, keepdim=True)
            v = v / torch.where(norm > 0, norm, 1.0)
        return norm.squeeze(-1), steps

    def _coordinates(self, v: Tensor) -> Tensor:
        return (self.basis.double() @ v.double().unsqueeze(-1)).squeeze(-1)

    def _expand(self, coordinates: Tensor) -> Tensor:
        return (self.basis.double().mT @ coordinates.unsqueeze(-1)).squeeze(-1)

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"basis": self.basis, "inverse": self.inverse, "rayleigh": self.rayleigh}


def whitened(r: Tensor, gram: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """(W, 1/d): YW orthonormal with RᵀR = YᵀY, diag(1/d) = Wᵀ(ΩᵀY)W; 0 where R is singular to `tolerance`."""
    _, size, v = torch.linalg.svd(r)
    kept = size > tolerance * size[..., :1]
    w = v.mT * torch.where(kept, 1 / torch.where(kept, size, 1.0), 0.0).unsqueeze(-2)
    inverse, rotation = torch.linalg.eigh(w.mT @ (0.5 * (gram + gram.mT)) @ w)
    return w @ rotation, inverse


def indefinite(inverse: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.where(inverse != 0, 1 / torch.where(inverse != 0, inverse, 1.0), 0.0)
    negative: Tensor = values.amin(-1) < -(torch.finfo(dtype).eps ** 0.5) * values.abs().amax(-1)
    return negative
