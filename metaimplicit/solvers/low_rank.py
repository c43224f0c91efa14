"""Low-rank approximations of a symmetric operator from its products with a few vectors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.arithmetic import reciprocal
from metaimplicit.solvers.power_iteration import fixed_direction, power_iteration

Sketch = Literal["columns", "gaussian"]

BLOCK = 2**14  # entries of a Gaussian vector that are float64 at a time


class Probes:
    """The columns of Ω `[n, k]`: unit vectors, of the basis or Gaussian.

    A row of Ωᵀ is the same whenever it is asked for, and the same for all tasks.

    Args:
        sketch: `"columns"`, sampled without replacement, or `"gaussian"`.
        n: The length of a vector.
        generator: The CPU generator that Ω is drawn from. If None, torch's default.
        like: A tensor of the type and device wanted.
        most: The largest number of `"columns"` that will be asked for. If None, n.

    Example:
        >>> probes = Probes("columns", 3, torch.Generator().manual_seed(0), torch.zeros(1))
        >>> probes.rows(0, 2).sum(1)
        tensor([1., 1.])
    """

    def __init__(
        self,
        sketch: Sketch,
        n: int,
        generator: torch.Generator | None,
        like: Tensor,
        most: int | None = None,
    ) -> None:
        self._n = n
        self._like = like
        self._columns: Tensor | None = None
        self._seed = 0
        device = "cpu" if generator is None else generator.device
        if sketch == "columns":
            # A copy, since a slice would hold all n numbers.
            self._columns = torch.randperm(n, generator=generator, device=device)[:most].clone()
        else:
            self._seed = int(
                torch.randint(
                    2**62,
                    (),
                    generator=generator,
                    device=device,
                )
            )

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` … `stop` − 1 of Ωᵀ, `[stop − start, n]`."""
        if self._columns is not None:
            chosen = self._columns[start:stop]
            return torch.nn.functional.one_hot(chosen, self._n).to(self._like)
        generators = [torch.Generator().manual_seed(self._seed + i) for i in range(start, stop)]
        rows = [torch.randn(self._n, generator=generator, device="cpu") for generator in generators]
        return torch.nn.functional.normalize(torch.stack(rows).to(self._like))

    def products(
        self,
        operator: LinearOperator,
        start: int,
        stop: int,
    ) -> Tensor:
        """B ω for each of these rows ω, `[tasks, stop − start, n]`."""
        if self._columns is not None:
            return operator.columns(self._columns[start:stop]).transpose(0, 1)
        rows = self.rows(start, stop)[:, None, :].expand(-1, operator.shape[0], -1)
        return operator.matmat(rows).transpose(0, 1)

    def coordinates(self, v: Tensor, start: int, stop: int) -> Tensor:
        """Ωᵀ v for these rows, `[tasks, m, n] -> [tasks, m, stop − start]`, in float64."""
        if self._columns is not None:
            chosen: Tensor = v[..., self._columns[start:stop].to(v.device)]
            return chosen.double()
        blocks = zip(v.split(BLOCK, -1), self.rows(start, stop).split(BLOCK, -1), strict=True)
        return torch.stack([part.double() @ rows.double().mT for part, rows in blocks]).sum(0)

    def add(
        self,
        total: Tensor,
        c: Tensor,
        start: int,
        stop: int,
    ) -> None:
        """Add Ω c, c `[tasks, stop − start]`, to `total` `[tasks, n]` in place."""
        if self._columns is not None:
            total[:, self._columns[start:stop].to(total.device)] += c.to(total)
        else:
            total += c.to(total) @ self.rows(start, stop)


@dataclass(frozen=True)
class LowRank:
    """B_k = Y (ΩᵀY)⁺ Yᵀ = Σ_j d_j u_j u_jᵀ for each task, with Y = BΩ (Nyström's approximation).

    Attributes:
        basis: u_j, `[tasks, k, n]`, orthonormal. It is zero for directions that Y does not span to
            working precision.
        inverse: 1/d_j, `[tasks, k]`, float64. It is 0 where `basis` is zero.
        rayleigh: The smallest ωᵀBω/ωᵀω over the columns of Ω, `[tasks]`.

    Example:
        >>> matrix = torch.diag(torch.tensor([4.0, 1.0]))
        >>> rows = torch.tensor([[1.0, 0.0]])  # Ω selects the first column
        >>> LowRank.from_products(rows, (rows @ matrix)[None]).inverse.float()
        tensor([[0.2500]])
    """

    basis: Tensor
    inverse: Tensor
    rayleigh: Tensor

    @staticmethod
    def from_products(rows: Tensor, products: Tensor) -> LowRank:
        """The approximation from Ωᵀ and (BΩ)ᵀ.

        With Y = QR, the eigenvalues of R⁻ᵀ(ΩᵀY)R⁻¹ are 1/d. The QR decomposition does what a shift
        does for a Cholesky factor (Frangella et al. 2021, Alg. 2.1), and serves indefinite B too.

        Args:
            rows: Ωᵀ, `[k, n]`.
            products: (BΩ)ᵀ, `[tasks, k, n]`.
        """
        y = products.double().nan_to_num(0.0, 0.0, 0.0)
        gram = y @ rows.double().mT
        q, r = torch.linalg.qr(y.mT)
        roundoff = len(rows) * torch.finfo(products.dtype).eps
        _, left, inverse = whiten(r, gram, tolerance=roundoff)
        basis = (q @ left).mT
        quotients = gram.diagonal(dim1=-2, dim2=-1) / rows.double().square().sum(-1)
        return LowRank(basis.to(products), inverse, quotients.amin(-1).to(products))

    @property
    def indefinite(self) -> Tensor:
        """Whether some d_j is clearly negative, `[tasks]`."""
        return is_indefinite(self.inverse, self.basis.dtype)

    def damped_inverse(self, b: Tensor, shift: float) -> Tensor:
        """(|B_k| + sI)⁻¹ b with s = `shift` > 0, `[tasks, n]`. |B_k| has |d_j| in place of d_j."""
        # 1/(|d| + s) = 1/s − 1/s · 1/(1 + s/|d|)
        weights = 1 / (1 + shift * self.inverse.abs())
        inside = self._expand(weights * self._coordinates(b))
        return ((b.double() - inside) / shift).to(b.dtype)

    def precondition(self, r: Tensor, shift: float) -> Tensor:
        """(d_min + s)(|B_k| + sI)⁻¹ r on the span of the basis, and r itself off it, `[tasks, n]`.

        This is the preconditioner of Frangella et al. 2021, eq. 5.1.
        """
        inverse = self.inverse.abs()
        largest = inverse.amax(-1, keepdim=True)
        smallest = reciprocal(largest, where=largest > 0)  # d_min
        inverse = inverse.clamp(min=torch.finfo(r.dtype).eps * largest)
        # (d_min + s)/(d + s) = 1 − weights
        weights = 1 - (smallest + shift) * inverse / (1 + shift * inverse)
        return r - self._expand(weights * self._coordinates(r)).to(r.dtype)

    def error(
        self,
        operator: LinearOperator,
        steps: int = 4,
    ) -> tuple[Tensor, int]:
        """An estimate of ‖B − B_k‖ from below, `[tasks]`, and the number of products it took.

        Args:
            operator: B.
            steps: Power iterations, one product each.
        """
        values = reciprocal(self.inverse, where=self.inverse != 0)

        def remainder(v: Tensor) -> Tensor:
            approximation = self._expand(values * self._coordinates(v))
            return operator.matvec(v) - approximation.to(v)

        start = fixed_direction(self.basis[:, 0]).expand(operator.shape)
        size, _ = power_iteration(remainder, start, steps)
        return size.squeeze(-1), steps

    def to(self, device: torch.device) -> LowRank:
        """The same tensors on a device."""
        return LowRank(**{name: tensor.to(device) for name, tensor in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _coordinates(self, v: Tensor) -> Tensor:
        return (self.basis.double() @ v.double().unsqueeze(-1)).squeeze(-1)

    def _expand(self, coordinates: Tensor) -> Tensor:
        return (self.basis.double().mT @ coordinates.unsqueeze(-1)).squeeze(-1)


def whiten(
    r: Tensor,
    gram: Tensor,
    *,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """W with orthonormal YW, RW, and 1/d with diag(1/d) = Wᵀ(ΩᵀY)W.

    RW follows from the left singular vectors of R, orthonormal to round-off. The product of R and W
    would mix large directions into small ones, by round-off times the ratio of their sizes.

    Args:
        r: R with RᵀR = YᵀY, `[tasks, k, k]`.
        gram: ΩᵀY, `[tasks, k, k]`.
        tolerance: Singular values of R below this part of the largest count as zero. W, RW and 1/d
            are zero for their directions.

    Returns:
        W and RW, `[tasks, k, k]` each, and 1/d, `[tasks, k]`.

    Example:
        >>> weights, left, inverse = whiten(
        ...     2 * torch.eye(1)[None], torch.eye(1)[None], tolerance=0.0
        ... )
        >>> weights.abs(), left.abs(), inverse
        (tensor([[[0.5000]]]), tensor([[[1.]]]), tensor([[0.2500]]))
    """
    u, size, v = torch.linalg.svd(r)
    kept = size > tolerance * size[..., :1]
    root = torch.where(kept, size, 0.0).sqrt()
    shrink = reciprocal(root, where=kept)
    symmetric = 0.5 * (v @ (gram + gram.mT) @ v.mT)
    scaled = shrink.unsqueeze(-1) * symmetric * shrink.unsqueeze(-2)
    inverse, rotation = _eigen_of_graded(scaled, root)
    w = v.mT * reciprocal(size, where=kept).unsqueeze(-2)
    return w @ rotation, (u * kept.unsqueeze(-2)) @ rotation, inverse


def _eigen_of_graded(scaled: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues 1/d and eigenvectors of M = Σ^-½ C Σ^-½. 1/d is zero where Σ is.

    An eigensolver errs by round-off times the largest eigenvalue. Where the entries of Σ differ by
    orders of magnitude, M thus loses the large d. M⁻¹ = Σ^½ C⁻¹ Σ^½ does not lose them, and is
    taken if it can be formed: if the eigenvalues of C differ by less than those of Σ.

    Args:
        scaled: C, `[tasks, k, k]`, zero where Σ is.
        root: The diagonal of Σ^½, `[tasks, k]`, decreasing.

    Returns:
        1/d, `[tasks, k]`, in the order of the eigenvalues of the matrix that is taken, and the
        eigenvectors, `[tasks, k, k]`, in its columns.
    """
    absent = root == 0
    # C is singular where Σ is zero. Ones there keep it from counting as close to singular.
    of_c, vectors = torch.linalg.eigh(scaled + torch.diag_embed(absent.to(scaled)))
    sizes = of_c.abs()
    shrink = reciprocal(root, where=~absent)
    grading = (root[..., 0] * shrink.amax(-1)).square()
    invert = (sizes.amax(-1) < sizes.amin(-1) * grading)[..., None]

    plain = shrink.unsqueeze(-1) * scaled * shrink.unsqueeze(-2)
    half = root.unsqueeze(-1) * vectors
    inverted = (half * reciprocal(of_c, where=of_c != 0).unsqueeze(-2)) @ half.mT
    matrix = torch.where(invert.unsqueeze(-1), inverted, plain)
    values, rotation = torch.linalg.eigh(0.5 * (matrix + matrix.mT))

    roundoff = root.shape[-1] * torch.finfo(root.dtype).eps * values.abs().amax(-1, keepdim=True)
    clear = values.abs() > roundoff
    inverse = torch.where(invert, reciprocal(values, where=clear), values)
    return inverse, rotation * (clear | ~invert).unsqueeze(-2)


def is_indefinite(inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether some of the eigenvalues d_j is negative beyond round-off, `[tasks]`.

    Args:
        inverse: 1/d_j, or 0 for directions without an eigenvalue, `[tasks, k]`.
        dtype: The type that the products were computed in.

    Example:
        >>> is_indefinite(torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.float32)
        tensor([False,  True])
    """
    values = reciprocal(inverse, where=inverse != 0)
    roundoff = torch.finfo(dtype).eps ** 0.5 * values.abs().amax(-1)
    negative: Tensor = values.amin(-1) < -roundoff
    return negative
