"""The Hessian of a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaimplicit.buffers import at_rest
from metaimplicit.forward_mode import push_forward
from metaimplicit.graph import (
    check_differentiable,
    check_twice_differentiable,
    reject_scaled_gradients,
)
from metaimplicit.mended import without_padding
from metaimplicit.operators.base import LinearOperator
from metaimplicit.operators.curvature import (
    LossParts,
    RetainedGraphCurvature,
    flat_vjp,
    mended,
)
from metaimplicit.params import Params, flatten, leaves, unflatten
from metaimplicit.random_state import restored_random_state

Products = Literal["double-backward", "forward-over-reverse", "finite-differences"]


class Hessian(RetainedGraphCurvature):
    """H = ∂²ℓ/∂θ² of each task's loss.

    Args:
        loss: `{name: [tasks, *shape]} -> [tasks]`. The loss of a task depends on the parameters of
            that task alone.
        params: The point θ, `{name: [tasks, *shape]}`.
        products: How Hv is computed.
            `"double-backward"` differentiates the retained graph of the gradient: Hv = ∂(gᵀv)/∂θ.
            `"forward-over-reverse"` takes the tangent of the gradient along v (`torch.func.jvp` of
            `grad`). It keeps no graph between products, but evaluates the loss for each.
            `"finite-differences"` is (∇ℓ(θ + hv) − ∇ℓ(θ − hv))/2h, see `central_difference`. It
            needs first derivatives only.

    Raises:
        ValueError: `products` is unknown, or the loss uses an operation without a second
            derivative (except with `"finite-differences"`).

    Example:
        >>> params = {"w": torch.tensor([[1.0, 2.0]])}
        >>> hessian = Hessian(lambda p: p["w"].pow(3).sum(1), params)
        >>> hessian.matvec(torch.ones(1, 2))  # H = diag(6w)
        tensor([[ 6., 12.]])
    """

    needs_outputs = False
    looks_into_layers = False

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(
        self,
        loss: Callable[[Params], Tensor],
        params: Params,
        products: Products = "double-backward",
    ) -> None:
        if products not in get_args(Products):
            known = ", ".join(get_args(Products))
            raise ValueError(f"Hessian products: got {products!r}, expected one of {known}")
        super().__init__(params)
        self.products = products
        self._loss = mended(loss)

        total = self._loss(self.params).sum()
        targets = list(self.params.values())
        if not total.requires_grad:  # a constant
            self._set_gradient([None] * len(targets))
            return
        gradients = torch.autograd.grad(
            total,
            targets,
            create_graph=True,
            allow_unused=True,
        )
        self._set_gradient(gradients)
        if products == "finite-differences":
            reject_scaled_gradients(total)
        else:
            check_differentiable(self.gradient.values())
            check_twice_differentiable([total], targets)

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Hessian:
        """The Hessian of a loss; `options` may hold `products`."""
        return cls(parts.total, parts.params, **options)

    @torch.inference_mode(False)
    def matvec(self, vector: Tensor) -> Tensor:
        """Hv, `[tasks, n] -> [tasks, n]`."""
        if self.products == "double-backward":
            return self._product(unflatten(vector, self.params), batched=False)
        point = {name: p.detach() for name, p in self.params.items()}
        if self.products == "finite-differences":
            return central_difference(lambda p: flatten(self._gradient_at(p)), point, vector)
        gradient = torch.func.grad(lambda p: self._loss(p).sum())
        tangents = (unflatten(vector, point),)
        product = push_forward(gradient, (point,), tangents)[1]
        return flatten(product).detach()

    @torch.inference_mode(False)
    def matmat(self, vectors: Tensor) -> Tensor:
        """HV, `[k, tasks, n] -> [k, tasks, n]`. Finite differences take one vector at a time."""
        if self.products == "double-backward":
            return self._product(unflatten(vectors, self.params), batched=True)
        if self.products == "finite-differences":
            return self._differences(vectors)
        return torch.vmap(self.matvec, randomness="same")(vectors)

    def columns(self, index: Tensor) -> Tensor:
        """Columns of H, `[k] -> [k, tasks, n]`."""
        if self.products == "double-backward":
            return super().columns(index)
        return LinearOperator.columns(self, index)

    def _product(self, vector: Params, batched: bool) -> Tensor:
        gradient = {name: self.gradient[name] for name in vector}
        return flat_vjp(gradient, self.params, vector, batched=batched)

    def _differences(self, vectors: Tensor) -> Tensor:
        """HV, `[k, tasks, n]`, by differences of gradients.

        The gradient in a padding row of an embedding lacks what the embedding contributes, but the
        other gradients change as the row moves. So its columns of H are known by symmetry alone.
        """
        padded = self._padding_rows
        if padded is None:
            return super().matmat(vectors)
        others = torch.where(padded, 0.0, vectors)
        of_padding = torch.where(padded, super().matmat(vectors - others), 0.0)
        return super().matmat(others) + of_padding

    @cached_property
    def _padding_rows(self) -> Tensor | None:
        """Which entries are padding rows of embeddings, `[tasks, n]`. None if there are none.

        Raises:
            ValueError: H couples them with other entries.
        """
        gradient = flatten(self.gradient).detach()
        point = {name: p.detach() for name, p in self.params.items()}
        with without_padding() as rows:
            difference = (flatten(self._gradient_at(point)) - gradient).abs()
        if not rows:
            return None
        padded = difference > 1e3 * torch.finfo(self.dtype).eps * difference.max()

        # They are coupled if (Hw)_i ≠ 0 for a w without a pattern that leaves them out.
        w = torch.cos(1 + torch.arange(gradient.numel(), device=self.device).square())
        w = w.to(gradient).reshape(self.shape)
        if bool((self.matvec(torch.where(padded, 0.0, w)) * padded).any()):
            raise ValueError(
                "products: got 'finite-differences' for an embedding whose padding row "
                "(padding_idx) is read elsewhere as well, as by a tied layer, expected "
                "'double-backward'; or use CG"
            )
        return padded

    def _gradient_at(self, params: Params) -> Params:
        point = leaves(params)
        with torch.enable_grad():
            total = self._loss(point).sum()
            gradients = torch.autograd.grad(total, list(point.values()), allow_unused=True)
        pairs = zip(point.items(), gradients, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def central_difference(
    function: Callable[[Params], Tensor],
    at: Params,
    vector: Tensor,
    *,
    eps: float | None = None,
) -> Tensor:
    """(F(θ + hv) − F(θ − hv))/2h ≈ (∂F/∂θ) v for each task, with h = ε^⅓ (1 + ‖θ‖)/‖v‖.

    ε is the unit round-off of F. This h balances truncation against cancellation: relative errors
    are about 1e-10 in float64 and 1e-5 in float32.

    Args:
        function: F, `{name: [tasks, *shape]} -> [tasks, …]`, task by task.
        at: θ, `{name: [tasks, *shape]}`.
        vector: v, `[tasks, n]`. Where it is zero, so is the result.
        eps: ε. If None, that of the type of θ.

    Returns:
        `[tasks, …]`, the shape of F.

    Example:
        >>> theta = {"w": torch.tensor([[2.0]], dtype=torch.float64)}
        >>> slope = central_difference(lambda p: p["w"].square().sum(1), theta, torch.ones(1, 1))
        >>> round(slope.item(), 6)
        4.0
    """
    theta = flatten(at).detach()
    length = vector.norm(dim=-1, keepdim=True)
    eps = torch.finfo(theta.dtype).eps if eps is None else eps
    h = eps ** (1 / 3) * (1 + theta.norm(dim=-1, keepdim=True))
    h = h / torch.where(length > 0, length, 1.0)

    # Both ends draw the same random numbers and see the same buffers of modules. Differences of
    # these would be divided by h.
    function = at_rest(function)
    with restored_random_state(theta.device):
        ahead = function(unflatten(theta + h * vector, at))
    behind = function(unflatten(theta - h * vector, at))
    difference = ahead - behind
    slope: Tensor = difference / (2 * h.reshape(-1, *[1] * (difference.dim() - 1)))
    return slope
