"""Curvature of a loss at a point, as operators: the Hessian and the Gauss–Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from metaimplicit.operators.base import LinearOperator
from metaimplicit.params import Params, flatten, leaves, unflatten


class _Curvature(LinearOperator):
    """Shared by both: the point, as leaves, and the loss gradient at it with its graph.

    Attributes:
        params: `{name: [tasks, *shape]}`, leaves of autograd.
        gradient: ∂ℓ/∂θ in the same layout, with the graph that further derivatives are taken through.
    """

    def __init__(self, params: Params) -> None:
        self.params = leaves(params)
        first = next(iter(params.values()))
        self.shape = (len(first), sum(p[0].numel() for p in params.values()))
        self.dtype, self.device = first.dtype, first.device
        self.gradient: Params = {}

    def _set_gradient(self, gradients: Sequence[Tensor | None]) -> None:
        pairs = zip(self.params.items(), gradients, strict=True)
        self.gradient = {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


class Hessian(_Curvature):
    """∂²ℓ/∂θ² of each task's loss.

    Args:
        loss: `{name: [tasks, *shape]} -> [tasks]`, task i's loss depending on task i's parameters alone.
        params: the point θ, task axis first.
        mode: `"double-backward"` differentiates the retained graph of the gradient, Hv = ∂(gᵀv)/∂θ; or
            `"forward-over-reverse"`, Hv = the tangent of the gradient along v (`torch.func.jvp` of `grad`), which
            keeps no graph between products but evaluates the loss again in each.
    """

    def __init__(
        self,
        loss: Callable[[Params], Tensor],
        params: Params,
        mode: Literal["double-backward", "forward-over-reverse"] = "double-backward",
    ) -> None:
        if mode not in ("double-backward", "forward-over-reverse"):
            raise ValueError(f"Hessian mode: got {mode!r}, expected 'double-backward' or 'forward-over-reverse'")
        super().__init__(params)
        self.mode = mode
        total, targets = loss(self.params).sum(), list(self.params.values())
        if total.requires_grad:
            self._set_gradient(torch.autograd.grad(total, targets, create_graph=True, allow_unused=True))
        else:
            self._set_gradient([None] * len(targets))
        self._gradient_of: Callable[[Params], Params] = torch.func.grad(lambda p: loss(p).sum())

    def matvec(self, vector: Tensor) -> Tensor:
        if self.mode == "double-backward":
            return _pull(self.gradient, self.params, unflatten(vector, self.params))
        point = {name: p.detach() for name, p in self.params.items()}
        return flatten(torch.func.jvp(self._gradient_of, (point,), (unflatten(vector, self.params),))[1]).detach()

    def matmat(self, vectors: Tensor) -> Tensor:
        if self.mode == "double-backward":
            return _pull(self.gradient, self.params, unflatten(vectors, self.params), batched=True)
        return torch.vmap(self.matvec)(vectors)


class GaussNewton(_Curvature):
    """Jᵀ (∂²ℓ/∂z²) J with z = outputs(θ), J = ∂z/∂θ: positive semi-definite wherever ℓ is convex in z.

    It is the Hessian less the curvature of the network itself (Schraudolph 2002, §2). J v is the derivative of
    r ↦ Jᵀr, so every product runs on retained graphs and no forward pass is repeated.

    Args:
        outputs: `{name: [tasks, *shape]} -> [tasks, ...]`, task by task.
        loss: `[tasks, ...] -> [tasks]`, convex in the outputs (cross-entropy, squared error, …); its Hessian in the
            outputs is taken by autodiff.
        params: the point θ, task axis first.
    """

    def __init__(self, outputs: Callable[[Params], Tensor], loss: Callable[[Tensor], Tensor], params: Params) -> None:
        super().__init__(params)
        self._outputs = outputs(self.params)
        self._slope = torch.autograd.grad(loss(self._outputs).sum(), self._outputs, create_graph=True)[0]
        if not self._slope.requires_grad:  # a loss linear in z still needs a node to differentiate Jᵀr at
            self._slope = self._slope.requires_grad_()
        targets = list(self.params.values())
        gradients = torch.autograd.grad(self._outputs, targets, self._slope, create_graph=True, allow_unused=True)
        self._set_gradient(gradients)

    def matvec(self, vector: Tensor) -> Tensor:
        return self._product(vector, batched=False)

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._product(vectors, batched=True)

    def _product(self, vector: Tensor, batched: bool) -> Tensor:
        tangent = _derivative(self.gradient, self._slope, unflatten(vector, self.params), batched)
        curved = _derivative({"slope": self._slope}, self._outputs, {"slope": tangent}, batched)
        return _pull({"outputs": self._outputs}, self.params, {"outputs": curved}, batched)


def _pull(outputs: Params, inputs: Params, vectors: Params, batched: bool = False) -> Tensor:
    """(∂ outputs/∂ inputs)ᵀ vectors, flat; zero where nothing connects them."""
    pairs = [(out, vectors[name]) for name, out in outputs.items() if out.requires_grad]
    if not pairs:
        lead = next(iter(vectors.values())).shape[:1] if batched else ()
        return flatten(inputs).detach().new_zeros(*lead, *flatten(inputs).shape)
    products = torch.autograd.grad(
        [out for out, _ in pairs],
        list(inputs.values()),
        [v for _, v in pairs],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    lead = pairs[0][1].shape[:1] if batched else ()
    filled = {
        name: p.new_zeros(*lead, *p.shape) if g is None else g
        for (name, p), g in zip(inputs.items(), products, strict=True)
    }
    return flatten(filled, batch=2 if batched else 1)


def _derivative(outputs: Params, at: Tensor, vectors: Params, batched: bool) -> Tensor:
    flat = _pull(outputs, {"at": at}, vectors, batched)
    return flat.reshape(*flat.shape[:-1], *at.shape[1:])
