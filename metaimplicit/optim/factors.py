"""Running Kronecker factors of layers and their damped inverses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaimplicit.operators.layers import layer_patches, second_moments
from metaimplicit.optim.checks import raise_if
from metaimplicit.optim.factored_layers import FactoredLayer
from metaimplicit.params import Params

# By layer: the factors "A" and "G", and "A inverse" and "G inverse".
FactorStates = Mapping[str, dict[str, Any]]


def update_factors(
    states: FactorStates,
    layers: Mapping[str, FactoredLayer],
    inputs: Params,
    *,
    output_gradients: Params,
    weights: Tensor,
    probes: Mapping[str, Tensor] | None = None,
    decay: float,
) -> None:
    """A ← decay A + (1 − decay) E[ā āᵀ] and G ← decay G + (1 − decay) Σ g gᵀ of every layer.

    Args:
        states: The states of the layers. A state without factors takes those of this batch.
        layers: The layers by name.
        inputs: The input of each layer, `{layer: [m, …]}`.
        output_gradients: The gradients in each layer's output, `{layer: [count, m, …]}`, of scores
            that contain the weights of the examples.
        weights: Those of the examples, `[1, m, …]`.
        probes: The gradients of the probes of `loss_scores`, `{layer: [2, m, …]}`, if there are
            any.
        decay: The decay of the averages, in [0, 1].

    Example:
        >>> from torch import nn
        >>> states = {"head": {}}
        >>> layers = {"head": FactoredLayer(nn.Linear(2, 1), "head.weight", None)}
        >>> inputs = {"head": torch.ones(4, 2)}
        >>> gradients = {"head": torch.full((1, 4, 1), 0.5)}
        >>> weights = torch.full((1, 4), 0.25)
        >>> update_factors(
        ...     states, layers, inputs, output_gradients=gradients, weights=weights, decay=0.9
        ... )
        >>> states["head"]["A"].tolist(), states["head"]["G"].tolist()
        ([[1.0, 1.0], [1.0, 1.0]], [[1.0]])
    """
    for name, layer in layers.items():
        state = states[name]
        dtype = layer.module.weight.dtype
        # The functions of the operators expect a task axis.
        a, g = layer_patches(
            layer.module,
            inputs[name].to(dtype).unsqueeze(0),
            output_gradients[name].to(dtype).unsqueeze(1),
            bias=layer.bias is not None,
        )
        probe = None
        if probes is not None:
            gradients = probes[name].to(dtype).unsqueeze(1)
            _, probe = layer_patches(
                layer.module,
                inputs[name].unsqueeze(0),
                gradients,
                bias=False,
            )
        batch_a, batch_g = second_moments(a, g, weights, probe)
        for key, batch in (("A", batch_a[0]), ("G", batch_g[0])):
            if key in state:
                state[key].lerp_(batch, 1 - decay)
            else:
                state[key] = batch


def invert_factors(states: FactorStates, damping: float) -> None:
    """Write (A + π√λ I)⁻¹ and (G + √λ/π I)⁻¹ into the state of every layer.

    π² = (tr A/dim A)/(tr G/dim G) balances the two (Martens & Grosse 2015, §6.3). If a factor is
    zero, π = 1.

    Args:
        states: The states of the layers, with their factors.
        damping: λ > 0.

    Raises:
        FloatingPointError: A damped factor is singular to working precision. No inverse was
            changed.

    Example:
        >>> states = {"head": {"A": torch.eye(1), "G": torch.eye(1)}}
        >>> invert_factors(states, damping=1.0)
        >>> states["head"]["A inverse"]
        tensor([[0.5000]])
    """
    root = math.sqrt(damping)
    cholesky_factors: list[tuple[dict[str, Any], str, Tensor]] = []
    failures = []
    for state in states.values():
        mean_a = state["A"].diagonal().mean()
        mean_g = state["G"].diagonal().mean()
        # A quotient of roots, because that of the traces can overflow in single precision.
        is_nonzero = (mean_a > 0) & (mean_g > 0)
        pi = torch.where(is_nonzero, mean_a.sqrt() / mean_g.sqrt(), 1.0)
        for key, shift in (("A", pi * root), ("G", root / pi)):
            damped = state[key].clone()
            damped.diagonal().add_(shift)
            lower, info = torch.linalg.cholesky_ex(damped)
            cholesky_factors.append((state, key, lower))
            failures.append(info > 0)
    raise_if(
        torch.stack(failures),
        f"KFAC: a factor is singular at damping = {damping:.3g}; raise damping",
    )
    for state, key, lower in cholesky_factors:
        state[f"{key} inverse"] = torch.cholesky_inverse(lower)


def precondition(
    states: FactorStates,
    layers: Mapping[str, FactoredLayer],
    gradients: Params,
) -> Params:
    """The direction u = (G + √λ/π I)⁻¹ ∇W̄ (A + π√λ I)⁻¹ of every layer, with W̄ = [W, b].

    Args:
        states: The states of the layers, with their inverses.
        layers: The layers by name.
        gradients: The gradients of all parameters, by name.

    Returns:
        u by parameter, in its shape and in the order of `gradients`. For a parameter that is in
        none of the layers, u is its gradient.

    Example:
        >>> from torch import nn
        >>> states = {"head": {"A inverse": 2 * torch.eye(3), "G inverse": torch.eye(1)}}
        >>> layers = {"head": FactoredLayer(nn.Linear(2, 1), "weight", "bias")}
        >>> gradients = {"weight": torch.ones(1, 2), "bias": torch.ones(1), "scale": torch.ones(1)}
        >>> precondition(states, layers, gradients)
        {'weight': tensor([[2., 2.]]), 'bias': tensor([2.]), 'scale': tensor([1.])}
    """
    directions = dict(gradients)
    for name, layer in layers.items():
        weight = gradients[layer.weight]
        rows = weight.flatten(1)
        if layer.bias is not None:
            bias = gradients[layer.bias].unsqueeze(-1)
            rows = torch.cat([rows, bias], dim=-1)
        rows = states[name]["G inverse"] @ rows @ states[name]["A inverse"]
        if layer.bias is not None:
            directions[layer.bias] = rows[:, -1]
            rows = rows[:, :-1]
        directions[layer.weight] = rows.reshape_as(weight)
    return directions
