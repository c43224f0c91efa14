"""Dense curvatures of one task, from per-example Jacobians and the Hessian of a loss in outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaimplicit.operators import LossParts

Loss = Callable[[Tensor, Any], Tensor]


def parts_of(
    model: nn.Module, loss: Loss, x: Tensor, y: Any, checked: dict[Any, Any] | None = None
) -> LossParts:
    """The parts of loss(model(x), y) at the model's parameters, with the axis of one task."""
    params = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}

    def call(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,))

    def lift(function: Callable[..., Any], params: dict[str, Tensor]) -> Any:
        return torch.vmap(lambda p: function(call, p))(params)

    return LossParts(
        params,
        outputs=lambda p: call({name: q.squeeze(0) for name, q in p.items()}).unsqueeze(0),
        loss=lambda z: loss(z.squeeze(0), y).unsqueeze(0),
        module=model,
        apply_model=lift,
        checked={} if checked is None else checked,
    )


def output_hessian(loss: Loss, z: Tensor, y: Any) -> Tensor:
    """∂²ℓ/∂z², z flattened, `[m d, m d]`."""
    return torch.autograd.functional.hessian(
        lambda flat: loss(flat.reshape(z.shape), y), z.flatten()
    )


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """∂z/∂θ, both flattened, one row after the other."""
    rows = []
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def gauss_newton(model: nn.Module, loss: Loss, x: Tensor, y: Any) -> Tensor:
    """Jᵀ (∂²ℓ/∂z²) J."""
    J = jacobian(model, x)
    return J.T @ output_hessian(loss, model(x).detach(), y) @ J


def kronecker_factored(
    model: nn.Sequential, curvature: Tensor, x: Tensor, weights: Tensor
) -> Tensor:
    """⊕ G ⊗ A of linear layers with a bias, in the order of `model.parameters()`.

    A = Σ ωᵢ āᵢ āᵢᵀ/Σ ωᵢ, and G = Σ Bᵢᵀ Hᵢ Bᵢ with Hᵢ the curvature in the outputs of example i and
    Bᵢ their Jacobian in the outputs of the layer.
    """
    m = len(x)
    d = len(curvature) // m
    blocks = []
    for position, layer in enumerate(model):
        if not isinstance(layer, nn.Linear):
            continue
        A = torch.zeros(layer.in_features + 1, layer.in_features + 1).to(x)
        G = torch.zeros(layer.out_features, layer.out_features).to(x)
        for i in range(m):
            a = model[:position](x[i])
            B = torch.autograd.functional.jacobian(model[position + 1 :], layer(a))
            G += B.T @ curvature[i * d : (i + 1) * d, i * d : (i + 1) * d] @ B
            row = torch.cat([a, torch.ones(1).to(a)]).detach()
            A += weights[i] / weights.sum() * torch.outer(row, row)
        block = torch.kron(G, A)
        # From [weight | bias] row by row to the weight, and the bias behind it.
        index = torch.arange(len(block)).reshape(len(G), len(A))
        order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
        blocks.append(block[order][:, order])
    return torch.block_diag(*blocks)
