"""The Hessian of a linear head's loss, and its inverse by one Cholesky factorisation.

The head V is `[tasks, k, outputs]`, and its outputs are z = R V for the rows R `[tasks, m, k]`.
With ∂²ℓ/∂zᵢ² = LᵢLᵢᵀ and B = Lᵀ(R ⊗ I), the Hessian is A = BᵀB + σI. The smaller of two matrices
is factorised, of size k · outputs or m · outputs:

    A⁻¹ v = (BᵀB + σI)⁻¹ v = (v − Bᵀ (BBᵀ + σI)⁻¹ B v)/σ

Both hold for a singular B. A separable loss has one matrix of size k or m for each output, and
squares have one for all outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.operators import Invertible
from metaimplicit.params import Params, flatten, joint_dtype, unflatten


@dataclass(frozen=True)
class HeadCurvature:
    """BᵀB of every task, by its parts.

    Args:
        rows: R, `[tasks, m, k]`.
        root: L, `[tasks, m, outputs, outputs]`. Or its diagonal `[tasks, m, outputs]`, or
            `[tasks, m, 1]` if all outputs share one number.

    Example:
        >>> curvature = HeadCurvature(torch.tensor([[[2.0]]]), torch.ones(1, 1, 1))
        >>> factor = curvature.factorise(1.0)
        >>> curvature.inverse(torch.ones(1, 1, 1), factor, 1.0)  # 1/(2² + 1)
        tensor([[[0.2000]]])
    """

    rows: Tensor
    root: Tensor

    @property
    def is_dual(self) -> bool:
        """Whether BBᵀ is factorised, which is the smaller one where m ≤ k."""
        _, m, k = self.rows.shape
        return m <= k

    def product(self, v: Tensor) -> Tensor:
        """BᵀB v, `[tasks, k, outputs]`."""
        return self.rows.mT @ self._root(self._root_transposed(self.rows @ v))

    def factorise(self, shift: Tensor | float) -> Tensor:
        """The Cholesky factor of the smaller matrix plus σI. It is NaN where there is none."""
        gram = self._gram_of_examples() if self.is_dual else self._gram_of_features()
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram + shift * eye)
        return torch.where((info == 0)[..., None, None], factor, torch.nan)

    def inverse(self, v: Tensor, factor: Tensor, shift: Tensor | float) -> Tensor:
        """(BᵀB + σI)⁻¹ v, `[tasks, k, outputs]`."""
        if not self.is_dual:
            return solve(factor, v)
        of_examples = solve(factor, self._root_transposed(self.rows @ v))
        return (v - self.rows.mT @ self._root(of_examples)) / shift

    def _root(self, z: Tensor) -> Tensor:
        """L z of every example."""
        if self.root.dim() == 3:
            return self.root * z
        return (self.root @ z.unsqueeze(-1)).squeeze(-1)

    def _root_transposed(self, z: Tensor) -> Tensor:
        """Lᵀ z of every example."""
        if self.root.dim() == 3:
            return self.root * z
        return (self.root.mT @ z.unsqueeze(-1)).squeeze(-1)

    def _gram_of_examples(self) -> Tensor:
        """BBᵀ = Lᵀ(K ⊗ I)L with K = RRᵀ."""
        kernel = self.rows @ self.rows.mT
        if self.root.dim() == 4:
            tasks, m, outputs, _ = self.root.shape
            products = torch.einsum("tiec,tjed->ticjd", self.root, self.root)
            blocks = products * kernel[:, :, None, :, None]
            return blocks.reshape(tasks, m * outputs, m * outputs)
        by_output = self.root.mT
        gram = by_output.unsqueeze(-1) * kernel.unsqueeze(1) * by_output.unsqueeze(-2)
        return gram.squeeze(1) if gram.shape[1] == 1 else gram

    def _gram_of_features(self) -> Tensor:
        """BᵀB, one block Rᵀ diag(h) R for each pair of outputs that the loss couples."""
        rows = self.rows.unsqueeze(1)  # [tasks, 1, m, k]
        if self.root.dim() == 3:
            h = self.root.square().mT.unsqueeze(-1)
            gram = rows.mT @ (h * rows)
            return gram.squeeze(1) if gram.shape[1] == 1 else gram

        tasks, _, outputs, _ = self.root.shape
        k = self.rows.shape[2]
        hessians = (self.root @ self.root.mT).movedim(1, 3)  # [tasks, outputs, outputs, m]
        blocks = [rows.mT @ (h.unsqueeze(-1) * rows) for h in hessians.unbind(1)]
        # [outputs c, tasks, outputs d, k of c, k of d] -> [tasks, k, c, k, d]
        stacked = torch.stack(blocks).permute(1, 3, 0, 4, 2)
        return stacked.reshape(tasks, k * outputs, k * outputs)


def solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve by a factor of `HeadCurvature.factorise`, `[tasks, r, outputs]`.

    Args:
        factor: One for all outputs, `[tasks, r, r]`, one for each, `[tasks, outputs, r, r]`, or a
            coupled one, `[tasks, r · outputs, r · outputs]`.
        right: The right-hand sides, `[tasks, r, outputs]`.

    Example:
        >>> solve(torch.tensor([[[2.0]]]), torch.tensor([[[4.0, 8.0]]]))
        tensor([[[1., 2.]]])
    """
    if factor.dim() == 4:
        by_output = right.mT.unsqueeze(-1)
        return torch.cholesky_solve(by_output, factor).squeeze(-1).mT
    if factor.shape[-1] == right.shape[-2]:
        return torch.cholesky_solve(right, factor)
    coupled = right.flatten(1).unsqueeze(-1)
    return torch.cholesky_solve(coupled, factor).reshape(right.shape)


@dataclass(frozen=True)
class HeadLayout:
    """Where the head V = (W, b)ᵀ `[tasks, k, outputs]` lies in the parameters.

    Args:
        like: W `[tasks, outputs, p]` and b `[tasks, outputs]`, in the order of the parameters.
        weight: The name of W.
        bias: The name of b, or None.

    Example:
        >>> layout = HeadLayout({"weight": torch.zeros(1, 3, 2)}, "weight", None)
        >>> layout.to_matrix({"weight": torch.ones(1, 3, 2)}).shape
        torch.Size([1, 2, 3])
    """

    like: Params
    weight: str
    bias: str | None

    def to_matrix(self, params: Params) -> Tensor:
        """V, in float64."""
        parts = [params[self.weight].mT]
        if self.bias is not None:
            parts.append(params[self.bias].unsqueeze(1))
        return torch.cat(parts, dim=1).double()

    def to_params(self, v: Tensor) -> Params:
        """The parameters, in their own order and types."""
        parts = {self.weight: v}
        if self.bias is not None:
            parts = {self.weight: v[:, :-1], self.bias: v[:, -1]}
        return {
            name: (parts[name].mT if name == self.weight else parts[name]).to(p.dtype)
            for name, p in self.like.items()
        }


class HeadHessian(Invertible):
    """A − σI = BᵀB as an operator on the parameters of a head.

    Its products and its inverse are computed in float64.

    Args:
        curvature: BᵀB, without a graph.
        layout: Where the head lies in the parameters.
        factors: Cholesky factors by their shift σ. Others are added as they are needed.

    Example:
        >>> curvature = HeadCurvature(torch.tensor([[[2.0]]]).double(), torch.ones(1, 1, 1))
        >>> layout = HeadLayout({"weight": torch.zeros(1, 1, 1)}, "weight", None)
        >>> HeadHessian(curvature, layout).inverse(torch.ones(1, 1), shift=1.0)
        tensor([[0.2000]])
    """

    semidefinite = True
    closed_form = True

    def __init__(
        self,
        curvature: HeadCurvature,
        layout: HeadLayout,
        factors: dict[float, Tensor] | None = None,
    ) -> None:
        first = next(iter(layout.like.values()))
        tasks, n = flatten(layout.like).shape
        self.shape = (tasks, n)
        self.dtype = joint_dtype(layout.like.values())
        self.device = first.device
        self._curvature = curvature
        self._layout = layout
        self._factors = {} if factors is None else factors

    def matvec(self, vector: Tensor) -> Tensor:
        """The product BᵀB v, `[tasks, n] -> [tasks, n]`."""
        return self._to_vector(self._curvature.product(self._to_matrix(vector)))

    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(BᵀB + σI)⁻¹ v, `[tasks, n] -> [tasks, n]`, with σ = `shift` > 0."""
        if shift not in self._factors:
            self._factors[shift] = self._curvature.factorise(shift)
        matrix = self._to_matrix(vector)
        return self._to_vector(self._curvature.inverse(matrix, self._factors[shift], shift))

    def _to_matrix(self, vector: Tensor) -> Tensor:
        return self._layout.to_matrix(unflatten(vector, self._layout.like))

    def _to_vector(self, matrix: Tensor) -> Tensor:
        return flatten(self._layout.to_params(matrix))
