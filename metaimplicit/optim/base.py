"""What the second-order optimisers share: closures that can be called again, checks, and a damping that adapts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from metaimplicit.operators import Expectation, Likelihood
from metaimplicit.params import Params
from metaimplicit.solvers.trust_region import reduction_ratio

_LIKELIHOODS = {  # of losses whose name says it
    "cross_entropy": "softmax",
    "CrossEntropyLoss": "softmax",
    "mse_loss": "gaussian",
    "MSELoss": "gaussian",
}
Closure = Callable[[], Any]
Loss = Callable[[Tensor, Any], Tensor]  # (outputs, targets) -> scalar, the mean over examples


class SecondOrder(torch.optim.Optimizer):
    """The parameters of `model` that require grad, in one group, and the random numbers of a sampled Fisher matrix."""

    wants = "closure() -> (outputs, targets), as in step(lambda: (model(x), y))"
    axes = 0  # of the outputs, at least
    likelihood: Likelihood = (
        "gaussian"  # whose −log the loss has to be; of "gaussian" it cannot be seen
    )

    def __init__(self, model: nn.Module, defaults: dict[str, Any], seed: int | None = None) -> None:
        owner = type(self).__name__
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{owner} model: got {type(model).__name__}, expected an nn.Module, whose names it needs"
            )
        self._model = model
        self._own: Params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._own:
            raise ValueError(
                f"{owner} model: got no parameter that requires grad, expected at least one"
            )
        first = next(iter(self._own.values()))
        self._dtype, self._device = first.dtype, first.device
        for name, p in self._own.items():
            if (p.dtype, p.device) != (first.dtype, first.device) or p.dtype not in (
                torch.float32,
                torch.float64,
            ):
                raise ValueError(
                    f"{owner} model: got {name!r} as {p.dtype} on {p.device}, expected {first.dtype} on {first.device} "
                    "of every parameter, in single or double precision; convert the model first"
                )
        self._random = None if seed is None else torch.Generator().manual_seed(seed)
        self.ratio: float | None = None
        super().__init__(list(self._own.values()), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__}: got another parameter group, expected one; build it on one model"
            )
        super().add_param_group(param_group)

    def __getstate__(
        self,
    ) -> dict[str, Any]:  # of copies and pickles: torch's own leaves out what is not its own
        # nor hooks, nor the `step` that a scheduler wraps around this very optimiser
        return {
            k: v
            for k, v in self.__dict__.items()
            if k != "step" and not k.startswith("_optimizer_")
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on to the same bits; `torch.load(weights_only=True)` reads it."""
        state = super().state_dict()
        return state if self._random is None else {**state, "random": self._random.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._random is not None:
            if "random" not in state_dict:
                raise ValueError(
                    f"{type(self).__name__} state: got none of random numbers, expected its own state"
                )
            self._random.set_state(state_dict["random"].cpu())
        super().load_state_dict(
            {name: part for name, part in state_dict.items() if name != "random"}
        )

    def _generator(self) -> torch.Generator:
        """A generator on the parameters' device; only the one that seeds it, on the CPU, is state."""
        seed = int(torch.randint(2**62, (), generator=self._random))
        return torch.Generator(self._device).manual_seed(seed)

    def _closure(self, closure: Closure | None) -> Closure:
        if not callable(closure):
            raise ValueError(f"step: got {closure!r}, expected {self.wants}")
        if frozen := [name for name, p in self._own.items() if not p.requires_grad]:
            raise ValueError(
                f"step: {frozen[0]!r} was frozen after the optimiser was built; build it anew"
            )
        return closure

    def _pair(self, found: Any) -> tuple[Tensor, Any]:
        if (
            not isinstance(found, (tuple, list))
            or len(found) != 2
            or not isinstance(found[0], Tensor)
        ):
            got = (
                f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            )
            raise ValueError(
                f"closure: returned {got}, expected a pair (outputs, targets): {self.wants}"
            )
        if found[0].dim() < self.axes:
            raise ValueError(
                f"closure: returned outputs of shape {tuple(found[0].shape)}, expected [examples, …, d]; unsqueeze(-1)"
            )
        return found[0], found[1]

    def _check_softmax(self, loss: Tensor, outputs: Tensor) -> None:
        """ValueError for a loss that is seen to be no −log softmax(z): its gradients sum to zero over the classes."""
        if self.likelihood == "softmax" and loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, outputs, retain_graph=True)
            off = (
                slope.sum(-1).abs().sum()
                > 0.01 * slope.abs().sum() + 10 * torch.finfo(slope.dtype).eps
            )
            raise_if(
                off
                & ~(
                    outputs.detach().logsumexp(-1).abs() < 1e-3
                ).all(),  # log p serves nll_loss as logits do
                f"{type(self).__name__} loss: got one whose gradient does not sum to zero over the last axis of the "
                "outputs, expected cross-entropy over that axis; move the classes there, set likelihood='gaussian' for "
                "½ Σ (z − y)², or use GaussNewton",
                ValueError,
            )

    def _scalar(self, value: Any, source: str) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise ValueError(
                f"{source}: returned {got}, expected a scalar tensor, the mean over examples; reduce it, as by "
                "reduction='mean'"
            )
        return value

    def _finite(self, loss: Tensor, outputs: Tensor | None = None) -> None:
        """Before anything is drawn from the outputs; a logit of −∞ is a class that is left out."""
        bad = (
            ~loss.isfinite() if outputs is None else ~loss.isfinite() | ~(outputs < torch.inf).all()
        )
        raise_if(
            bad, f"{type(self).__name__}: the loss or the outputs are not finite; nothing was moved"
        )

    def _differentiable(self, value: Tensor, source: str) -> Tensor:
        """`value`, which has to have a graph, and one to parameters that were put in place for the call alone."""
        if not value.requires_grad:
            raise ValueError(
                f"{source}: its result does not depend on a parameter of the model that requires grad; call the model "
                "with gradients on, and detach nothing"
            )
        found = torch.autograd.grad(
            value.sum(), list(self._own.values()), retain_graph=True, allow_unused=True
        )
        if reads := [name for name, g in zip(self._own, found, strict=True) if g is not None]:
            raise ValueError(
                f"{source}: it reads {reads[0]!r} past the model, so its gradient would be lost; call the model, or "
                "take the parameter from it inside the closure"
            )
        return value

    def _split(
        self, evaluate: ReplayedClosure, loss: Loss
    ) -> tuple[Callable[[Params], Tensor], Callable[[Tensor], Tensor], dict[str, Any]]:
        """The outputs of parameters and the loss of outputs, one task's, as the operators take them; what they saw."""
        seen: dict[str, Any] = {}

        def outputs(params: Params) -> Tensor:
            z, seen["targets"] = self._pair(
                evaluate({name: p.squeeze(0) for name, p in params.items()})
            )
            return self._differentiable(z, "closure").unsqueeze(0)

        def of_outputs(z: Tensor) -> Tensor:
            value = self._scalar(loss(z.squeeze(0), seen["targets"]), "loss")
            if "loss" not in seen:
                self._finite(value, z)
                self._check_softmax(value, z)
                seen["loss"] = self._differentiable(value, "loss").detach()
            return value.unsqueeze(0)

        return outputs, of_outputs, seen

    def _leaves(self) -> Params:
        return {name: p.unsqueeze(0) for name, p in self._own.items()}


class ReplayedClosure:
    """A closure as a function of the model's parameters, every call with the buffers and random numbers of the first.

    So dropout draws one mask for all the evaluations of a step. The first call runs on the model's buffers and on the
    global generators, which it leaves as a forward pass does; further ones run on copies of how they were, and leave
    nothing behind.
    """

    def __init__(self, model: nn.Module, closure: Closure, device: torch.device) -> None:
        self._closed, self._device, self._called = _Closed(model, closure), device, False
        self._buffers = {f"model.{name}": b.clone() for name, b in model.named_buffers()}
        self._start = _random_state(device)

    def __call__(self, params: Mapping[str, Tensor] | None = None) -> Any:
        """The closure's result, at other parameters if they are given, `{name: [*shape]}`."""
        swapped = {f"model.{name}": p for name, p in (params or {}).items()}
        if not self._called:
            self._called = True
            return torch.func.functional_call(self._closed, swapped, ())
        swapped |= {name: b.clone() for name, b in self._buffers.items()}
        with self._as_at_first():
            return torch.func.functional_call(self._closed, swapped, ())

    @contextmanager
    def _as_at_first(self) -> Iterator[None]:
        now = _random_state(self._device)
        _set_random_state(self._start, self._device)
        try:
            yield
        finally:
            _set_random_state(now, self._device)


class _Closed(nn.Module):
    """A module around the model whose forward pass is the closure, so that parameters can be swapped beneath it."""

    def __init__(self, model: nn.Module, closure: Closure) -> None:
        super().__init__()
        self.model, self.closure = model, closure

    def forward(self) -> Any:
        return self.closure()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def check_numbers(owner: str, *, above: float, **numbers: float) -> None:
    """ValueError for one that is not finite, or not greater than `above`; −1 stands for 'at least 0'."""
    for name, value in numbers.items():
        fits = (
            isinstance(value, (int, float))
            and math.isfinite(value)
            and (value >= 0 if above < 0 else value > above)
        )
        if not fits:
            bound = "≥ 0" if above < 0 else f"> {above:g}"
            raise ValueError(f"{owner} {name}: got {value!r}, expected a finite number {bound}")


def raise_if(bad: Tensor, message: str, kind: type[Exception] = FloatingPointError) -> None:
    """An exception if any of `bad` is true."""
    if bool(bad.any()):
        raise kind(message)


def ratio(numbers: Tensor, eps: float) -> float:
    """ρ = (L(θ) − L(θ + δ))/(m(0) − m(δ)) of L(θ), L(θ + δ) and m(0) − m(δ).

    −∞ where the model m does not fall, or L(θ + δ) is not finite. Both differences are widened by 10 ε|L|, what
    round-off may make of them, so that ρ → 1 at a minimum (Conn, Gould & Toint 2000, §17.4.2).
    """
    before, after, predicted = numbers.double()
    return float(reduction_ratio(before, after, predicted, eps=eps))


def levenberg_marquardt(
    damping: float, rho: float, *, easier: float, harder: float, floor: float
) -> float:
    """The next λ: `harder` times it where ρ < ¼, `easier` times it where ρ > ¾, and never below `floor`."""
    if rho < 0.25:
        return damping * harder
    return max(damping * easier, min(damping, floor)) if rho > 0.75 else damping


def check_loss(owner: str, loss: Any) -> None:
    if not callable(loss):
        raise ValueError(
            f"{owner} loss: got {loss!r}, expected a function (outputs, targets) -> scalar"
        )
    if getattr(loss, "reduction", "mean") == "none":
        raise ValueError(
            f"{owner} loss: got reduction='none', expected a scalar; use reduction='mean'"
        )


def check_likelihood(owner: str, loss: Any, likelihood: str, expectation: str) -> None:
    check_loss(owner, loss)
    if getattr(loss, "reduction", "mean") == "sum":
        raise ValueError(
            f"{owner} loss: got reduction='sum', expected the mean over examples, as F is; use reduction='mean'"
        )
    for name, got, known in (
        ("likelihood", likelihood, get_args(Likelihood)),
        ("expectation", expectation, get_args(Expectation)),
    ):
        if got not in known:
            raise ValueError(f"{owner} {name}: got {got!r}, expected one of {', '.join(known)}")
    called = getattr(loss, "__name__", type(loss).__name__)
    if _LIKELIHOODS.get(called, likelihood) != likelihood:
        raise ValueError(
            f"{owner} likelihood: got {likelihood!r} for {called}, expected {_LIKELIHOODS[called]!r}, whose −log p "
            "it is, but for a factor"
        )
