"""K-FAC as an optimiser: running Kronecker factors, amortised inverses, sampled targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaimplicit.operators import Expectation, Fisher, Likelihood
from metaimplicit.operators.layers import record_layers
from metaimplicit.operators.likelihood import check_fisher_options
from metaimplicit.operators.loss_scores import LossScores, loss_scores
from metaimplicit.optim.base import BatchLoss, Loss, SecondOrder
from metaimplicit.optim.checks import (
    check_count,
    check_finite,
    check_fraction,
    check_loss,
    check_positive,
    check_scalar,
    raise_if,
)
from metaimplicit.optim.closure import (
    Closure,
    ReplayedClosure,
    explain_freed_graph,
    explain_torch_errors,
)
from metaimplicit.optim.damping import (
    MeasuredLoss,
    levenberg_marquardt,
    predicted_reduction,
)
from metaimplicit.optim.factored_layers import (
    ADVICE,
    LayerRecording,
    find_factored_layers,
)
from metaimplicit.optim.factors import (
    invert_factors,
    precondition,
    update_factors,
)
from metaimplicit.params import Params, flatten

# The first steps renew factors and inverses at any intervals, because the averages change most.
EARLY_STEPS = 3


class KFAC(SecondOrder):
    """θ ← θ − lr v with v ← μv + νu, u = ⊕_layers (G + √λ/π I)⁻¹ ∇W̄ (A + π√λ I)⁻¹, W̄ = [W, b].

    A = E[ā āᵀ] of the inputs of a layer, and G = E[g gᵀ] of the gradients of −log p(y|z) in its
    outputs (Martens & Grosse 2015). In a convolution they are taken over its patches (Grosse &
    Martens 2016). Both are running averages; the decay of the k-th update is min(1 − 1/k, `decay`).
    π² = (tr A/dim A)/(tr G/dim G) balances the damping of the two (§6.3).

    ν = min(1, √(κ/(lr² uᵀ∇L))) clips the step: its squared norm in the damped F̂, before momentum,
    is at most κ. To second order that norm is twice the KL divergence (Ba et al. 2017).

    A step takes one forward pass and one backward pass for ∇L. Where the factors are renewed, it
    takes another backward pass to the layers' outputs, of targets that are drawn from the model.
    Buffers, such as batch-norm's statistics, and dropout see one forward pass, as with any
    optimiser. The two evaluations that adapt λ leave nothing behind.

    Args:
        model: The model. Its linear and 2-d convolutional layers are called once in a forward pass.
            Its outputs are `[m, …, d]`.
        loss: `(outputs, targets) -> scalar`, −log p of the examples in any weighted sum: the forms
            of cross-entropy, squared error, and binary cross-entropy of logits. The factors count
            examples as the loss does.
        lr: The length of the step, > 0. It is `param_groups[0]["lr"]`, which schedulers set.
        damping: λ > 0. The present one is `param_groups[0]["damping"]`.
        momentum: μ in [0, 1).
        decay: The decay of the averages, in [0, 1).
        update_every: The number of steps between updates of the factors. The first three steps
            update them, too.
        invert_every: The number of steps between updates of the damped inverses. The first three
            steps update them, too.
        kl_clip: κ > 0. If None, ν = 1.
        adapt_every: T. Every T steps λ follows ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)), where m(δ) =
            L + ∇Lᵀδ + ½ δᵀFδ with the exact Fisher matrix. λ is multiplied by (20/19)^T if ρ < ¼.
            It is multiplied by (19/20)^T if ρ > ¾ and ν = 1, because a step that is cut short fits
            its model for any λ. (In §6.5 λ is part of m, and no step is cut.) No step is taken
            back. If None, λ is fixed.
        likelihood: p(y|z): `"softmax"`, `"gaussian"` with unit variance, or `"sigmoid"`. If None,
            the one that the loss has.
        expectation: The expectation over y in G: `"monte-carlo"`, with one draw for each example;
            `"exact"`, with as many backward passes as an example has outputs; or `"empirical"`,
            with the targets in the place of y. `"exact"` is for models that treat examples one by
            one. Batch-norm in training does not, and there only the draws of `"monte-carlo"` are
            independent.
        others: What happens to parameters of any other layer. With `"raise"` they are an error.
            With `"gradient"` their block is the identity, so u = ∇L.
        seed: The seed of the draws.

    Raises:
        ValueError: A number is out of range, a parameter is in another kind of layer, two layers
            share a parameter. On a step: the loss is −log p of no such likelihood.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.tensor([[-1.0], [1.0], [2.0]])
        >>> y = torch.tensor([0, 1, 1])
        >>> model = nn.Linear(1, 2)
        >>> optimizer = KFAC(model, nn.functional.cross_entropy, lr=0.5)
        >>> losses = [optimizer.step(lambda: (model(x), y)).item() for _ in range(2)]
        >>> losses[1] < losses[0]
        True
    """

    min_output_dims = 2

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
        likelihood: Likelihood | None = None,
        expectation: Expectation = "monte-carlo",
        others: Literal["raise", "gradient"] = "raise",
        seed: int = 0,
    ) -> None:
        check_loss("KFAC", loss)
        check_fisher_options("KFAC", likelihood=likelihood, expectation=expectation)
        check_positive("KFAC", lr=lr, damping=damping)
        check_fraction("KFAC", momentum=momentum, decay=decay)
        check_count("KFAC", "step", update_every=update_every, invert_every=invert_every)
        if kl_clip is not None:
            check_positive("KFAC", kl_clip=kl_clip)
        if adapt_every is not None:
            check_count("KFAC", "step", adapt_every=adapt_every)
        if others not in ("raise", "gradient"):
            raise ValueError(f"KFAC others: got {others!r}, expected 'raise' or 'gradient'")
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "decay": decay,
            "update_every": update_every,
            "invert_every": invert_every,
            "kl_clip": kl_clip,
            "adapt_every": adapt_every,
            "steps": 0,
            "updates": 0,
        }
        super().__init__(model, defaults, seed)
        self.loss = loss
        self.likelihood = likelihood
        self.expectation: Expectation = expectation
        self._draws_targets = expectation == "monte-carlo"
        self._layers = find_factored_layers(model, self._trainable, others=others)

    @torch.inference_mode(False)
    @torch.no_grad()
    @explain_torch_errors
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Take one step on one batch.

        Args:
            closure: It calls the model, once, but not `backward`.

        Returns:
            The loss before the step, a detached scalar. The gradient of that loss is in `.grad`.

        Raises:
            FloatingPointError: The loss or its gradient is not finite, or a damped factor is
                singular to working precision. No parameter was changed.
            ValueError: The closure does not return what it should, a layer is called twice or not
                at all, or one of its parameters is read outside of it, too.
        """
        closure = self._check_closure(closure)
        group = self.param_groups[0]
        step = group["steps"]
        is_early = step < EARLY_STEPS
        updates_factors = is_early or step % group["update_every"] == 0
        updates_inverses = is_early or step % group["invert_every"] == 0
        replay: ReplayedClosure | None = None
        if group["adapt_every"] is not None and (step + 1) % group["adapt_every"] == 0:
            replay = ReplayedClosure(self._model, closure, self._device)

        with explain_freed_graph():
            loss, gradients = self._linearise(replay or closure, updates_factors=updates_factors)
        if updates_inverses:
            invert_factors(self._states(), group["damping"])
        for name, p in self._trainable.items():
            p.grad = gradients[name].clone()

        delta, nu = self._change(gradients)
        if replay is None:
            self._add(delta)
        else:
            before, predicted = self._predicted_reduction(replay, gradients, delta)
            self._add(delta)
            after = MeasuredLoss.of_outputs(self.loss, *self._evaluate(replay))
            self._adapt_damping(before, after, predicted, nu=nu)
        group["steps"] += 1
        return loss

    def _linearise(self, evaluate: Closure, *, updates_factors: bool) -> tuple[Tensor, Params]:
        """L and ∇L. The factors are updated from the same forward pass."""
        recording = LayerRecording()
        with torch.enable_grad():
            outputs, targets = self._evaluate(evaluate, recording if updates_factors else None)
            loss = check_scalar(self.loss(outputs, targets), "loss")
        if not loss.requires_grad:
            raise ValueError(
                "closure: the loss does not depend on the model; call the model with gradients on, "
                "and detach nothing"
            )
        output_gradients: dict[str, Tensor] = {}
        if updates_factors:
            check_finite(self._owner, loss.detach(), outputs.detach())
            mixes_positions = partial(recording.mixes_positions, outputs, self._layers)
            scores, weights, probes = self._scores(outputs.detach(), targets, mixes_positions)
            output_gradients = recording.output_gradients(outputs, scores)
            recording.reject_reads_outside(outputs, self._layers, self._trainable)
            probe_gradients = None
            if probes is not None:
                probe_gradients = recording.output_gradients(outputs, probes)

        gradients = self._gradients(loss)
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        raise_if(
            ~loss.detach().isfinite() | ~norms.isfinite().all(),
            "KFAC: the loss or its gradient is not finite; no parameter was changed",
        )
        if updates_factors:
            update_factors(
                self._states(),
                self._layers,
                recording.inputs,
                output_gradients=output_gradients,
                weights=weights,
                probes=probe_gradients,
                decay=self._next_decay(),
            )
        return loss.detach(), gradients

    def _evaluate(
        self, evaluate: Closure, recording: LayerRecording | None = None
    ) -> tuple[Tensor, Any]:
        """The outputs and the targets, with the layers recorded if a recording is given."""
        if recording is None:
            return self._unpack(evaluate())
        modules = {name: layer.module for name, layer in self._layers.items()}
        return self._unpack(record_layers(modules, evaluate, recording.record, ADVICE))

    def _scores(
        self, outputs: Tensor, targets: Any, mixes_positions: Callable[[int], bool]
    ) -> LossScores:
        """The scores and the probes, without the task axis, and the weights, with it."""
        scores, weights, probes = loss_scores(
            lambda z: self.loss(z.squeeze(0), targets).unsqueeze(0),
            outputs.unsqueeze(0),
            owner=self._owner,
            likelihood=self.likelihood,
            expectation=self.expectation,
            checked=self._checked,
            generator=self._make_generator() if self._draws_targets else None,
            mixes_positions=mixes_positions,
        )
        if probes is not None:
            probes = probes.squeeze(1)
        return LossScores(scores.squeeze(1), weights, probes)

    def _gradients(self, loss: Tensor) -> Params:
        """∇L by name. The graph of the loss is freed."""
        parameters = list(self._trainable.values())
        values = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = {}
        for name, gradient in zip(self._trainable, values, strict=True):
            if gradient is None:
                raise ValueError(
                    f"KFAC: the loss does not depend on {name!r}; freeze it (requires_grad_(False))"
                )
            gradients[name] = gradient
        return gradients

    def _next_decay(self) -> float:
        """The decay of one more update."""
        group = self.param_groups[0]
        group["updates"] += 1
        return float(min(1 - 1 / group["updates"], group["decay"]))

    def _states(self) -> dict[str, dict[str, Any]]:
        """The state of each layer, which is that of its weight."""
        return {
            name: self.state[self._trainable[layer.weight]] for name, layer in self._layers.items()
        }

    def _change(self, gradients: Params) -> tuple[Params, Tensor]:
        """δ = −lr v, and ν."""
        group = self.param_groups[0]
        directions = precondition(self._states(), self._layers, gradients)
        nu = torch.ones((), device=self._device)
        if group["kl_clip"] is not None:
            products = [(directions[name] * g).sum() for name, g in gradients.items()]
            square = group["lr"] ** 2 * torch.stack(products).sum()  # lr² uᵀ∇L
            nu = (group["kl_clip"] / square).sqrt().clamp(max=1.0)
            directions = {name: nu * u for name, u in directions.items()}
        if group["momentum"] > 0:
            for name, u in directions.items():
                directions[name] = self._add_momentum(name, u)
        return {name: -group["lr"] * v for name, v in directions.items()}, nu

    def _add_momentum(self, name: str, u: Tensor) -> Tensor:
        """The velocity v ← μv + u, which starts at u."""
        state = self.state[self._trainable[name]]
        if "momentum" in state:
            v: Tensor = self.param_groups[0]["momentum"] * state["momentum"] + u
        else:
            v = u.clone()  # because u may be the gradient itself
        state["momentum"] = v
        return v

    def _add(self, delta: Params) -> None:
        # Autocast would go on to use the parameters that it has cast.
        torch.clear_autocast_cache()
        torch._foreach_add_(list(self._trainable.values()), list(delta.values()))

    def _predicted_reduction(
        self, replay: ReplayedClosure, gradients: Params, delta: Params
    ) -> tuple[MeasuredLoss, Tensor]:
        """L at θ, and m(0) − m(δ) with the exact Fisher matrix."""
        batch = BatchLoss(self, replay, self.loss)
        with torch.enable_grad():
            fisher = Fisher(
                batch.outputs,
                batch.loss,
                self._task_params(),
                likelihood=self.likelihood,
                checked=self._checked,
            )
        g = flatten({name: gradients[name].unsqueeze(0) for name in self._trainable})
        d = flatten({name: delta[name].unsqueeze(0) for name in self._trainable})
        return batch.measure(), predicted_reduction(fisher, g, d)

    def _adapt_damping(
        self, before: MeasuredLoss, after: MeasuredLoss, predicted: Tensor, *, nu: Tensor
    ) -> None:
        group = self.param_groups[0]
        eps = torch.finfo(self._dtype).eps
        self.ratio = before.ratio(after, predicted, eps=eps)
        omega = (19 / 20) ** group["adapt_every"]
        group["damping"] = levenberg_marquardt(
            group["damping"],
            self.ratio,
            decrease=omega if bool(nu == 1) else 1.0,
            increase=1 / omega,
            floor=eps * self.defaults["damping"],
        )
