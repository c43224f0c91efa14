"""Losses that are −log p of a likelihood, with the weights that they give their examples by hand.

Every loss sees outputs `[m, 3]`, m = 6. The weights of a row are those of its examples in the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracles import randn
from torch import Tensor, nn

M = 6
CLASSES = 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 1])
IGNORED = torch.tensor([0, -100, 2, 0, -100, 1])
W = torch.tensor([0.5, 1.0, 3.0]).double()
V = torch.tensor([0.2, 1.0, 0.0, 2.0, 0.7, 1.1]).double()
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]).double()
SOFT = randn(M, CLASSES, seed=11).softmax(-1)
TARGETS = randn(M, CLASSES, seed=12)
BINARY = (randn(M, CLASSES, seed=13) > 0).double()
ELEMENTS = randn(M, CLASSES, seed=14).abs()
ONES = torch.ones(M).double()


class CrossEntropy(nn.Module):
    """A user's own: the mean of log Σ exp z − z_y over the examples that a mask keeps."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        losses = z.exp().sum(-1).log() - (F.one_hot(y, CLASSES) * z).sum(-1)
        return (self.keep * losses).sum() / self.keep.sum()


class HalfSquares(nn.Module):
    """A user's own: Σ vᵢ ½‖zᵢ − yᵢ‖², without a mean."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (self.weights[:, None] * (z - y) ** 2).sum()


class Logistic(nn.Module):
    """A user's own: the mean of log(1 + exp(−yz)) for labels y = ±1."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-(2 * y - 1) * z).mean()


def weighted_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return (V * F.cross_entropy(z, y, reduction="none")).mean()


def masked_squares(z: Tensor, y: Tensor) -> Tensor:
    return (ELEMENTS * (z - y).square()).sum() / ELEMENTS.sum()


def of_single_precision(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


def distance_to_soft_labels(z: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(-1), y, reduction="batchmean")


class Row(NamedTuple):
    """A loss, its targets, the family, and the weights of examples `[m]` or of outputs `[m, 3]`."""

    loss: Callable[[Tensor, Any], Tensor]
    targets: Tensor
    family: str
    weights: Tensor


FITTING: dict[str, Row] = {
    "cross-entropy": Row(F.cross_entropy, LABELS, "softmax", ONES / M),
    "sum": Row(nn.CrossEntropyLoss(reduction="sum"), LABELS, "softmax", ONES),
    "ignored labels": Row(F.cross_entropy, IGNORED, "softmax", (IGNORED >= 0) / 4),
    "ignored class": Row(
        nn.CrossEntropyLoss(ignore_index=1), LABELS, "softmax", (LABELS != 1).double() / 3
    ),
    "class weights": Row(
        nn.CrossEntropyLoss(weight=W), LABELS, "softmax", W[LABELS] / W[LABELS].sum()
    ),
    "class weights, sum": Row(
        nn.CrossEntropyLoss(weight=W, reduction="sum"), LABELS, "softmax", W[LABELS]
    ),
    "label smoothing": Row(nn.CrossEntropyLoss(label_smoothing=0.3), LABELS, "softmax", ONES / M),
    "label smoothing, class weights": Row(
        nn.CrossEntropyLoss(weight=W, label_smoothing=0.3),
        LABELS,
        "softmax",
        (0.7 * W[LABELS] + 0.3 * W.mean()) / W[LABELS].sum(),
    ),
    "soft labels": Row(F.cross_entropy, SOFT, "softmax", ONES / M),
    "soft labels of any mass": Row(F.cross_entropy, SOFT * V[:, None], "softmax", V / M),
    "divergence": Row(distance_to_soft_labels, SOFT, "softmax", ONES / M),
    "example weights": Row(weighted_cross_entropy, LABELS, "softmax", V / M),
    "user's module": Row(CrossEntropy(ONES), LABELS, "softmax", ONES / M),
    "user's module, masked": Row(CrossEntropy(MASK), LABELS, "softmax", MASK / 3),
    "mse": Row(F.mse_loss, TARGETS, "gaussian", 2 * ONES / (3 * M)),
    "mse, sum": Row(nn.MSELoss(reduction="sum"), TARGETS, "gaussian", 2 * ONES),
    "mse, masked": Row(masked_squares, TARGETS, "gaussian", 2 * ELEMENTS / ELEMENTS.sum()),
    "user's squares": Row(HalfSquares(V), TARGETS, "gaussian", V),
    "Gaussian of given variance": Row(
        lambda z, y: F.gaussian_nll_loss(z, y, ELEMENTS + 0.1),
        TARGETS,
        "gaussian",
        1 / (ELEMENTS + 0.1) / (3 * M),
    ),
    "bce": Row(F.binary_cross_entropy_with_logits, BINARY, "sigmoid", ONES / (3 * M)),
    "bce, soft labels": Row(F.binary_cross_entropy_with_logits, SOFT, "sigmoid", ONES / (3 * M)),
    "bce, positive weight": Row(
        nn.BCEWithLogitsLoss(pos_weight=W), BINARY, "sigmoid", (1 + BINARY * (W - 1)) / (3 * M)
    ),
    "bce, weights, sum": Row(
        nn.BCEWithLogitsLoss(weight=ELEMENTS, reduction="sum"), BINARY, "sigmoid", ELEMENTS
    ),
    "user's logistic": Row(Logistic(), BINARY, "sigmoid", ONES / (3 * M)),
}

# A loss of each likelihood and of each kind of weights.
EACH_KIND = (
    "ignored labels",
    "label smoothing, class weights",
    "soft labels of any mass",
    "user's module, masked",
    "mse",
    "Gaussian of given variance",
    "bce, positive weight",
    "user's logistic",
)


class Focal(nn.Module):
    """(1 − p_y)² times cross-entropy."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(z, y, reduction="none")
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


def against_each_other(z: Tensor, y: Tensor) -> Tensor:
    """InfoNCE of the batch: every example is a class of the others."""
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def cosine(z: Tensor, y: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(z, y)).mean()


def policy_gradient(z: Tensor, y: Tensor) -> Tensor:
    """−(log p · advantage), with advantages of both signs."""
    return -(z.log_softmax(-1).gather(1, y[:, None])[:, 0] * (V - 0.9)).mean()


NOT_FITTING: dict[str, tuple[Callable[[Tensor, Any], Tensor], Tensor]] = {
    "smooth l1": (F.smooth_l1_loss, TARGETS),
    "huber": (nn.HuberLoss(delta=0.5), TARGETS),
    "poisson": (F.poisson_nll_loss, TARGETS.abs()),
    "l1": (F.l1_loss, TARGETS),
    "hinge": (F.multi_margin_loss, LABELS),
    "focal": (Focal(), LABELS),
    "temperature": (lambda z, y: F.cross_entropy(z / 0.5, y), LABELS),
    "penalty of the logits": (
        lambda z, y: F.cross_entropy(z, y) + 1e-3 * z.square().mean(),
        LABELS,
    ),
    "entropy bonus": (
        lambda z, y: (
            F.cross_entropy(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
        ),
        LABELS,
    ),
    "couples its examples": (against_each_other, LABELS),
    "cosine": (cosine, TARGETS),
    "concave": (lambda z, y: -F.mse_loss(z, y), TARGETS),
    "both signs": (policy_gradient, LABELS),
    "correlated": (lambda z, y: ((z - y) @ W.outer(W).add(torch.eye(3))).square().mean(), TARGETS),
    "binary of probabilities": (lambda z, y: F.binary_cross_entropy(z.sigmoid() ** 2, y), BINARY),
    "quartic": (lambda z, y: (z - y).pow(4).mean(), TARGETS),
}
