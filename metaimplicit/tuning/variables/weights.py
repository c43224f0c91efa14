"""Hyperparameters that weigh the training examples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaimplicit.params import Params
from metaimplicit.tuning.domains import Box, Domain, Positive
from metaimplicit.tuning.variables.base import Batch, Variable, example_index, prototype


@dataclass(frozen=True)
class ExampleWeights(Variable):
    """A weight for each training example (Franceschi et al. 2017, section 5.1).

    The example with number i in the training set has wᵢ = `meta["example_weights"][i]`. Batches
    give the numbers of their examples as `"index"`.

    Args:
        count: The number of training examples.
        start: The value of every weight to start from.
        domain: Of the weights: `Box(0.0)`, or `Interval(0, 1)`, in which no weight vanishes.

    Example:
        >>> variable = ExampleWeights(4)
        >>> meta = {"example_weights": torch.tensor([0.0, 0.1, 0.2, 0.3])}
        >>> variable.weights(meta, torch.ones(2), {"index": torch.tensor([3, 1])})
        tensor([0.3000, 0.1000])
    """

    count: int
    start: float = 1.0
    domain: Domain = Box(0.0)

    def meta(self, params: Params) -> Params:
        """`{"example_weights": [count]}`."""
        return {"example_weights": prototype(params).new_full((self.count,), self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """The domain given."""
        return {"example_weights": self.domain}

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        """wᵢ, `[m]`.

        Raises:
            ValueError: The batch has no `"index"`.
            IndexError: A number is negative, or `count` or more.
        """
        index = example_index(self, batch)
        # A negative number would count from the end; `count` is out of range.
        index = torch.where(index < 0, self.count, index)
        return meta["example_weights"][index]


@dataclass(frozen=True)
class ClassWeights(Variable):
    """A weight for each class: wᵢ = `meta["class_weights"][yᵢ]` > 0.

    Args:
        classes: The number of classes.
        start: The value of every weight to start from, > 0.

    Example:
        >>> meta = {"class_weights": torch.tensor([1.0, 5.0])}
        >>> batch = {"targets": torch.tensor([1, 0, 1])}
        >>> ClassWeights(2).weights(meta, torch.ones(3), batch)
        tensor([5., 1., 5.])
    """

    classes: int
    start: float = 1.0

    def meta(self, params: Params) -> Params:
        """`{"class_weights": [classes]}`."""
        return {"class_weights": prototype(params).new_full((self.classes,), self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """Positive numbers."""
        return {"class_weights": Positive()}

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        """wᵢ, `[m]`, by the targets of the batch, int64 `[m]`."""
        return meta["class_weights"][batch["targets"]]


@dataclass(frozen=True)
class WeightNetwork(Variable):
    """Meta-Weight-Net (Shu et al. 2019): wᵢ = 2 sigmoid(V(ℓᵢ)), a network of the example's loss.

    V has one hidden layer of ReLUs. Its output layer starts at zero, so every wᵢ starts at 1.

    Args:
        hidden: The width of the hidden layer.
        classes: The number of classes. If given, V sees the example's class, too, one-hot. If None,
            it sees the loss alone.
        seed: Of the hidden layer's weights to start from.

    Example:
        >>> variable = WeightNetwork(hidden=5)
        >>> meta = variable.meta({"w": torch.zeros(3)})
        >>> variable.weights(meta, torch.tensor([0.3, 2.0]), {})
        tensor([1., 1.])
    """

    hidden: int = 100
    classes: int | None = None
    seed: int = 0

    def meta(self, params: Params) -> Params:
        """The weights and biases of V, four entries `"weight_network.…"`."""
        like = prototype(params)
        width = 1 + (self.classes or 0)
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(self.hidden, width, generator=generator)
        return {
            "weight_network.in": draw.to(like) / math.sqrt(width),
            "weight_network.bias": like.new_zeros(self.hidden),
            "weight_network.out": like.new_zeros(self.hidden),
            "weight_network.shift": like.new_zeros(()),
        }

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        """wᵢ in (0, 2), `[m]`."""
        features = losses[:, None]
        if self.classes is not None:
            one_hot = nn.functional.one_hot(batch["targets"].long(), self.classes)
            features = torch.cat([features, one_hot.to(features)], 1)
        hidden = torch.relu(features @ meta["weight_network.in"].T + meta["weight_network.bias"])
        return 2 * torch.sigmoid(hidden @ meta["weight_network.out"] + meta["weight_network.shift"])
