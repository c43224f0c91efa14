"""Hyperparameters that weigh the training examples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.params import Params
from metaimplicit.tuning.batches import Batch, batch_entry
from metaimplicit.tuning.domains import Box, Domain, Positive
from metaimplicit.tuning.variables.base import (
    Variable,
    example_index,
    prototype,
    select_entries,
)


@dataclass(frozen=True)
class ExampleWeights(Variable):
    """A weight for each training example (Franceschi et al. 2017, section 5.1).

    The example with number i in the training set has wᵢ = `meta["example_weights"][i]`. Batches
    give the numbers of their examples as `"index"`.

    Args:
        count: The number of training examples.
        start: The value of every weight to start from.
        domain: That of the weights: `Box(0.0)`, or `Interval(0, 1)`, where no weight vanishes.

    Example:
        >>> variable = ExampleWeights(4)
        >>> meta = {"example_weights": torch.tensor([0.0, 0.1, 0.2, 0.3])}
        >>> variable.weights(meta, torch.ones(2), {"index": torch.tensor([3, 1])})
        tensor([0.3000, 0.1000])
    """

    count: int
    start: float = 1.0
    domain: Domain = Box(0.0)

    reads_losses = False

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
        return select_entries(self, meta["example_weights"], example_index(self, batch))


@dataclass(frozen=True)
class ClassWeights(Variable):
    """A weight for each class: wᵢ = `meta["class_weights"][yᵢ]` > 0.

    An example with several labels has the weight of each label's class at its loss. Targets that
    are real numbers are read as follows:

    - Soft labels, `[m, classes]` with one loss an example, as of mixup: wᵢ = Σ_c y_ic w_c.
    - Multi-label targets, `[m, classes]` with one loss for each class, as of binary cross-entropy:
      the loss of class c has the weight w_c.
    - One number between 0 and 1 for each loss, with two classes: w = (1 − y) w₀ + y w₁.

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

    weighs_labels = True
    reads_losses = False

    def meta(self, params: Params) -> Params:
        """`{"class_weights": [classes]}`."""
        return {"class_weights": prototype(params).new_full((self.classes,), self.start)}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """Positive numbers."""
        return {"class_weights": Positive()}

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        """wᵢ, shaped as the losses.

        Raises:
            ValueError: The targets say no class for each loss.
            IndexError: A label that counts is negative, or `classes` or more.
        """
        weights = meta["class_weights"]
        targets = _target_tensor(self, batch)
        has_classes = targets.dim() > 1 and targets.shape[1] == self.classes
        one_each = targets.numel() == losses.numel()
        if not targets.is_floating_point() and one_each:
            labels = _counted_labels(targets, batch).flatten()
            return select_entries(self, weights, labels).reshape(losses.shape)
        if targets.is_floating_point() and has_classes and one_each:
            weights = weights.reshape(-1, *[1] * (targets.dim() - 2))
            return weights.expand_as(targets).reshape(losses.shape)
        if targets.is_floating_point() and has_classes:
            return (targets.movedim(1, -1).to(weights) @ weights).reshape(losses.shape)
        if targets.is_floating_point() and one_each and self.classes == 2:
            return torch.lerp(weights[0], weights[1], targets.to(weights)).reshape(losses.shape)
        raise ValueError(
            f"ClassWeights: got targets {tuple(targets.shape)} of {targets.dtype} for losses "
            f"{tuple(losses.shape)}, expected the number of a class for each loss, or scores "
            f"[m, {self.classes}] of the classes"
        )


@dataclass(frozen=True)
class WeightNetwork(Variable):
    """Meta-Weight-Net (Shu et al. 2019): wᵢ = 2 sigmoid(V(ℓᵢ)), a network of the example's loss.

    V has one hidden layer of ReLUs. Its output layer starts at zero, so every wᵢ starts at 1.

    The losses that V sees count as constants. Methods that displace θ to take differences (`sama`,
    `f2sa`, finite differences) show V the losses where the inner loop ended.

    Args:
        hidden: The width of the hidden layer.
        classes: The number of classes. If given, V sees the example's class, too, one-hot, or its
            scores of the classes, `[m, classes]`. Where an example has several labels, it sees the
            mean over those that count. If None, it sees the loss alone.
        seed: The seed of the hidden layer's weights to start from.

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
        draw = torch.randn(self.hidden, width, generator=generator, device="cpu")
        return {
            "weight_network.in": draw.to(like) / math.sqrt(width),
            "weight_network.bias": like.new_zeros(self.hidden),
            "weight_network.out": like.new_zeros(self.hidden),
            "weight_network.shift": like.new_zeros(()),
        }

    def weights(self, meta: Params, losses: Tensor, batch: Batch) -> Tensor:
        """wᵢ in (0, 2), `[m]`.

        Raises:
            ValueError: With `classes`, the targets are not one tensor that says them.
            IndexError: A label that counts is negative, or `classes` or more.
        """
        features = losses[:, None].to(meta["weight_network.in"])
        if self.classes is not None:
            features = torch.cat([features, self._scores(batch, features)], 1)
        hidden = torch.relu(features @ meta["weight_network.in"].T + meta["weight_network.bias"])
        return 2 * torch.sigmoid(hidden @ meta["weight_network.out"] + meta["weight_network.shift"])

    def _scores(self, batch: Batch, like: Tensor) -> Tensor:
        """The example's class, one-hot, or its scores of the classes, `[m, classes]`."""
        assert self.classes is not None
        targets = _target_tensor(self, batch)
        if targets.dim() > 1 and targets.is_floating_point():
            if targets.shape[1] != self.classes:
                raise ValueError(
                    f"WeightNetwork: got targets {tuple(targets.shape)}, expected scores "
                    f"[m, {self.classes}] of the classes, or their numbers"
                )
            scores = targets.to(like)
            return scores.flatten(2).mean(2) if scores.dim() > 2 else scores
        labels = _counted_labels(targets, batch)
        rows = torch.eye(self.classes, dtype=like.dtype, device=like.device)
        one_hot = select_entries(self, rows, labels.flatten()).reshape(*labels.shape, -1)
        counted = batch.get("counted")
        if counted is not None:
            one_hot = one_hot * counted.reshape(targets.shape).unsqueeze(-1)
        if targets.dim() == 1:
            return one_hot
        total = one_hot.flatten(1, -2).sum(1)
        return total / total.sum(1, keepdim=True).clamp(min=1)


def _target_tensor(variable: Variable, batch: Batch) -> Tensor:
    targets = batch_entry(batch, "targets")
    if isinstance(targets, Tensor):
        return targets
    raise ValueError(
        f"{type(variable).__name__}: got targets that are a {type(targets).__name__}, expected one "
        "tensor, which says the classes"
    )


def _counted_labels(targets: Tensor, batch: Batch) -> Tensor:
    """The numbers of classes, int64, with 0 for what does not count, such as the label −100."""
    labels = targets if targets.dtype == torch.int64 else targets.long()
    counted = batch.get("counted")
    if counted is None:
        return labels
    # A label that does not count says nothing; 0 is valid, and its loss is 0.
    return torch.where(counted.reshape(labels.shape), labels, 0)
