"""How the examples of a batch count in its loss, measured by trials."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from metaimplicit.labels import widened
from metaimplicit.tensors import is_transformed, tensors_in
from metaimplicit.tuning.batch_loss import GIVE_REDUCTION, BatchLoss
from metaimplicit.tuning.batch_shapes import count_examples, read_labels, signature
from metaimplicit.tuning.example_losses import Count, are_ignored, cancellation, is_plain_mean
from metaimplicit.tuning.loss_checks import Difference, relative_error
from metaimplicit.tuning.trial_outputs import TrialOutputs, of_one_task
from metaimplicit.versions import version_of


class Counting:
    """How the losses ℓᵢ of examples count in the loss V of their batch, V = s · mean ℓᵢ.

    It is not read from names (of labels that are ignored, weights of classes, a sum or a mean). V
    and ℓ are evaluated at outputs that depend on nothing, and s = V/mean ℓ. Where s is not 1, a
    second evaluation checks that s does not depend on the outputs. Where all labels have been seen
    to count plainly in batches of the same shape, nothing is evaluated.

    Args:
        loss: V and ℓ.

    Example:
        >>> counting = Counting(BatchLoss(torch.nn.CrossEntropyLoss()))
        >>> counting.count(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
        Count(scale=1.5, counted=tensor([ True,  True, False]))
    """

    def __init__(self, loss: BatchLoss) -> None:
        self._loss = loss
        self._trial_outputs = TrialOutputs()
        self.forget()

    def forget(self) -> None:
        """Forget what was measured, after a change of the loss."""
        self._counts = WeakTensorKeyDictionary()
        self._plain_labels: defaultdict[Any, set[int]] = defaultdict(set)

    def count(self, outputs: Any, targets: Any) -> Count:
        """What `measure` returns, remembered while the targets live and stay as they are."""
        if not isinstance(targets, Tensor) or is_transformed(targets) or _may_mask(outputs):
            return self.measure(outputs, targets)
        key = (version_of(targets), signature(outputs))
        known = self._counts.get(targets)
        if known is None or known[0] != key:
            known = (key, self.measure(outputs, targets))
            counted = known[1].counted
            if counted is None or not is_transformed(counted):
                self._counts[targets] = known
        count: Count = known[1]
        return count

    @torch.no_grad()
    def measure(self, outputs: Any, targets: Any) -> Count:
        """Evaluate V and ℓ at outputs that depend on nothing: s, and what counts.

        Raises:
            ValueError: No example counts, or s depends on the outputs.
        """
        labels = None if _may_mask(outputs) else read_labels(targets)
        plain_labels = self._plain_labels[signature(outputs)]
        if labels and labels <= plain_labels:
            return Count(1.0, None)
        value, losses = self._at_trial(outputs, targets, order=1)
        hidden = any(is_transformed(y) for y in tensors_in(targets))
        if not hidden and is_plain_mean(value, losses):
            # Weights of classes may balance in one batch. In one example they do not.
            if labels and self._is_always_plain(outputs, targets):
                plain_labels |= labels
            return Count(1.0, None)

        # At one reference, a loss that counts may be 0 by chance.
        second_value, second_losses = self._at_trial(outputs, targets, order=2)
        counted = _is_seen(losses) | _is_seen(second_losses)
        zero = losses == 0
        may_count = not hidden and bool(zero.any()) and not are_ignored(targets, zero)
        if may_count and self._may_be_far(outputs):
            # Far outputs of either sign have a loss beyond any margin.
            for order in (3, 4):
                far_value, far_losses = self._at_trial(outputs, targets, order=order)
                seen = _is_seen(far_losses)
                counted |= seen
                if value == 0 and seen.any():
                    value, losses = far_value, far_losses
        mean = torch.where(counted, losses, 0.0).mean()
        if hidden:  # under vmap, where numbers cannot be read
            return Count(value / mean, counted)
        scale = (value / mean).item()
        if not math.isfinite(scale) and not counted.any():
            if value == 0 and second_value == 0:  # as of a single class
                return Count(1.0, None)
            if self._loss.takes_single_examples and not losses.isfinite().any():
                raise ValueError(
                    f"loss: {self._loss.name} is not finite at any example alone, so that "
                    f"variables cannot weigh it; {GIVE_REDUCTION}"
                )
            raise ValueError(
                f"loss: {self._loss.name} counts no example of the batch, expected at least one "
                "that counts"
            )
        self._check_scale(scale, second_value, second_losses, counted=counted)
        return Count(scale, None if counted.all() else counted)

    def _check_scale(self, scale: float, value: Tensor, losses: Tensor, *, counted: Tensor) -> None:
        """Check that V = s · mean ℓ at other outputs than those at which s was measured."""
        losses = torch.where(counted, losses, 0.0)
        expected = scale * losses.mean().item()
        tolerance = 1000 * torch.finfo(losses.dtype).eps
        if math.isclose(value.item(), expected, rel_tol=tolerance):
            return
        # The terms of the means may cancel.
        error = abs(value.item() - expected)
        size = abs(scale) * losses.abs().mean().item()
        if not error <= tolerance * size * cancellation(losses, counted):
            raise ValueError(self._loss.refusal(Difference(relative_error(error, size), math.nan)))

    def _may_be_far(self, outputs: Any) -> bool:
        """Whether the loss may be called with outputs that are no probabilities."""
        if self._loss.takes_single_examples:
            return True
        return any(bool(((z < 0) | (z > 1)).any()) for z in tensors_in(of_one_task(outputs)))

    def _at_trial(self, outputs: Any, targets: Any, order: int) -> tuple[Tensor, Tensor]:
        """V and ℓ at the trial outputs, or at these outputs if the loss refuses those."""
        for widen in (True, False):  # False for a loss with parts in half precision
            try:
                return self._evaluate(self._trial_outputs(outputs, order, widen=widen), targets)
            except (RuntimeError, ValueError):
                continue
        return self._evaluate(outputs, targets)

    def _evaluate(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        return self._loss.value(outputs, targets), self._loss.of_examples(outputs, targets)

    def _is_always_plain(self, outputs: Any, targets: Any) -> bool:
        """Whether V is the mean of ℓ in every batch of these labels.

        It is if V of each example by itself is its loss, and V of a batch in which some examples
        stand several times is their mean.
        """
        trial = self._trial_outputs(outputs, order=1)
        m = count_examples(outputs, targets)
        unbalanced = widened(targets)[torch.arange(m, device=targets.device).square() // m]
        try:
            losses = self._loss.of_examples(trial, targets)
            alone = self._loss.one_by_one(trial, targets)
            value, mixed = self._evaluate(trial, unbalanced)
        except (RuntimeError, ValueError, IndexError):  # a loss of two examples or more, say
            return False
        of_examples = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
        return torch.allclose(alone, of_examples) and is_plain_mean(value, mixed)


def _may_mask(outputs: Any) -> bool:
    """Whether outputs hold more than scores, such as a mask of what counts."""
    return not all(x.is_floating_point() or x.is_complex() for x in tensors_in(outputs))


def _is_seen(losses: Tensor) -> Tensor:
    """Which losses are numbers other than 0."""
    return losses.isfinite() & (losses != 0)
