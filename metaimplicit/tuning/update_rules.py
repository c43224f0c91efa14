"""The optimisers that towers are built of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaimplicit.tuning.levels import Hyperparameters, Level, Slots, slot


@dataclass(frozen=True)
class SGD(Level):
    """Stochastic gradient descent with momentum μ and weight decay λ, as in torch.

        u = b,    b = μ b₋ + g + λθ,    b₋ = 0 at first.

    Args:
        momentum: μ, in [0, 1).
        weight_decay: λ ≥ 0.

    The other arguments are those of `Level`.

    Example:
        >>> SGD(0.1, momentum=0.9, optimizer=SGD(1e-3)).granularity
        {'lr': 'scalar', 'momentum': 'scalar'}
    """

    momentum: float = field(default=0.0, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)

    unit_interval = frozenset({"momentum"})

    def direction(
        self, h: Hyperparameters, slots: Slots, gradient: Tensor, *, params: Tensor | None
    ) -> Tensor:
        """The momentum b, `[n]`; without momentum g + λθ, or `gradient` itself if λ = 0, too."""
        if params is not None:
            slots["params"] = params
            gradient = torch.addcmul(gradient, params, h["weight_decay"])
        if "momentum" not in h:
            return gradient
        # The derivative in μ needs b₋, so two buffers take turns, and b overwrites b₋₋.
        previous = slot(slots, "buffer", gradient)
        oldest = slot(slots, "previous buffer", gradient)
        buffer = torch.addcmul(gradient, previous, h["momentum"], out=oldest)
        slots["buffer"] = buffer
        slots["previous buffer"] = previous
        return buffer

    def pull_back(
        self, names: Collection[str], h: Hyperparameters, slots: Slots, *, vector: Tensor
    ) -> Hyperparameters:
        """∂u/∂μ = b₋ and ∂u/∂λ = θ, each times `vector`."""
        derivatives = {"momentum": "previous buffer", "weight_decay": "params"}
        return {name: vector.dot(slots[derivatives[name]]) for name in names}


@dataclass(frozen=True)
class AdaGrad(Level):
    """AdaGrad (Duchi, Hazan & Singer 2011), as in torch.

        u = g/(√s + ε),    s = s₋ + g².

    Args:
        eps: ε ≥ 0.
        initial: s before the first step, ≥ 0, a constant. From 0, the first steps are sign(g): so
            long that the level above sees little else. The paper starts at 0.1.

    The other arguments are those of `Level`.

    Example:
        >>> AdaGrad(0.1, initial=0.1).initial_values
        {'lr': 0.1, 'eps': 1e-10}
    """

    eps: float = field(default=1e-10, kw_only=True)
    initial: float = field(default=0.0, kw_only=True)

    settings = frozenset({"initial"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_value("initial", self.initial)

    def direction(
        self, h: Hyperparameters, slots: Slots, gradient: Tensor, *, params: Tensor | None
    ) -> Tensor:
        """g/(√s + ε), `[n]`, in a slot that the next step overwrites."""
        if "sum" not in slots:
            slots["sum"] = torch.full_like(gradient, self.initial)
        total = slots["sum"].addcmul_(gradient, gradient)
        denominator = slot(slots, "denominator", gradient)
        torch.sqrt(total, out=denominator).add_(h["eps"])
        ratio = slot(slots, "ratio", gradient)
        return torch.div(gradient, denominator, out=ratio)

    def pull_back(
        self, names: Collection[str], h: Hyperparameters, slots: Slots, *, vector: Tensor
    ) -> Hyperparameters:
        """∂u/∂ε = −u/(√s + ε), times `vector`."""
        if "eps" not in names:
            return {}
        return {"eps": -(vector / slots["denominator"]).dot(slots["ratio"])}


@dataclass(frozen=True)
class RMSProp(Level):
    """RMSProp (Hinton 2012, lecture 6e), as in torch.

        u = g/(√v + ε),    v = α v₋ + (1 − α) g²,    v₋ = 0 at first.

    Args:
        alpha: α, in [0, 1).
        eps: ε ≥ 0.

    The other arguments are those of `Level`.

    Example:
        >>> RMSProp(optimizer=SGD(1e-3)).granularity
        {'lr': 'scalar', 'alpha': 'scalar'}
    """

    alpha: float = field(default=0.99, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    unit_interval = frozenset({"alpha"})

    def direction(
        self, h: Hyperparameters, slots: Slots, gradient: Tensor, *, params: Tensor | None
    ) -> Tensor:
        """g/(√v + ε), `[n]`."""
        squares = _square(gradient)
        average = _update_average(slots, "square", squares, decay=h["alpha"])
        root = slot(slots, "root", gradient)
        torch.sqrt(average, out=root)
        denominator = slot(slots, "denominator", gradient)
        torch.add(root, h["eps"], out=denominator)
        ratio = slot(slots, "ratio", gradient)
        return torch.div(gradient, denominator, out=ratio)

    def pull_back(
        self, names: Collection[str], h: Hyperparameters, slots: Slots, *, vector: Tensor
    ) -> Hyperparameters:
        """∂u/∂ε = −u/(√v + ε) and ∂u/∂α = ∂u/∂ε · (v₋ − g²)/(2√v), each times `vector`."""
        if not names:
            return {}
        pulled = {}
        y = (vector / slots["denominator"]).mul_(slots["ratio"])
        if "eps" in names:
            pulled["eps"] = -y.sum()
        if "alpha" in names:
            pulled["alpha"] = -0.5 * y.div_(slots["root"]).dot(slots["square change"])
        return pulled


@dataclass(frozen=True)
class Adam(Level):
    """Adam (Kingma & Ba 2015), as in torch.

        u = m̂/(√v̂ + ε),    m̂ = m/(1 − β₁ᵗ),    v̂ = v/(1 − β₂ᵗ),
        m = β₁ m₋ + (1 − β₁) g,    v = β₂ v₋ + (1 − β₂) g²,    m₋ = v₋ = 0 at first.

    Args:
        lr: The step size.
        beta1: β₁, in [0, 1).
        beta2: β₂, in [0, 1).
        eps: ε ≥ 0.

    The other arguments are those of `Level`.

    Example:
        >>> list(Adam(optimizer=SGD(1e-5)).granularity)
        ['lr', 'beta1', 'beta2']
    """

    lr: float = 1e-3
    beta1: float = field(default=0.9, kw_only=True)
    beta2: float = field(default=0.999, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    unit_interval = frozenset({"beta1", "beta2"})

    def direction(
        self, h: Hyperparameters, slots: Slots, gradient: Tensor, *, params: Tensor | None
    ) -> Tensor:
        """m̂/(√v̂ + ε), `[n]`."""
        step = slots.get("step", 0) + 1
        correction1 = 1 - h["beta1"] ** step
        correction2 = 1 - h["beta2"] ** step
        slots.update(step=step, correction1=correction1, correction2=correction2)

        mean = _update_average(slots, "mean", gradient, decay=h["beta1"])
        squares = _square(gradient)
        average = _update_average(slots, "square", squares, decay=h["beta2"])
        root = slot(slots, "root", gradient)
        torch.sqrt(average, out=root)

        # u = m/denominator with the denominator (1 − β₁ᵗ)(√v̂ + ε)
        denominator = slot(slots, "denominator", gradient)
        torch.mul(root, correction1 / correction2.sqrt(), out=denominator)
        denominator.add_(h["eps"] * correction1)
        ratio = slot(slots, "ratio", gradient)
        return torch.div(mean, denominator, out=ratio)

    def pull_back(
        self, names: Collection[str], h: Hyperparameters, slots: Slots, *, vector: Tensor
    ) -> Hyperparameters:
        """(∂u/∂h)ᵀ vector for β₁, β₂ and ε; the derivatives stand beside their lines."""
        if not names:
            return {}
        pulled = {}
        step = slots["step"]
        correction1 = slots["correction1"]
        correction2 = slots["correction2"]
        x = vector / slots["denominator"]
        if "beta1" in names:
            # ∂m̂/∂β₁ = (m₋ − g + m tβ₁ᵗ⁻¹/(1 − β₁ᵗ))/(1 − β₁ᵗ)
            growth = step * h["beta1"] ** (step - 1) / correction1
            pulled["beta1"] = x.dot(slots["mean change"]) + growth * x.dot(slots["mean"])

        # ∂u/∂ε = ∂u/∂√v̂ = −u/(√v̂ + ε)
        x.mul_(slots["ratio"])
        if "eps" in names:
            pulled["eps"] = -correction1 * x.sum()
        if "beta2" in names:
            # ∂√v̂/∂β₂ = ((v₋ − g²)/√v + √v tβ₂ᵗ⁻¹/(1 − β₂ᵗ))/(2√(1 − β₂ᵗ))
            growth = step * h["beta2"] ** (step - 1) / correction2
            bias = growth * x.dot(slots["root"])
            change = x.div_(slots["root"]).dot(slots["square change"])
            pulled["beta2"] = -correction1 / (2 * correction2.sqrt()) * (change + bias)
        return pulled


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay λ (Loshchilov & Hutter 2019): the u of `Adam`, plus λθ.

    Args:
        weight_decay: λ ≥ 0.

    The other arguments are those of `Adam`.

    Example:
        >>> AdamW(optimizer=SGD(1e-5), learn=("lr", "weight_decay")).domain("weight_decay")
        Positive()
    """

    weight_decay: float = field(default=0.01, kw_only=True)

    def direction(
        self, h: Hyperparameters, slots: Slots, gradient: Tensor, *, params: Tensor | None
    ) -> Tensor:
        """m̂/(√v̂ + ε) + λθ, `[n]`."""
        u = super().direction(h, slots, gradient, params=None)
        if params is None:
            return u
        slots["params"] = params
        return torch.addcmul(u, params, h["weight_decay"])

    def pull_back(
        self, names: Collection[str], h: Hyperparameters, slots: Slots, *, vector: Tensor
    ) -> Hyperparameters:
        """The derivatives of `Adam`, and ∂u/∂λ = θ times `vector`."""
        of_adam = [name for name in names if name != "weight_decay"]
        pulled = super().pull_back(of_adam, h, slots, vector=vector)
        if "weight_decay" in names:
            pulled["weight_decay"] = vector.dot(slots["params"])
        return pulled


def _update_average(slots: Slots, name: str, value: Tensor, *, decay: Tensor) -> Tensor:
    """Update a = β a₋ + (1 − β) value; the slot "NAME change" takes ∂a/∂β = a₋ − value."""
    average = slot(slots, name, value)
    change = torch.sub(average, value, out=slot(slots, f"{name} change", value))
    # As a₋ − (1 − β) change: value + β change would lose the digits of 1 − β.
    return average.addcmul_(change, decay - 1)


def _square(g: Tensor) -> Tensor:
    """The square g² + 1e-32: its average has a differentiable root, and 1e-16 is lost beside ε."""
    return torch.addcmul(g.new_full((), 1e-32), g, g)
