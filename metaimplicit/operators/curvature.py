"""Curvature of a loss at a point, as operators: the Hessian, the Gauss–Newton and the Fisher matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaimplicit.graph import check_differentiable
from metaimplicit.operators.base import Curvature, LinearOperator, LossParts
from metaimplicit.params import Params, flatten, leaves, unflatten


class _AtPoint(Curvature):
    """Shared by both: the point, as leaves, and the loss gradient at it with its graph.

    A column of a parameter tensor differentiates the gradient of that tensor alone, which most of the graph has no
    part in: `columns` is cheaper than as many products.

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

    def columns(self, index: Tensor) -> Tensor:
        start, order, found = 0, [], []
        for name, p in self.params.items():
            size = p[0].numel()
            mine = ((index >= start) & (index < start + size)).nonzero().squeeze(-1)
            if len(mine):
                unit = p.new_zeros(len(mine), size)
                unit[torch.arange(len(mine)), index[mine] - start] = 1.0
                part = unit.reshape(-1, 1, *p.shape[1:]).expand(-1, *p.shape)
                found.append(self._image({name: part}, batched=True))
                order.append(mine)
            start += size
        return found[0] if len(found) == 1 else torch.cat(found)[torch.cat(order).argsort()]

    @abstractmethod
    def _image(self, vector: Params, batched: bool) -> Tensor:
        """The product with a vector whose further entries are zero, flat."""


Products = Literal["double-backward", "forward-over-reverse", "finite-differences"]


class Hessian(_AtPoint):
    """∂²ℓ/∂θ² of each task's loss.

    Args:
        loss: `{name: [tasks, *shape]} -> [tasks]`, task i's loss depending on task i's parameters alone.
        params: the point θ, task axis first.
        products: `"double-backward"` differentiates the retained graph of the gradient, Hv = ∂(gᵀv)/∂θ.
            `"forward-over-reverse"` is the tangent of the gradient along v (`torch.func.jvp` of `grad`): no graph is
            kept between products, but each evaluates the loss again. `"finite-differences"` is
            (∇ℓ(θ + hv) − ∇ℓ(θ − hv))/2h with h = ε^⅓ (1 + ‖θ‖)/‖v‖ for each task, ε the unit round-off, which balances
            truncation against cancellation: relative errors of about 1e-10 in float64, 1e-5 in float32.
    """

    needs_outputs = False

    def __init__(
        self,
        loss: Callable[[Params], Tensor],
        params: Params,
        products: Products = "double-backward",
    ) -> None:
        if products not in get_args(Products):
            raise ValueError(
                f"Hessian products: got {products!r}, expected one of {', '.join(get_args(Products))}"
            )
        super().__init__(params)
        self.products = products
        total, targets = loss(self.params).sum(), list(self.params.values())
        if total.requires_grad:
            self._set_gradient(
                torch.autograd.grad(total, targets, create_graph=True, allow_unused=True)
            )
            if products != "finite-differences":
                check_differentiable(self.gradient.values())
        else:
            self._set_gradient([None] * len(targets))
        self._loss = loss

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Hessian:
        return cls(parts.total, parts.params, **options)

    def matvec(self, vector: Tensor) -> Tensor:
        if self.products == "double-backward":
            return self._image(unflatten(vector, self.params), batched=False)
        point = {name: p.detach() for name, p in self.params.items()}
        if self.products == "finite-differences":
            return central_difference(lambda p: flatten(self._slope(p)), point, vector)
        gradient = torch.func.grad(lambda p: self._loss(p).sum())
        return flatten(
            torch.func.jvp(gradient, (point,), (unflatten(vector, self.params),))[1]
        ).detach()

    def matmat(self, vectors: Tensor) -> Tensor:
        if self.products == "double-backward":
            return self._image(unflatten(vectors, self.params), batched=True)
        if self.products == "finite-differences":
            return super().matmat(vectors)
        return torch.vmap(self.matvec)(vectors)

    def columns(self, index: Tensor) -> Tensor:
        return (
            super().columns(index)
            if self.products == "double-backward"
            else LinearOperator.columns(self, index)
        )

    def _image(self, vector: Params, batched: bool) -> Tensor:
        return _pull({name: self.gradient[name] for name in vector}, self.params, vector, batched)

    def _slope(self, params: Params) -> Params:
        at = leaves(params)
        with torch.enable_grad():
            found = torch.autograd.grad(self._loss(at).sum(), list(at.values()), allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(at.items(), found, strict=True)
        }


def central_difference(function: Callable[[Params], Tensor], at: Params, vector: Tensor) -> Tensor:
    """(F(θ + hv) − F(θ − hv))/2h for each task, F: `{name: [tasks, *shape]} -> [tasks, …]`; h as in `Hessian`."""
    theta = flatten(at).detach()
    length = vector.norm(dim=-1, keepdim=True)
    h = torch.finfo(theta.dtype).eps ** (1 / 3) * (1 + theta.norm(dim=-1, keepdim=True))
    h = h / torch.where(length > 0, length, 1.0)
    difference = function(unflatten(theta + h * vector, at)) - function(
        unflatten(theta - h * vector, at)
    )
    slope: Tensor = difference / (2 * h.reshape(-1, *[1] * (difference.dim() - 1)))
    return slope


class GGN(_AtPoint):
    """Jᵀ (∂²ℓ/∂z²) J with z = outputs(θ), J = ∂z/∂θ: positive semi-definite wherever ℓ is convex in z.

    It is the Hessian less the curvature of the network itself (Schraudolph 2002, §2). J v is the derivative of
    r ↦ Jᵀr, so every product runs on retained graphs and no forward pass is repeated.

    Args:
        outputs: `{name: [tasks, *shape]} -> [tasks, ...]`, task by task.
        loss: `[tasks, ...] -> [tasks]`, convex in the outputs (cross-entropy, squared error, …); its Hessian in the
            outputs is taken by autodiff.
        params: the point θ, task axis first.
    """

    semidefinite = True

    def __init__(
        self, outputs: Callable[[Params], Tensor], loss: Callable[[Tensor], Tensor], params: Params
    ) -> None:
        super().__init__(params)
        self._outputs, self._loss = outputs(self.params), loss
        self._slope = torch.autograd.grad(
            loss(self._outputs).sum(), self._outputs, create_graph=True
        )[0]
        if (
            not self._slope.requires_grad
        ):  # a loss linear in z still needs a node to differentiate Jᵀr at
            self._slope = self._slope.requires_grad_()
        targets = list(self.params.values())
        gradients = torch.autograd.grad(
            self._outputs, targets, self._slope, create_graph=True, allow_unused=True
        )
        self._set_gradient(gradients)
        check_differentiable(gradients)

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> GGN:
        return cls(parts.outputs, parts.loss, parts.params, **options)

    def matvec(self, vector: Tensor) -> Tensor:
        return self._image(unflatten(vector, self.params), batched=False)

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._image(unflatten(vectors, self.params), batched=True)

    def _image(self, vector: Params, batched: bool) -> Tensor:
        tangent = _derivative(
            {name: self.gradient[name] for name in vector}, self._slope, vector, batched
        )
        return _pull(
            {"outputs": self._outputs},
            self.params,
            {"outputs": self._bend(tangent, batched)},
            batched,
        )

    def check_convex(self, steps: int = 20) -> None:
        """ValueError if power iterations, in float64 if the loss can, find negative curvature of it in the outputs."""
        with torch.enable_grad():
            try:
                z = self._outputs.detach().double().requires_grad_()
                (slope,) = torch.autograd.grad(self._loss(z).sum(), z, create_graph=True)
            except RuntimeError:  # as where it holds tensors of its own
                z = self._outputs.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self._loss(z).sum(), z, create_graph=True)
        if not slope.requires_grad:  # linear
            return

        def bend(v: Tensor) -> Tensor:
            return torch.autograd.grad(slope, z, v, retain_graph=True)[0].reshape(len(z), -1)

        draws = torch.randn(
            2, *z.shape[1:], generator=torch.Generator().manual_seed(0), dtype=z.dtype
        ).to(z.device)
        largest = z.new_zeros(len(z), 1)
        for (
            draw
        ) in draws:  # the largest |λ|, then the smallest λ, of which |λ|_max − λ is the largest
            v, shift = draw.expand(z.shape).reshape(len(z), -1), largest
            for _ in range(steps):
                v = v / v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
                bent = bend(v.reshape(z.shape))
                lowest, v = (v * bent).sum(1), shift * v - bent
            largest = v.norm(dim=1, keepdim=True)
        if bool((lowest < -1e-3 * shift.squeeze(1) - 1e-13).any()):
            raise ValueError(
                f"Gauss–Newton: got a loss that is not convex in the outputs (curvature {float(lowest.min()):.2g}), "
                "expected one that is; use curvature='hessian'"
            )

    def _bend(self, tangent: Tensor, batched: bool) -> Tensor:
        """The output curvature times a change of the outputs."""
        return _derivative({"slope": self._slope}, self._outputs, {"slope": tangent}, batched)


Likelihood = Literal["softmax", "gaussian"]
Expectation = Literal["exact", "monte-carlo", "empirical"]


class Fisher(GGN):
    """F = (1/m) Σᵢ E[(∂ log p(y|zᵢ)/∂θ)(∂ log p(y|zᵢ)/∂θ)ᵀ] over the m examples of each task: Jᵀ F_z J.

    Exact, it is the Gauss–Newton matrix of the mean negative log-likelihood (Martens 2020, §9), and the Hessian of the
    symmetrised KL divergence at zero displacement.

    Args:
        outputs: `{name: [tasks, *shape]} -> [tasks, …, d]`, task by task; every axis between is one of examples.
        loss: `[tasks, …, d] -> [tasks]`, the mean over examples of a loss each; its gradient is kept, and the
            empirical Fisher is made of it.
        params: the point θ, task axis first.
        likelihood: p(y|z): `"softmax"` over the last axis, or `"gaussian"` with mean z and unit variance.
        expectation: over y, `"exact"`; `"monte-carlo"`, `samples` draws from p(y|z), the same in every product; or
            `"empirical"`, the data's own targets (which is no expectation: Kunstner et al. 2019).
        samples: draws for each example.
        generator: of the draws, on the outputs' device.
    """

    def __init__(
        self,
        outputs: Callable[[Params], Tensor],
        loss: Callable[[Tensor], Tensor],
        params: Params,
        *,
        likelihood: Likelihood = "softmax",
        expectation: Expectation = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if likelihood not in get_args(Likelihood):
            raise ValueError(
                f"Fisher likelihood: got {likelihood!r}, expected one of {', '.join(get_args(Likelihood))}"
            )
        if expectation not in get_args(Expectation):
            raise ValueError(
                f"Fisher expectation: got {expectation!r}, expected one of {', '.join(get_args(Expectation))}"
            )
        if samples < 1:
            raise ValueError(f"Fisher samples: got {samples}, expected at least 1")
        super().__init__(outputs, loss, params)
        z = self._outputs.detach()
        if z.dim() < 3:
            raise ValueError(
                f"Fisher outputs: got shape {tuple(z.shape)}, expected [tasks, examples, …, d]"
            )
        self.likelihood, self._examples = likelihood, z[0, ..., 0].numel()
        self._mean = z.softmax(-1)
        self._scores: Tensor | None = None
        if expectation != "exact":
            self._scores = output_scores(
                z, self._slope.detach(), likelihood, expectation, samples, generator
            )

    @classmethod
    def from_loss(cls, parts: LossParts, **options: Any) -> Fisher:
        if parts.weighted:
            raise ValueError(
                "Fisher: got an inner loss with weights, which it does not see; use 'gauss-newton'"
            )
        return cls(parts.outputs, parts.loss, parts.params, **options)

    def check_convex(self, steps: int = 20) -> None:
        """Nothing: it is positive semi-definite whatever the loss."""

    def _bend(self, tangent: Tensor, batched: bool) -> Tensor:
        if self._scores is not None:
            each = [score * (score * tangent).sum(-1, keepdim=True) for score in self._scores]
            return torch.stack(each).sum(0) / self._examples
        if self.likelihood == "gaussian":
            return tangent / self._examples
        weighted = self._mean * tangent
        return (weighted - self._mean * weighted.sum(-1, keepdim=True)) / self._examples


def output_scores(
    z: Tensor,
    slope: Tensor,
    likelihood: Likelihood,
    expectation: Expectation,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Vectors s whose Σ s sᵀ is the Fisher matrix in the outputs of each example, `[count, *z.shape]`.

    `slope` is the gradient in z of the mean loss over examples; the arguments are those of `Fisher`.
    """
    d = z.shape[-1]
    if expectation == "empirical":
        return slope.unsqueeze(0) * z[0, ..., 0].numel()
    if expectation == "monte-carlo" and likelihood == "gaussian":
        noise = torch.randn(samples, *z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return noise * torch.tensor(samples**-0.5).to(noise)
    if likelihood == "gaussian":
        return (
            torch.eye(d, dtype=z.dtype, device=z.device)
            .reshape(d, *[1] * (z.dim() - 1), d)
            .expand(d, *z.shape)
        )
    p = z.softmax(-1)
    if expectation == "exact":
        labels = (
            torch.arange(d, device=z.device)
            .reshape(d, *[1] * (z.dim() - 1))
            .expand(d, *z.shape[:-1])
        )
        weight = p.movedim(-1, 0).sqrt().unsqueeze(-1)
    else:
        drawn = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
        labels, weight = drawn.T.reshape(samples, *z.shape[:-1]), torch.tensor(samples**-0.5).to(z)
    scores: Tensor = weight * (p - torch.nn.functional.one_hot(labels, d).to(z))
    return scores


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
