"""A damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

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
        >>> import torch
        >>> from metaimplicit.operators import Identity
        >>> g = torch.tensor([[2.0]])
        >>> predicted_reduction(Identity(g), g, -g)  # 4 − 2
        tensor(2.)
    """
    return -((gradient + 0.5 * curvature.matvec(delta)) * delta).sum()


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
        ratio: ρ, as from `solvers.trust_region.reduction_ratio`.
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
