"""The factors of K-FAC from their definition, one example and one patch after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Factors = list[tuple[Tensor, Tensor]]  # (A, G) of each layer
Part = Callable[[nn.Parameter], Tensor]


def layers_of(model: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in model if isinstance(layer, (nn.Linear, nn.Conv2d))]


def weighted_scores(likelihood: str, z: Tensor, label: Tensor | None) -> list[tuple[float, Tensor]]:
    """[(weight, gradient of −log p(y|z) in z)] of one example, for all y or for one label."""
    if likelihood == "gaussian":
        return [(1.0, row) for row in torch.eye(len(z)).to(z)]
    p = z.softmax(-1)
    if label is not None:
        return [(1.0, p - F.one_hot(label, len(z)))]
    unit = torch.eye(len(z)).to(z)
    return [(float(p[y]), p - unit[y]) for y in range(len(z))]


def forward_by_hand(model: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The outputs of one example, and the input and output of every layer."""
    inputs = []
    outputs = []
    for layer in model:
        if layer in layers_of(model):
            inputs.append(x.detach())
            x = layer(x)
            outputs.append(x)
        else:
            x = x.relu() if isinstance(layer, nn.ReLU) else x.flatten(1)
    return x, inputs, outputs


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """ā of one example, a row for each patch."""
    rows = inputs
    if isinstance(layer, nn.Conv2d):
        unfold = nn.Unfold(layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = unfold(inputs)[0].T
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1).to(rows)], 1)
    return rows


def second_moment(rows: Tensor) -> Tensor:
    return sum(torch.outer(row, row) for row in rows)


def factors_by_hand(
    model: nn.Sequential,
    inputs: Tensor,
    likelihood: str,
    labels: Sequence[Tensor] | Tensor | None = None,
) -> Factors:
    """(A, G) of each layer, with the expectation over all y, or over the labels."""
    layers = layers_of(model)
    A = [0.0] * len(layers)
    G = [0.0] * len(layers)
    for example, x in enumerate(inputs):
        z, layer_inputs, layer_outputs = forward_by_hand(model, x[None])
        label = None if labels is None else labels[example]
        for weight, score in weighted_scores(likelihood, z[0].detach(), label):
            gradients = torch.autograd.grad(z, layer_outputs, score[None], retain_graph=True)
            for i, gradient in enumerate(gradients):
                rows = gradient.flatten(2)[0].T if gradient.dim() == 4 else gradient
                G[i] = G[i] + weight * second_moment(rows) / len(inputs)
        for i, layer in enumerate(layers):
            rows = input_rows(layer, layer_inputs[i])
            A[i] = A[i] + second_moment(rows) / (len(rows) * len(inputs))
    return list(zip(A, G, strict=True))


def block_diagonal(factors: Factors, damping: float) -> Tensor:
    """⊕ (G + √λ/π I) ⊗ (A + π√λ I), for W̄ row by row."""
    root = math.sqrt(damping)
    blocks = []
    for A, G in factors:
        pi = math.sqrt(float(A.trace() / len(A)) / float(G.trace() / len(G)))
        damped_a = A + pi * root * torch.eye(len(A)).to(A)
        damped_g = G + root / pi * torch.eye(len(G)).to(G)
        blocks.append(torch.kron(damped_g, damped_a))
    return torch.block_diag(*blocks)


def weight_rows(layer: nn.Module, part: Part = torch.Tensor.detach) -> Tensor:
    """W̄ = [W, b] of a layer, or the same arrangement of another part of its parameters."""
    weight = part(layer.weight).flatten(1)
    if layer.bias is None:
        return weight
    return torch.cat([weight, part(layer.bias)[:, None]], 1)


def all_rows(model: nn.Sequential, part: Part = torch.Tensor.detach) -> Tensor:
    """`weight_rows` of all layers as one vector."""
    return torch.cat([weight_rows(layer, part).flatten() for layer in layers_of(model)])


def write_rows(model: nn.Sequential, rows: Tensor) -> None:
    """The inverse of `all_rows`, for layers with a bias."""
    for layer in layers_of(model):
        size = weight_rows(layer).numel()
        layer_rows = rows[:size].reshape(len(layer.weight), -1)
        rows = rows[size:]
        weight = layer_rows[:, :-1].reshape(layer.weight.shape)
        layer.load_state_dict({"weight": weight, "bias": layer_rows[:, -1]})
