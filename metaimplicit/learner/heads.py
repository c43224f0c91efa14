"""Linear heads that a learner fits to the features of every task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaimplicit.inner import (
    ConvexLoss,
    InnerLoop,
    LinearHead,
    Logistic,
    Newton,
    NoSteps,
    Ridge,
    SmoothHinge,
    SoftmaxCrossEntropy,
    SquaredError,
)
from metaimplicit.learner.episodes import Episode
from metaimplicit.params import Params
from metaimplicit.problem import Composite, FromMeta, Number, resolve

WEIGHT = "head.weight"
BIAS = "head.bias"
OF_CLASSES = (Logistic, SmoothHinge, SoftmaxCrossEntropy)  # losses that have no meaning for values
ROUNDOFF = 1e-3  # of soft labels


@dataclass(frozen=True)
class Head(ABC):
    """A linear layer on the features X of a body, with as many outputs as a task has classes.

    Attributes:
        numbers: The fields that can be learnt, by their name in `learn`.
        method: The flag of the method that differentiates it unless another one is given.
        is_convex: Whether its inner problem is convex in the layer, and no other parameter adapts.

    Raises:
        ValueError: One of its numbers is not positive.
    """

    numbers: ClassVar[dict[str, str]]
    method: ClassVar[str]
    is_convex: ClassVar[bool]

    def __post_init__(self) -> None:
        for name in self.numbers.values():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(
                    f"{type(self).__name__} {name}: got {value}, expected a number > 0"
                )

    @property
    @abstractmethod
    def inner(self) -> InnerLoop:
        """The inner loop that fits it unless another one is given."""

    @abstractmethod
    def init(self, meta: Params, features: Tensor, targets: Tensor) -> Params:
        """W `[outputs, p]` and b `[outputs]` where the inner loop starts.

        Args:
            meta: φ.
            features: X of the support set of one task, `[m, p]`.
            targets: One number for each output, `[m, outputs]`.
        """

    @abstractmethod
    def outputs(self, params: Params, meta: Params, features: Tensor) -> Tensor:
        """The outputs for any features, `[m, p] -> [m, outputs]`."""

    def inner_loss(self, features: Callable[[Params, Any], Tensor]) -> Composite | None:
        """Its own loss of the support set. If None, that is the loss of the learner.

        Args:
            features: `(meta, data) -> X`, of the support set of one task.
        """
        return None

    def target_objection(self, targets: Any) -> str:
        """Why it cannot be fitted to the targets of a batch of support sets. Empty if it can."""
        return ""

    def learning(self, names: list[str], like: Tensor) -> tuple[Head, Params]:
        """The head that reads some of its numbers from φ, and the logarithms of these.

        Args:
            names: Keys of `numbers`.
            like: A tensor whose type and device the logarithms take.

        Raises:
            ValueError: A number to start from is not positive.
        """
        logs = {}
        changes = {}
        for name in names:
            value = getattr(self, self.numbers[name])
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(
                    f"learn {name!r}: got a head with {value!r}, "
                    "expected a number > 0 to start from"
                )
            logs[f"log_{name}"] = like.new_tensor(float(value)).log()
            changes[self.numbers[name]] = FromMeta(f"log_{name}", torch.exp)
        return replace(self, **changes), logs


@dataclass(frozen=True)
class ConvexHead(Head):
    """The argmin of Σᵢ ℓ(zᵢ, yᵢ) + λ/2 (‖W‖² + ‖b‖²) over the support set, z = (X Wᵀ + b)/τ.

    The outputs are s z. With squares it is that of R2D2 (Bertinetto et al. 2019, eq. 6 and 8).

    Args:
        loss: ℓ.
        strength: λ > 0, "lambda" in `learn`.
        temperature: τ > 0.
        scale: s > 0.

    Example:
        >>> head = ConvexHead(SquaredError(), scale=2.0)
        >>> x = torch.ones(1, 3)
        >>> params = {"head.weight": torch.ones(2, 3), "head.bias": torch.zeros(2)}
        >>> head.outputs(params, {}, x)
        tensor([[6., 6.]])
    """

    loss: ConvexLoss
    strength: Number = 1.0
    temperature: Number = 1.0
    scale: Number = 1.0

    numbers: ClassVar = {"lambda": "strength", "temperature": "temperature", "scale": "scale"}
    method: ClassVar = "auto"
    is_convex: ClassVar = True

    @property
    def inner(self) -> InnerLoop:
        """Ridge regression for squares, else Newton's method."""
        return Ridge() if isinstance(self.loss, SquaredError) else Newton()

    def init(self, meta: Params, features: Tensor, targets: Tensor) -> Params:
        """Zeros: the argmin does not depend on the start."""
        outputs = targets.shape[-1]
        weight = features.new_zeros(outputs, features.shape[-1])
        return {WEIGHT: weight, BIAS: features.new_zeros(outputs)}

    def outputs(self, params: Params, meta: Params, features: Tensor) -> Tensor:
        """The outputs s (X Wᵀ + b)/τ."""
        z = _linear(params, features) / resolve(self.temperature, meta)
        outputs: Tensor = resolve(self.scale, meta) * z
        return outputs

    def target_objection(self, targets: Any) -> str:
        """That the targets are values, for a loss of classes or a fixed scale of their scores."""
        if isinstance(self.loss, OF_CLASSES):
            return _objection_to_values(type(self.loss).__name__, targets)
        is_fixed = isinstance(self.scale, (int, float)) and self.scale != 1
        if not is_fixed or not isinstance(targets, Tensor) or not targets.is_floating_point():
            return ""
        sums = targets.sum(-1)
        are_soft_labels = bool((targets >= 0).all()) and torch.allclose(sums, torch.ones_like(sums))
        if are_soft_labels:
            return ""
        return (
            f"head: got scale={self.scale}, which multiplies scores of classes, for support "
            "targets that are values, expected scale=1; pass a ConvexHead of "
            "metaimplicit.learner.heads with this scale"
        )

    def inner_loss(self, features: Callable[[Params, Any], Tensor]) -> Composite:
        """The loss of a `LinearHead`."""

        def targets(meta: Params, data: Any) -> Tensor:
            numbers: Tensor = Episode.of(*data).support.targets.numbers
            return numbers

        return LinearHead(
            features,
            targets,
            loss=self.loss,
            strength=self.strength,
            temperature=self.temperature,
            weight=WEIGHT,
            bias=BIAS,
        )


@dataclass(frozen=True)
class Prototypes(Head):
    """A head that starts at the class means c_k of the support features, and then adapts.

        W_k = 2 c_k,   b_k = −‖c_k‖²,   outputs (X Wᵀ + b)/τ

    These outputs are −‖x − c_k‖²/τ up to a number that all classes share (Triantafillou et al.
    2020, Proto-MAML). Without inner steps it is a prototypical network (Snell et al. 2017).

    Args:
        temperature: τ > 0.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [4.0]])
        >>> classes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> Prototypes().init({}, x, classes)["head.weight"]  # twice the means ½ and 4
        tensor([[1.],
                [8.]])
    """

    temperature: Number = 1.0

    numbers: ClassVar = {"temperature": "temperature"}
    method: ClassVar = "unrolled"
    is_convex: ClassVar = False

    @property
    def inner(self) -> InnerLoop:
        """No steps."""
        return NoSteps()

    def target_objection(self, targets: Any) -> str:
        """That the targets are values, of which there is no class mean."""
        return _objection_to_values("Prototypes", targets)

    def init(self, meta: Params, features: Tensor, targets: Tensor) -> Params:
        """The prototypes as a linear layer. A class without examples has the mean zero."""
        targets = targets.to(features.dtype)
        counts = targets.sum(0).unsqueeze(-1)
        means = (targets.mT @ features) / torch.where(counts > 0, counts, 1)
        return {WEIGHT: 2 * means, BIAS: -means.square().sum(-1)}

    def outputs(self, params: Params, meta: Params, features: Tensor) -> Tensor:
        """The outputs (X Wᵀ + b)/τ."""
        outputs: Tensor = _linear(params, features) / resolve(self.temperature, meta)
        return outputs


# Where λ, τ and s start, for a few hundred features of a convolutional network.
HEADS: dict[str, Head] = {
    "ridge": ConvexHead(SquaredError(), strength=30.0, scale=15.0),
    "logistic": ConvexHead(SoftmaxCrossEntropy()),
    "hinge": ConvexHead(SmoothHinge()),
    "prototypes": Prototypes(temperature=10.0),
}


def make_head(head: str | Head) -> Head:
    """The head that a flag names. A `Head` is returned as it is.

    Raises:
        ValueError: The flag is unknown.

    Example:
        >>> make_head("prototypes")
        Prototypes(temperature=10.0)
    """
    if isinstance(head, Head):
        return head
    if head not in HEADS:
        raise ValueError(f"head: got {head!r}, expected one of {', '.join(HEADS)}, or a Head")
    return HEADS[head]


def _objection_to_values(name: str, targets: Any) -> str:
    """Why a head of classes cannot be fitted to targets. Empty for indices and soft labels."""
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return ""
    if targets.dim() != 3 or targets.numel() == 0:
        return ""  # which is refused elsewhere
    low, high = (value.item() for value in targets.aminmax())
    if low >= -ROUNDOFF and high <= 1 + ROUNDOFF:
        return ""
    return (
        f"head: got {name} for support targets from {low:.3g} to {high:.3g}, which are values, "
        "expected class indices, or soft labels from 0 to 1; take a ridge head for values"
    )


def _linear(params: Params, features: Tensor) -> Tensor:
    """X Wᵀ + b."""
    outputs: Tensor = features @ params[WEIGHT].mT + params[BIAS]
    return outputs
