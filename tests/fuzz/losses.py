"""The losses of the fuzzer and their targets, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzz.case import Case
from fuzz.models import POSITIONS

Loss = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100
CLASS_WEIGHTS = (0.5, 1.0, 2.0)
POSITIVE_WEIGHT = 2.0

FUNCTIONS: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "nll": F.nll_loss,
    "mse": F.mse_loss,
    "smooth-l1": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "poisson": F.poisson_nll_loss,
}
MODULES: dict[str, type[nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "nll": nn.NLLLoss,
    "mse": nn.MSELoss,
    "smooth-l1": nn.SmoothL1Loss,
    "bce": nn.BCEWithLogitsLoss,
    "poisson": nn.PoissonNLLLoss,
}


def _picked(scores: Tensor, labels: Tensor) -> Tensor:
    """The scores of the labels, class axis 1."""
    return scores.gather(1, labels.long().unsqueeze(1)).squeeze(1)


def user_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return (z.logsumexp(1) - _picked(z, y)).mean()


def user_nll(z: Tensor, y: Tensor) -> Tensor:
    return -_picked(z, y).mean()


def user_mse(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean()


def user_smooth_l1(z: Tensor, y: Tensor) -> Tensor:
    distance = (z - y).abs()
    return torch.where(distance < 1, 0.5 * distance.square(), distance - 0.5).mean()


def user_bce(z: Tensor, y: Tensor) -> Tensor:
    return (F.softplus(z) - y * z).mean()


def user_poisson(z: Tensor, y: Tensor) -> Tensor:
    return (z.exp() - y * z).mean()


USER: dict[str, Loss] = {
    "cross-entropy": user_cross_entropy,
    "nll": user_nll,
    "mse": user_mse,
    "smooth-l1": user_smooth_l1,
    "bce": user_bce,
    "poisson": user_poisson,
}


class UserLoss(nn.Module):
    """A loss that a user wrote as a module."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self._function = function

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self._function(z, y)


def build_loss(case: Case, dtype: torch.dtype) -> Loss:
    """The loss of a case in the form that a user would hand over."""
    if case.loss_form == "user":
        return USER[case.loss]
    if case.loss_form == "user-module":
        return UserLoss(USER[case.loss])
    options = _options(case, dtype)
    if case.loss_form == "module":
        return MODULES[case.loss](**options)
    return partial(FUNCTIONS[case.loss], **options) if options else FUNCTIONS[case.loss]


def curved_loss(case: Case, dtype: torch.dtype) -> Loss:
    """The loss as a function of the scores before a log-softmax, where its curvature is."""
    if case.loss != "nll":
        return build_loss(case, dtype)
    return partial(F.cross_entropy, **_options(case, dtype))


def _options(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    if case.variant == "weights" and case.loss == "bce":
        return {"pos_weight": torch.tensor(POSITIVE_WEIGHT, dtype=dtype)}
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "smoothing": {"label_smoothing": 0.2},
        "weights": {"weight": torch.tensor(CLASS_WEIGHTS, dtype=dtype)},
        "ignore": {"ignore_index": IGNORED},
        "ignore-class": {"ignore_index": 0},
    }[case.variant]


def example_weights(case: Case, targets: Tensor) -> Tensor:
    """The weight of each example in the loss of one task, `[m]`, of sum 1 if any counts."""
    weights = torch.ones(targets.shape, dtype=torch.float64)
    if case.variant == "weights" and case.classes:
        weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)[targets.long()]
    elif case.variant == "weights":
        weights = 1 + (POSITIVE_WEIGHT - 1) * targets.double()
    elif case.variant == "ignore":
        weights = (targets != IGNORED).double()
    elif case.variant == "ignore-class":
        weights = (targets != 0).double()
    weights = weights.flatten(1).sum(1) if weights.dim() > 1 else weights
    return weights / weights.sum()


def draw_targets(case: Case, generator: torch.Generator) -> Tensor:
    """Targets `[tasks, examples, ...]`: every class occurs in every task."""
    shape = [case.tasks, case.examples]
    if not case.classes:
        shape += [case.outputs, POSITIONS] if case.model == "tagger" else [case.outputs]
        draws = torch.randn(shape, generator=generator, dtype=torch.float64)
        if case.loss == "bce":
            return (draws > 0).double()
        return draws.abs().round() if case.loss == "poisson" else draws

    shape += [POSITIONS] if case.model == "tagger" else []
    count = shape[1] * (POSITIONS if len(shape) == 3 else 1)
    rows = []
    for _ in range(case.tasks):
        order = torch.randperm(count, generator=generator)
        row = torch.arange(count)[order] % case.outputs
        if case.variant == "ignore":
            row[:2] = IGNORED
        rows.append(row)
    return torch.stack(rows).reshape(shape)
