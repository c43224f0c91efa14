"""K-FAC and EKFAC in plain torch, for the loss as it is: its curvature, its counting of examples.

The block of a linear or convolutional layer is G ⊗ A in the layout [weight | bias]: A is the second
moment of the layer's inputs over examples (and positions), G = Σ_i Bᵢᵀ Hᵢ Bᵢ with Hᵢ the Hessian
of f in the scores of example i and Bᵢ their derivative in the layer's outputs. So G carries
the weights of the examples in f, and A is a mean: over those that count, or weighted likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F

from fuzz.losses import example_weights
from fuzz.problems import Plain, Task, Values

Use = tuple[nn.Module, Tensor, Tensor]  # a layer, its inputs and its outputs


def kronecker_matrices(
    plain: Plain, theta: Values, phi: Values, task: Task, corrected: bool
) -> dict[str, Tensor]:
    """The matrix by each reading of A; other parameters have a zero block."""
    uses, scores = _record(plain, theta, phi, task)
    roots = _roots(plain.output_hessian(scores, task), len(task.inputs))
    weights = example_weights(plain.case, task.targets)
    counted = (weights > 0).double()
    moments = {"": counted / counted.sum(), "weighted": weights}
    return {
        name: _assemble(plain, theta, uses, scores, roots, moment, corrected)
        for name, moment in moments.items()
    }


def _record(
    plain: Plain, theta: Values, phi: Values, task: Task
) -> tuple[dict[str, list[Use]], Tensor]:
    """The uses of each adapted weight, in one forward pass, and the scores."""
    names = {id(p): name for name, p in plain.model.named_parameters()}
    uses: dict[str, list[Use]] = {}
    handles = []
    for layer in plain.model.modules():
        weight = names.get(id(getattr(layer, "weight", None)))
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and weight in theta:

            def hook(module: Any, given: Any, output: Tensor, name: str = weight) -> None:
                uses.setdefault(name, []).append((module, given[0].detach(), output))

            handles.append(layer.register_forward_hook(hook))
    try:
        scores = plain.scores(theta, phi, task.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return uses, scores


def _roots(curvature: Tensor, examples: int) -> list[Tensor]:
    """Vectors s in the scores, Σ s sᵀ = Hᵢ in the rows of each example i, all examples at once."""
    width = len(curvature) // examples
    columns = torch.zeros(width, examples, width, dtype=torch.float64)
    for i in range(examples):
        block = curvature[i * width : (i + 1) * width, i * width : (i + 1) * width]
        values, vectors = torch.linalg.eigh(block)
        columns[:, i] = (vectors * values.clamp(min=0).sqrt()).T
    return [column.flatten() for column in columns]


def _assemble(
    plain: Plain,
    theta: Values,
    uses: dict[str, list[Use]],
    scores: Tensor,
    roots: list[Tensor],
    moment: Tensor,
    corrected: bool,
) -> Tensor:
    offsets, size = {}, 0
    for name, p in theta.items():
        offsets[name], size = size, size + p.numel()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for name, calls in uses.items():
        layer = calls[0][0]
        bias = name.removesuffix("weight") + "bias"
        rows, slopes = _rows_and_slopes(calls, scores, roots, bias in theta)
        block = _block(rows, slopes, moment, corrected)
        outputs, width = slopes.shape[-1], rows.shape[-1]
        plain_width = layer.weight[0].numel()
        index = [
            offsets[bias] + o if i == plain_width else offsets[name] + o * plain_width + i
            for o in range(outputs)
            for i in range(width)
        ]
        where = torch.tensor(index)
        matrix[where.unsqueeze(1), where] = block
    return matrix


def _rows_and_slopes(
    calls: list[Use], scores: Tensor, roots: list[Tensor], bias: bool
) -> tuple[Tensor, Tensor]:
    """ā `[m, R, in (+ 1)]` and the roots' gradients `[count, m, R, out]` of a layer's outputs."""
    rows, slopes = [], []
    for layer, given, output in calls:
        back = [
            grad(scores, output, root.reshape(scores.shape), retain_graph=True)[0] for root in roots
        ]
        examples = len(given)
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(given, layer.kernel_size, stride=layer.stride)
            rows.append(patches.mT)
            slopes.append(torch.stack([g.flatten(2).mT for g in back]))
        else:
            rows.append(given.reshape(examples, -1, given.shape[-1]))
            slopes.append(torch.stack([g.reshape(examples, -1, g.shape[-1]) for g in back]))
    joined, joint = torch.cat(rows, dim=1), torch.cat(slopes, dim=2)
    if bias:
        joined = torch.cat([joined, torch.ones_like(joined[..., :1])], dim=-1)
    return joined, joint


def _block(rows: Tensor, slopes: Tensor, moment: Tensor, corrected: bool) -> Tensor:
    """G ⊗ A, or with the second moments of the gradients along its eigenvectors (EKFAC)."""
    weighted = moment[:, None, None] * rows / rows.shape[1]
    second = torch.einsum("mri,mrj->ij", weighted, rows)
    scatter = torch.einsum("kmro,kmrp->op", slopes, slopes)
    if not corrected:
        return torch.kron(scatter, second)
    along_a, along_g = torch.linalg.eigh(second)[1], torch.linalg.eigh(scatter)[1]
    products = torch.einsum("kmro,mri->kmoi", slopes @ along_g, rows @ along_a)
    values = products.square().sum((0, 1))
    basis = torch.kron(along_g, along_a)
    return basis @ torch.diag(values.flatten()) @ basis.T
