"""A damping that follows how well the quadratic model predicts the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaimplicit.operators import LinearOperator
from metaimplicit.solvers.trust_region import reduction_ratio


@dataclass(frozen=True)
class MeasuredLoss:
    """A loss that is measured with more digits where a small difference of two losses needs them.

    Attributes:
        value: L, a detached scalar.
        roundoff: What round-off may make of L beside ε|L|, a scalar.
        in_double: It measures the loss in float64, if the loss computes in float64. None if there
            is no such way.

    Example:
        The softmax of 20 is so close to 1 that its logarithm is 0 in single precision.

        >>> z, y = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
        >>> measured = MeasuredLoss.of_outputs(torch.nn.functional.cross_entropy, z, y)
        >>> measured.value, measured.in_double().value
        (tensor(0.), tensor(2.0612e-09, dtype=torch.float64))
    """

    value: Tensor
    roundoff: Tensor
    in_double: Callable[[], MeasuredLoss] | None = None

    @classmethod
    def of_outputs(
        cls,
        loss: Callable[[Tensor, Any], Tensor],
        outputs: Tensor,
        targets: Any,
        value: Tensor | None = None,
    ) -> MeasuredLoss:
        """The loss at these outputs, of which `value` may be known already."""
        outputs = outputs.detach()
        is_masked = outputs.isinf()  # as logits of −∞ are, which no loss subtracts
        size = outputs.abs().masked_fill(is_masked, 0.0).max()

        known = cls.of_scalar(loss(outputs, targets) if value is None else value, size=size)
        wide = torch.promote_types(outputs.dtype, torch.float64)
        if wide == outputs.dtype:
            return known

        def in_double() -> MeasuredLoss:
            try:
                return cls.of_scalar(loss(outputs.to(wide), targets), size=size)
            except (RuntimeError, TypeError, ValueError):  # it holds tensors of another type
                return known

        return replace(known, in_double=in_double)

    @classmethod
    def of_scalar(cls, value: Tensor, size: Tensor | float = 1.0) -> MeasuredLoss:
        """A loss of which nothing else is known than the size of the numbers that it is made of."""
        eps = torch.finfo(value.dtype).eps
        return cls(value.detach(), 10 * eps * torch.as_tensor(size, device=value.device))

    def ratio(self, after: MeasuredLoss, predicted: Tensor, eps: float) -> float:
        """ρ of a step to `after`; see `reduction_ratio`.

        Args:
            after: The loss after the step.
            predicted: What the model of the loss predicts that it falls by.
            eps: The unit round-off of the parameters.
        """
        noise = self.roundoff + after.roundoff + 10 * eps * self.value.abs()
        has_digits = (self.value - after.value).abs() > 10 * noise
        ratio = reduction_ratio(
            self.value,
            after.value,
            predicted,
            eps=eps,
            roundoff=self.roundoff,
        )
        # The noise is an estimate, so that no step is called bad on its account. One to a loss that
        # is not finite is bad, as the next step would start there.
        is_sure = bool((has_digits & (ratio >= 0.25)) | ~after.value.isfinite())
        if is_sure or self.in_double is None or after.in_double is None:
            return ratio.item()
        return self.in_double().ratio(after.in_double(), predicted, eps)


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
