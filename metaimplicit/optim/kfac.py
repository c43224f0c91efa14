"""K-FAC as an optimiser: running Kronecker factors, amortised inverses, sampled targets."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metaimplicit.operators import Expectation, Fisher, Likelihood
from metaimplicit.operators.fisher import output_scores
from metaimplicit.operators.layers import (
    is_supported,
    layer_patches,
    record_layers,
    second_moments,
)
from metaimplicit.optim.base import (
    Closure,
    Loss,
    ReplayedClosure,
    SecondOrder,
    check_likelihood,
    check_numbers,
    levenberg_marquardt,
    raise_if,
    ratio,
)
from metaimplicit.params import Params, flatten

EARLY = 3  # steps that renew factors and inverses whatever the intervals, since the first averages change most
_ADVICE = "use optim.GaussNewton, or freeze it (requires_grad_(False))"


class KFAC(SecondOrder):
    """θ ← θ − lr v, v ← μv + νu, u = ⊕_layers (G + √λ/π I)⁻¹ ∇W̄ (A + π√λ I)⁻¹, W̄ = [W, b] (Martens & Grosse 2015).

    A = E[ā āᵀ] of a layer's inputs and G = E[g gᵀ] of the gradients of −log p(y|z) in its outputs, of a convolution
    over its patches (Grosse & Martens 2016), are running averages, the k-th of decay min(1 − 1/k, `decay`);
    π² = (tr A/dim A)/(tr G/dim G) shares λ out (§6.3). ν = min(1, √(κ/(lr² uᵀ∇L))) keeps the square of the step, before
    momentum, at κ at most in the norm of the damped F̂, to second order twice the KL divergence (Ba et al. 2017).

    One forward pass, one backward pass for ∇L, and where factors are renewed one more, through the layers' outputs
    alone, of targets drawn from the model itself. Buffers (batch-norm's statistics) and dropout see one forward pass,
    as with any optimiser; the two evaluations more that adapt λ leave nothing behind.

    Args:
        model: whose linear and 2-d convolutional layers are moved, each called once in a forward pass.
        loss: `(outputs, targets) -> scalar`, the mean of −log p over examples: of outputs `[m, …, d]`, cross-entropy
            over the last axis, or for `"gaussian"` ½ Σ_d (z − y)², which is d/2 times `F.mse_loss`.
        lr: length of the step, > 0; `param_groups[0]["lr"]` is what schedulers set.
        damping: λ > 0; it is `param_groups[0]["damping"]`.
        momentum: μ in [0, 1).
        decay: of the averages, in [0, 1).
        update_every, invert_every: steps between renewals of the factors, and of their damped inverses; the first three
            steps renew both.
        kl_clip: κ > 0; None: ν = 1.
        adapt_every: T, let λ follow ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)) every T steps, m(δ) = L + ∇Lᵀδ + ½ δᵀFδ with
            the exact Fisher matrix: (20/19)^T λ where ρ < ¼, and (19/20)^T λ where ρ > ¾ and ν = 1, since a step cut
            short fits its model whatever λ (§6.5, where λ is part of m, and no step is cut). No step is taken back.
            None: λ is fixed.
        likelihood: p(y|z), `"softmax"`, or `"gaussian"` of unit variance.
        expectation: over y in G, `"monte-carlo"`, of one draw for each example; `"exact"`, as many backward passes as
            outputs, for models that take examples one by one (batch-norm in training does not, and only the draws of
            `"monte-carlo"` are independent there); or `"empirical"`, the targets.
        others: of parameters of any other layer: `"raise"`, or `"gradient"`, the identity as their block, so u = ∇L.
        seed: of the draws.

    Raises:
        ValueError: a number out of range; parameters of another kind of layer, or shared by two; on a step, a layer
            called twice or not at all, or a closure that is none of `closure() -> (outputs, targets)`.
    """

    axes = 2

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float = 0.1,
        damping: float = 1e-2,
        momentum: float = 0.9,
        decay: float = 0.95,
        update_every: int = 5,
        invert_every: int = 20,
        kl_clip: float | None = 1e-3,
        adapt_every: int | None = None,
        likelihood: Likelihood = "softmax",
        expectation: Expectation = "monte-carlo",
        others: Literal["raise", "gradient"] = "raise",
        seed: int = 0,
    ) -> None:
        check_likelihood("KFAC", loss, likelihood, expectation)
        check_numbers("KFAC", above=0, lr=lr, damping=damping)
        if kl_clip is not None:
            check_numbers("KFAC", above=0, kl_clip=kl_clip)
        for name, value in {"momentum": momentum, "decay": decay}.items():
            if not 0 <= value < 1:
                raise ValueError(f"KFAC {name}: got {value}, expected a number in [0, 1)")
        for name, steps in {
            "update_every": update_every,
            "invert_every": invert_every,
            "adapt_every": adapt_every,
        }.items():
            if steps is not None and steps < 1:
                raise ValueError(f"KFAC {name}: got {steps}, expected at least 1 step")
        if others not in ("raise", "gradient"):
            raise ValueError(f"KFAC others: got {others!r}, expected 'raise' or 'gradient'")
        defaults = {
            "lr": lr, "damping": damping, "momentum": momentum, "decay": decay, "update_every": update_every,
            "invert_every": invert_every, "kl_clip": kl_clip, "adapt_every": adapt_every, "steps": 0, "updates": 0,
        }  # fmt: skip
        super().__init__(model, defaults, seed)
        self.loss, self.likelihood, self.expectation = loss, likelihood, expectation
        self._layers = _layers(model, self._own, others)
        if not self._layers:
            raise ValueError(
                f"KFAC model: got no linear or 2-d convolutional layer that requires grad; {_ADVICE}"
            )

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One step, on one batch.

        Args:
            closure: calls the model, once, and no backward.

        Returns:
            The loss before the step, a detached scalar. Its gradient there is left in `.grad`.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, or a damped factor is singular to working
                precision; no parameter has moved.
        """
        group, closure = self.param_groups[0], self._closure(closure)
        step = group["steps"]
        update = step < EARLY or step % group["update_every"] == 0
        adapt = group["adapt_every"] is not None and (step + 1) % group["adapt_every"] == 0
        evaluate = ReplayedClosure(self._model, closure, self._device) if adapt else closure
        inputs: Params = {}
        edges: dict[str, GradientEdge] = {}

        def record(name: str, given: Tensor, output: Tensor) -> None:
            inputs[name] = given.detach()
            if output.requires_grad:
                edges[name] = get_gradient_edge(
                    output
                )  # not the tensor, which an activation may change in place

        with torch.enable_grad():
            outputs, targets = self._pair(
                record_layers(self._layers, evaluate, record, _ADVICE) if update else evaluate()
            )
            loss = self._scalar(self.loss(outputs, targets), "loss")
        if not loss.requires_grad:
            raise ValueError(
                "closure: the loss does not depend on the model; call it with gradients on, detach nothing"
            )
        if update:
            self._finite(loss.detach(), outputs.detach())
        if step == 0:
            self._check_softmax(loss, outputs)
        slopes = self._slopes(outputs, loss, edges) if update else {}
        own = list(self._own.values())
        gradients = dict(
            zip(self._own, torch.autograd.grad(loss, own, allow_unused=True), strict=True)
        )
        if unused := [name for name, g in gradients.items() if g is None]:
            raise ValueError(
                f"KFAC: the loss does not depend on {unused[0]!r}; freeze it (requires_grad_(False))"
            )
        sizes = torch.stack(torch._foreach_norm(list(gradients.values())))
        loss = loss.detach()
        raise_if(
            ~loss.isfinite() | ~sizes.isfinite().all(),
            "KFAC: the loss or its gradient is not finite; nothing moved",
        )
        if update:
            self._average(inputs, slopes, outputs.detach()[..., 0].numel())
        del outputs
        if step < EARLY or step % group["invert_every"] == 0:
            self._invert(group["damping"])
        for name, p in self._own.items():
            p.grad = gradients[name]
        delta, nu = self._step(gradients)
        predicted = (
            self._predicted(evaluate, gradients, delta)
            if isinstance(evaluate, ReplayedClosure)
            else None
        )
        torch._foreach_add_(own, list(delta.values()))
        if predicted is not None:
            self._adapt(loss, evaluate(), predicted, nu)
        group["steps"] += 1
        return loss

    def _slopes(
        self, outputs: Tensor, loss: Tensor, edges: dict[str, GradientEdge]
    ) -> dict[str, Tensor]:
        """The gradients of −log p(y|z) in each layer's outputs, `[count, m, …]`, one for each example and drawn y."""
        z = outputs.unsqueeze(0)
        slope = (
            z
            if self.expectation != "empirical"
            else torch.autograd.grad(loss, outputs, retain_graph=True)[0][None]
        )
        generator = self._generator() if self.expectation == "monte-carlo" else None
        scores = output_scores(
            z.detach(), slope.detach(), self.likelihood, self.expectation, 1, generator
        ).squeeze(1)
        many = len(scores) > 1
        found = torch.autograd.grad(
            outputs,
            list(edges.values()),
            scores if many else scores[0],
            is_grads_batched=many,
            retain_graph=True,
            allow_unused=True,
        )
        slopes = {
            name: g if many else g.unsqueeze(0)
            for name, g in zip(edges, found, strict=True)
            if g is not None
        }
        if unused := [name for name in self._layers if name not in slopes]:
            raise ValueError(f"KFAC: the outputs do not depend on layer {unused[0]!r}; {_ADVICE}")
        return slopes

    def _average(self, inputs: Params, slopes: Params, examples: int) -> None:
        group = self.param_groups[0]
        group["updates"] += 1
        decay = min(1 - 1 / group["updates"], group["decay"])
        for name, layer in self._layers.items():
            weight, bias = self._names(name)
            given, slope = (
                x.to(self._dtype) for x in (inputs[name].unsqueeze(0), slopes[name].unsqueeze(1))
            )
            a, g = layer_patches(layer, given, slope, bias is not None)
            state = self.state[self._own[weight]]
            for key, new in zip(("A", "G"), second_moments(a, g, examples), strict=True):
                state[key] = state[key].lerp_(new[0], 1 - decay) if key in state else new[0]

    def _invert(self, damping: float) -> None:
        made: list[tuple[Any, str, Tensor]] = []
        failed = []
        for name in self._layers:
            state = self.state[self._own[self._names(name)[0]]]
            mean_a, mean_g = state["A"].diagonal().mean(), state["G"].diagonal().mean()
            pi = torch.where((mean_a > 0) & (mean_g > 0), mean_a.sqrt() / mean_g.sqrt(), 1.0)
            for key, shift in (("A", pi * math.sqrt(damping)), ("G", math.sqrt(damping) / pi)):
                damped = state[key].clone()
                damped.diagonal().add_(shift)
                factor, info = torch.linalg.cholesky_ex(damped)
                made.append((state, key, factor))
                failed.append(info > 0)
        if failed:
            raise_if(
                torch.stack(failed),
                f"KFAC: a factor is singular at damping = {damping:.3g}; raise damping",
            )
        for state, key, factor in made:
            state[f"{key} inverse"] = torch.cholesky_inverse(factor)

    def _step(self, gradients: Params) -> tuple[Params, Tensor]:
        """δ = −lr v, and ν."""
        group, directions, nu = (
            self.param_groups[0],
            dict(gradients),
            torch.ones((), device=self._device),
        )
        for name in self._layers:
            weight, bias = self._names(name)
            state, v = self.state[self._own[weight]], gradients[weight].flatten(1)
            v = v if bias is None else torch.cat([v, gradients[bias].unsqueeze(-1)], dim=-1)
            v = state["G inverse"] @ v @ state["A inverse"]
            directions[weight] = (v if bias is None else v[:, :-1]).reshape_as(gradients[weight])
            if bias is not None:
                directions[bias] = v[:, -1]
        if group["kl_clip"] is not None:
            inner = torch.stack(
                [
                    (u * g).sum()
                    for u, g in zip(directions.values(), gradients.values(), strict=True)
                ]
            ).sum()
            nu = (group["kl_clip"] / (group["lr"] ** 2 * inner)).sqrt().clamp(max=1.0)
            directions = {name: nu * u for name, u in directions.items()}
        if group["momentum"] > 0:
            for name, u in directions.items():
                state = self.state[self._own[name]]
                past = state.get("momentum")
                directions[name] = state["momentum"] = (
                    u.clone() if past is None else group["momentum"] * past + u
                )
        return {name: -group["lr"] * v for name, v in directions.items()}, nu

    def _predicted(self, evaluate: ReplayedClosure, gradients: Params, delta: Params) -> Tensor:
        """m(0) − m(δ)."""
        with torch.enable_grad():
            outputs, loss, _ = self._split(evaluate, self.loss)
            fisher = Fisher(outputs, loss, self._leaves(), likelihood=self.likelihood)
        d, g = (
            flatten({name: p[name].unsqueeze(0) for name in self._own}) for p in (delta, gradients)
        )
        return -((g + 0.5 * fisher.matvec(d)) * d).sum()

    def _adapt(self, loss: Tensor, found: Any, predicted: Tensor, nu: Tensor) -> None:
        group, eps = self.param_groups[0], torch.finfo(self._dtype).eps
        after = self._scalar(self.loss(*self._pair(found)), "loss")
        self.ratio = ratio(torch.stack([loss, after, predicted]), eps)
        omega = (19 / 20) ** group["adapt_every"]
        easier = omega if bool(nu == 1) else 1.0
        group["damping"] = levenberg_marquardt(
            group["damping"],
            self.ratio,
            easier=easier,
            harder=1 / omega,
            floor=eps * self.defaults["damping"],
        )

    def _names(self, layer: str) -> tuple[str, str | None]:
        """Of its weight, and of its bias if that is moved."""
        prefix = f"{layer}." if layer else ""
        return f"{prefix}weight", f"{prefix}bias" if f"{prefix}bias" in self._own else None


def _layers(model: nn.Module, own: Params, others: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that K-FAC moves, by name."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    names: dict[int, str] = {}
    for name, layer in model.named_modules():
        keys = [key for key, p in layer.named_parameters(recurse=False) if p.requires_grad]
        for key in keys:
            path, p = f"{name}.{key}" if name else key, layer.get_parameter(key)
            if (first := names.setdefault(id(p), path)) != path:
                raise ValueError(
                    f"KFAC: {first!r} and {path!r} are one parameter, of two layers; {_ADVICE}"
                )
        objection = _objection(layer, keys) if keys else ""
        if objection and others == "raise":
            raise ValueError(
                f"KFAC: layer {name!r} ({type(layer).__name__}): {objection}; {_ADVICE}, or give it the "
                "is_supported gradient by others='gradient'"
            )
        if keys and not objection and isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = layer
    return found


def _objection(layer: nn.Module, keys: list[str]) -> str:
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return (
            "a recurrent layer uses its weights at every time step, so its block of F is no G ⊗ A"
        )
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return "only linear and 2-d convolutional layers have a block G ⊗ A here"
    if not is_supported(layer):
        return "it is grouped, or its padding is not a number of zeros, or its forward is its own"
    if foreign := sorted(set(keys) - {"weight", "bias"}):
        return f"{foreign[0]!r} is no weight or bias of such a layer"
    if "weight" not in keys:
        return f"{keys[0]!r} requires grad without a weight that does"
    return ""
