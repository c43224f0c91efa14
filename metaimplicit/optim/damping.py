"""A damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator


def predicted_reduction(
    curvature: LinearOperator,
    gradient: Tensor,
    delta: Tensor,
) -> Tensor:
    """m(0) − m(δ) = −gᵀδ − ½ δᵀCδ of the quadratic model m(δ) = L + gᵀδ + ½ δᵀCδ.

    Args:
        curvature: C, shape `(1, n)`.
        gradient: g, `[1, n]`.
        delta: δ, `[1, n]`.

    Returns:
        The reduction, a scalar.

    Example:
        >>> from metaimplicit.operators import Identity
        >>> g = torch.tensor([[2.0]])
        >>> predicted_reduction(Identity(g), g, -g)  # 4 − 2
        tensor(2.)
    """
    return -((gradient + 0.5 * curvature.matvec(delta)) * delta).sum()


def reduction_ratio(
    before: Tensor,
    after: Tensor,
    predicted: Tensor,
    *,
    eps: float,
) -> float:
    """ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), the actual reduction of the loss over the predicted one.

    Both reductions are increased by 10 ε |L(θ)|, what round-off may make of a difference of losses.
    So ρ → 1 at a minimum, where neither reduction is more than round-off (Conn, Gould & Toint 2000,
    §17.4.2).

    Args:
        before: L(θ), a scalar.
        after: L(θ + δ), a scalar.
        predicted: m(0) − m(δ), a scalar.
        eps: ε, the unit round-off in which the losses are computed.

    Returns:
        ρ. It is −∞ if the model m does not fall, or if L(θ + δ) is not finite.

    Example:
        >>> reduction_ratio(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(4.0), eps=0.0)
        0.25
    """
    # One tensor, so that a GPU is read once.
    numbers = torch.stack([before, after, predicted]).tolist()
    loss, new_loss, model_reduction = map(float, numbers)

    slack = 10 * eps * abs(loss)
    actual = loss - new_loss + slack
    expected = model_reduction + slack
    if not (math.isfinite(actual) and math.isfinite(expected)) or expected < 0:
        return -math.inf
    if expected == 0:
        return 1.0 if actual >= 0 else -math.inf
    return actual / expected


def levenberg_marquardt(
    damping: float,
    ratio: float,
    *,
    decrease: float,
    increase: float,
    floor: float,
) -> float:
    """The next damping λ by the rule of Levenberg and Marquardt (Nocedal & Wright 2006, Alg. 4.1).

    Args:
        damping: The present λ.
        ratio: ρ, as from `reduction_ratio`.
        decrease: The factor ≤ 1 of λ if ρ > ¾: the model is good.
        increase: The factor > 1 of λ if ρ < ¼: the model is bad.
        floor: λ does not decrease below this number. If it is below it already, it stays.

    Returns:
        The next λ. It is the present one if ¼ ≤ ρ ≤ ¾.

    Example:
        >>> levenberg_marquardt(1.0, 0.9, decrease=0.5, increase=4.0, floor=1e-8)
        0.5
        >>> levenberg_marquardt(1.0, 0.1, decrease=0.5, increase=4.0, floor=1e-8)
        4.0
    """
    if ratio < 0.25:
        return damping * increase
    if ratio > 0.75:
        return max(damping * decrease, min(damping, floor))
    return damping
