"""One layer's block of a Kronecker-factored curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaimplicit.operators.layers import layer_patches, second_moments
from metaimplicit.params import Params


@dataclass(frozen=True)
class Block:
    """One layer's V ↦ U_G (S ∘ (U_Gᵀ V U_A)) U_Aᵀ, V = [weight, bias] `[tasks, out, in (+ 1)]`.

    The eigenvectors of G ⊗ A are the columns of U_G ⊗ U_A, and S holds the eigenvalues.
    """

    weight: str
    bias: str | None
    left: Tensor  # U_G, [tasks, out, out]
    right: Tensor  # U_A, [tasks, in (+ 1), in (+ 1)]
    values: Tensor  # S, [tasks, out, in (+ 1)]

    def apply(self, parts: Params, values: Tensor) -> Params:
        """The product with the layer's entries of `parts`, with `values` in the place of S."""
        weight = parts[self.weight]
        v = weight.flatten(2)
        if self.bias is not None:
            v = torch.cat([v, parts[self.bias].unsqueeze(-1)], dim=-1)
        v = self.left @ (values * (self.left.mT @ v @ self.right)) @ self.right.mT
        if self.bias is None:
            return {self.weight: v.reshape(weight.shape)}
        return {self.weight: v[..., :-1].reshape(weight.shape), self.bias: v[..., -1]}


def make_block(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    params: Params,
    *,
    inputs: Tensor,
    gradients: Tensor,
    weights: Tensor,
    probes: Tensor | None,
    corrected: bool,
) -> Block:
    """A block from the layer's inputs `[tasks, m, …]`, output gradients `[count, tasks, m, …]`.

    The gradients of the probes, `[2, tasks, m, …]`, tell the order of the weights.
    """
    prefix = f"{name}." if name else ""
    bias = f"{prefix}bias" if f"{prefix}bias" in params else None
    a, g = layer_patches(layer, inputs, gradients, bias=bias is not None)
    if probes is not None:
        _, probes = layer_patches(layer, inputs, probes, bias=False)
    input_moment, gradient_moment = second_moments(a, g, weights, probes)
    input_values, right = _eigh(input_moment)
    gradient_values, left = _eigh(gradient_moment)
    if corrected:
        values = _moments_in_basis(a @ right.unsqueeze(1), g, left)
    else:
        # The eigenvalues of G ⊗ A are the products of those of G and A.
        values = gradient_values.clamp(min=0).unsqueeze(-1) * input_values.clamp(min=0).unsqueeze(
            -2
        )
    return Block(f"{prefix}weight", bias, left=left, right=right, values=values)


def _eigh(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues and eigenvectors of each task, NaN where the matrix is not finite.

    Matrices in half precision are factored in single precision.
    """
    if moments.dtype in (torch.float16, torch.bfloat16):
        values, vectors = _eigh(moments.float())
        return values.to(moments.dtype), vectors.to(moments.dtype)
    try:
        values, vectors = torch.linalg.eigh(moments)
    except RuntimeError:
        is_finite = moments.isfinite().all((-2, -1), keepdim=True)
        if bool(is_finite.all()):
            raise
        values, vectors = torch.linalg.eigh(torch.where(is_finite, moments, 0.0))
        values = torch.where(is_finite.squeeze(-1), values, torch.nan)
    return values, vectors


def _moments_in_basis(
    rotated_a: Tensor,
    g: Tensor,
    left: Tensor,
) -> Tensor:
    """Σ (U_Gᵀ (Σ_r g āᵀ) U_A)² over the draws and examples, `[tasks, out, in (+ 1)]`."""
    moments = []
    for draw in g:
        gradient = torch.einsum("tmro,tmri->tmoi", draw @ left.unsqueeze(1), rotated_a)
        moments.append(gradient.square().sum(1))
    return torch.stack(moments).sum(0)
