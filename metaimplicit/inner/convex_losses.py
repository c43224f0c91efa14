"""Convex losses of the outputs of a linear head, with their derivatives in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class ConvexLoss(ABC):
    """A convex function ℓ(z, y) of the outputs z of an example, with targets y.

    All tensors are `[..., m, outputs]`. Class indices become one-hot targets.

    Example:
        >>> z, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> SquaredError().value(z, y), SquaredError().slope(z, y)
        (tensor([2.]), tensor([[2., 0.]]))
    """

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """ℓ of every example, `[..., m]`."""

    @abstractmethod
    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """∂ℓ/∂z, `[..., m, outputs]`."""

    @abstractmethod
    def root(self, z: Tensor, y: Tensor) -> Tensor:
        """L with LLᵀ = ∂²ℓ/∂z² of every example.

        It is `[..., m, outputs, outputs]`. A separable loss returns the diagonal of L alone, or
        `[..., m, 1]` if all outputs share one number.
        """


class SquaredError(ConvexLoss):
    """ℓ = ½ ‖z − y‖².

    Example:
        >>> SquaredError().value(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([2.])
    """

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """ℓ of every example."""
        return 0.5 * (z - y).square().sum(-1)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """The residual z − y."""
        return z - y

    def root(self, z: Tensor, y: Tensor) -> Tensor:
        """1, since the Hessian is the identity."""
        return torch.ones_like(z[..., :1])


class Logistic(ConvexLoss):
    """ℓ = Σ_c log(1 + exp z_c) − y_c z_c: binary cross-entropy of every output, one against all.

    Example:
        >>> Logistic().slope(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([[-0.5000,  0.5000]])
    """

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """ℓ of every example."""
        # Both are log(1 + exp z). Torch's second derivative of each is zero far on the other side.
        softplus = torch.where(z > 0, -F.logsigmoid(-z), F.softplus(z))
        return (softplus - y * z).sum(-1)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """The probabilities σ(z), less y."""
        return z.sigmoid() - y

    def root(self, z: Tensor, y: Tensor) -> Tensor:
        """The root of σ(z) σ(−z), whose derivative stays finite where that underflows."""
        return (0.5 * (F.logsigmoid(z) + F.logsigmoid(-z))).exp()


class SoftmaxCrossEntropy(ConvexLoss):
    """ℓ = −Σ_c y_c log p_c with p = softmax(z): multinomial logistic regression.

    An example whose targets are all zero does not count.

    Example:
        >>> SoftmaxCrossEntropy().slope(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([[-0.5000,  0.5000]])
    """

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """ℓ of every example."""
        return -(y * z.log_softmax(-1)).sum(-1)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """(Σ y) p − y."""
        return y.sum(-1, keepdim=True) * z.softmax(-1) - y

    def root(self, z: Tensor, y: Tensor) -> Tensor:
        """L = √(Σ y) (diag √p − p √pᵀ), for which LLᵀ = (Σ y) (diag p − ppᵀ)."""
        mass = y.sum(-1)[..., None, None]
        log_p = z.log_softmax(-1)
        root_p = (0.5 * log_p).exp()  # its derivative is finite where p underflows
        outer = log_p.exp().unsqueeze(-1) * root_p.unsqueeze(-2)
        return mass.sqrt() * (torch.diag_embed(root_p) - outer)


class SmoothHinge(ConvexLoss):
    """ℓ = Σ_c h(s_c z_c) with s = 2y − 1 = ±1: a support vector machine for each output.

        h(u) = ½ − u if u ≤ 0,   ½ (1 − u)² if 0 < u < 1,   0 if u ≥ 1

    (Rennie & Srebro 2005). Its second derivative is 1 between the kinks, and 0 outside.

    Example:
        >>> SmoothHinge().value(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([1.5000])
    """

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """ℓ of every example."""
        distance = 1 - (2 * y - 1) * z  # 1 − u
        clamped = distance.clamp(0, 1)
        return (clamped * distance - 0.5 * clamped.square()).sum(-1)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """−s (1 − u), with 1 − u clamped to [0, 1]."""
        sign = 2 * y - 1
        return -sign * (1 - sign * z).clamp(0, 1)

    def root(self, z: Tensor, y: Tensor) -> Tensor:
        """|s| between the kinks. The one at u = 0, where a head of zeros starts, counts too."""
        sign = 2 * y - 1
        between = (sign * z >= 0) & (sign * z < 1)
        return torch.where(between, sign.abs(), 0.0)
