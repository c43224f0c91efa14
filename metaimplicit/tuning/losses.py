"""Any loss of a batch, whole and split into examples."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from metaimplicit.labels import SHORT_INTEGERS
from metaimplicit.tensors import tensors_in
from metaimplicit.tuning.batch_shapes import (
    count_examples,
    has_axis_of_examples,
    kind_of,
    read_labels,
    shapes_of,
    signature,
)
from metaimplicit.tuning.example_losses import (
    Count,
    ExampleLosses,
    align,
    are_ignored,
    cancellation,
    is_plain_mean,
    may_leave_out_labels,
)
from metaimplicit.tuning.loss_checks import Difference, find_difference, relative_error
from metaimplicit.tuning.loss_order import is_out_of_order
from metaimplicit.tuning.loss_state import LossState
from metaimplicit.tuning.output_shapes import Layouts
from metaimplicit.tuning.reductions import Loss, split_reductions
from metaimplicit.tuning.trial_outputs import TrialOutputs, is_transformed, of_one_task


class SplitLoss:
    """A loss of a batch, V, and the losses ℓᵢ of its examples.

    V is the loss with its own reduction. ℓᵢ is the loss with `reduction="none"`, if it has an
    attribute or an argument `reduction`, and else the loss of example i by itself.

    How examples count in V (labels that are ignored, weights of classes, a sum or a mean) is not
    read from names. It is measured for each tensor of targets, unless all its labels have been seen
    to count plainly in a batch of this shape: V and ℓ are evaluated at outputs that depend on
    nothing, and s = V/mean ℓ. Where s is not 1, a second evaluation checks that s does not depend
    on the outputs. For the first batch of a kind, the values and slopes of V and s · mean ℓ are
    compared, at the outputs of the model and at random ones. There, it is also checked that ℓᵢ is
    the loss of example i. If not, the loss is called with one example at a time. All this is done
    again when the loss has changed, as a schedule changes its attributes.

    Args:
        loss: `(outputs, targets) -> Tensor`, a function or a module.

    Example:
        >>> loss = SplitLoss(torch.nn.CrossEntropyLoss())
        >>> outputs = torch.zeros(3, 2)
        >>> targets = torch.tensor([0, 1, -100])
        >>> loss.value(outputs, targets)
        tensor(0.6931)
        >>> loss.split(outputs, targets).count
        Count(scale=1.5, counted=tensor([ True,  True, False]))
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self._whole, self._unreduced = split_reductions(loss)
        self._state = LossState(loss)
        self._vmaps = True
        self._layouts = Layouts(self._value)
        self._trial_outputs = TrialOutputs()
        self._forget()

    def _forget(self) -> None:
        """Forget what was measured of the loss as it was."""
        self._counts = WeakTensorKeyDictionary()
        self._plain_labels: defaultdict[Any, set[int]] = defaultdict(set)
        self._checked_kinds: set[Any] = set()

    def value(self, outputs: Any, targets: Any) -> Tensor:
        """V, a scalar, or the mean if the loss returns the losses of the examples.

        Raises:
            ValueError: The loss refuses the targets, or they broadcast against the outputs.
        """
        return self._layouts.call(self._value, outputs, targets)

    def split(self, outputs: Any, targets: Any) -> ExampleLosses:
        """The losses of the examples.

        Raises:
            ValueError: V is not a multiple of their mean, their order is not that of the examples,
                no example counts, the loss refuses the targets, or they broadcast against the
                outputs.
        """
        if self._state.has_changed():
            self._forget()
        return self._layouts.call(self._split, outputs, targets)

    def read_targets(self, targets: Any) -> Any:
        """The targets in the type in which the loss took them."""
        return self._layouts.read_targets(targets)

    def _split(self, outputs: Any, targets: Any) -> ExampleLosses:
        unreduced = self._unreduced
        self._check_kind(outputs, targets)
        count = self._count(outputs, targets)
        losses = self._losses(outputs, targets, count.counted)
        if self._unreduced is not unreduced:
            # Part of this was measured before the loss was called with one example at a time.
            self._forget()
            return self._split(outputs, targets)
        # Which labels have a loss may depend on the batch, and with it the order of the losses.
        if may_leave_out_labels(losses, targets) and self._is_out_of_order(
            of_one_task(outputs), of_one_task(targets)
        ):
            raise ValueError(self._refusal_of_order())
        return ExampleLosses(losses, count)

    def _value(self, outputs: Any, targets: Any) -> Tensor:
        value: Tensor = self._whole(outputs, _widen(targets))
        return value.mean() if isinstance(value, Tensor) and value.dim() else value

    def _losses(self, outputs: Any, targets: Any, counted: Tensor | None = None) -> Tensor:
        """ℓ, `[m]` or `[m, *positions]`."""
        targets = _widen(targets)
        if self._unreduced is not None:
            losses: Tensor = self._unreduced(outputs, targets)
            m = count_examples(outputs, targets)
            if losses.dim() and len(losses) == m:
                return losses
            # Positions may have been flattened into the axis of the examples.
            if losses.numel() % m == 0 and losses.numel() > 0 and (losses.dim() or m == 1):
                return losses.reshape(m, -1) if losses.numel() > m else losses.reshape(m)
            self._unreduced = None
        return self._losses_one_by_one(outputs, targets, counted)

    def _losses_one_by_one(self, outputs: Any, targets: Any, counted: Tensor | None) -> Tensor:
        m = count_examples(outputs, targets)
        if not has_axis_of_examples((outputs, targets), m):
            raise ValueError(
                f"loss: {self._name} takes outputs of shapes {shapes_of(outputs)} for targets of "
                f"shapes {shapes_of(targets)}, of which some lack the axis of the {m} examples, "
                "so they cannot be weighed one by one; give it an argument `reduction`, with which "
                "it returns its losses [m] for 'none'"
            )
        if counted is not None:
            # An example that does not count has the loss 0/0. It lends the targets of another one.
            first = counted.to(torch.uint8).argmax()
            targets = tree_map(
                lambda y: torch.where(align(counted, y.dim()), y, y.index_select(0, first[None])),
                targets,
            )

        def loss_of_one(example: tuple[Any, Any]) -> Tensor:
            return self._value(*tree_map(lambda x: x.unsqueeze(0), example))

        examples = (outputs, targets)
        if self._vmaps:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    losses = torch.vmap(loss_of_one, randomness="different")(examples)
            except RuntimeError:
                self._vmaps = False
        if not self._vmaps:
            one_each = [tree_map(lambda x, i=i: x[i], examples) for i in range(m)]
            losses = torch.stack([loss_of_one(example) for example in one_each])
        return losses if counted is None else torch.where(counted, losses, 0.0)

    def _count(self, outputs: Any, targets: Any) -> Count:
        """What `_measure` returns, remembered while the targets live and stay as they are."""
        if not isinstance(targets, Tensor) or is_transformed(targets):
            return self._measure(outputs, targets)
        version = None if targets.is_inference() else targets._version
        key = (version, signature(outputs))
        known = self._counts.get(targets)
        if known is None or known[0] != key:
            known = (key, self._measure(outputs, targets))
            counted = known[1].counted
            if counted is None or not is_transformed(counted):
                self._counts[targets] = known
        count: Count = known[1]
        return count

    def _check_kind(self, outputs: Any, targets: Any) -> None:
        """Check once for each kind of batch that V = s · mean ℓ, in its value and its slope.

        Raises:
            ValueError: They differ.
        """
        kind = (kind_of(outputs), kind_of(targets))
        if kind in self._checked_kinds:
            return
        outputs = of_one_task(outputs)
        targets = of_one_task(targets)
        count = self._measure(outputs, targets)
        difference = find_difference(
            lambda z: self._value(z, targets),
            lambda z: count.scale * self._losses(z, targets, count.counted).mean(),
            outputs,
        )
        if difference is not None:
            raise ValueError(self._refusal(difference))
        if self._is_out_of_order(outputs, targets):
            self._take_single_examples(outputs, targets)
        self._checked_kinds.add(kind)

    def _is_out_of_order(self, outputs: Any, targets: Any) -> bool:
        """Whether ℓᵢ for `reduction="none"` is the loss of another example than i."""
        m = count_examples(outputs, targets)
        if self._unreduced is None or m == 1:
            return False
        return is_out_of_order(lambda z: self._losses(z, targets), outputs, count=m)

    def _take_single_examples(self, outputs: Any, targets: Any) -> None:
        """Call the loss with one example at a time from now on.

        Raises:
            ValueError: V is no multiple of the mean of these losses.
        """
        unreduced = self._unreduced
        self._unreduced = None
        self._forget()
        try:
            self._check_kind(outputs, targets)
        except ValueError as error:
            self._unreduced = unreduced
            self._forget()
            raise ValueError(self._refusal_of_order()) from error

    @torch.no_grad()
    def _measure(self, outputs: Any, targets: Any) -> Count:
        """Evaluate V and ℓ at outputs that depend on nothing: s, and what counts."""
        labels = read_labels(targets)
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
        counted = (losses.isfinite() & (losses != 0)) | (
            second_losses.isfinite() & (second_losses != 0)
        )
        zero = losses == 0
        may_count = not hidden and bool(zero.any()) and not are_ignored(targets, zero)
        if may_count and self._may_be_far(outputs):
            # Far outputs of either sign have a loss beyond any margin.
            for order in (3, 4):
                far_value, far = self._at_trial(outputs, targets, order=order)
                seen = far.isfinite() & (far != 0)
                counted |= seen
                if value == 0 and seen.any():
                    value, losses = far_value, far
        mean = torch.where(counted, losses, 0.0).mean()
        if hidden:  # under vmap, where numbers cannot be read
            return Count(value / mean, counted)
        scale = (value / mean).item()
        if not math.isfinite(scale) and not counted.any():
            if value == 0 and second_value == 0:  # as of a single class
                return Count(1.0, None)
            raise ValueError(
                f"loss: {self._name} counts no example of the batch, expected at least one that "
                "counts"
            )
        second_losses = torch.where(counted, second_losses, 0.0)
        expected = scale * second_losses.mean().item()
        tolerance = 1000 * torch.finfo(losses.dtype).eps
        if not math.isclose(second_value.item(), expected, rel_tol=tolerance):
            # The terms of the means may cancel.
            error = abs(second_value.item() - expected)
            size = abs(scale) * second_losses.abs().mean().item()
            if not error <= tolerance * size * cancellation(losses, counted):
                raise ValueError(self._refusal(Difference(relative_error(error, size), math.nan)))
        return Count(scale, None if counted.all() else counted)

    def _may_be_far(self, outputs: Any) -> bool:
        """Whether the loss may be called with outputs that are no probabilities."""
        if self._unreduced is None:
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
        return self._value(outputs, targets), self._losses(outputs, targets)

    def _is_always_plain(self, outputs: Any, targets: Any) -> bool:
        """Whether V is the mean of ℓ in every batch of these labels.

        It is if V of each example by itself is its loss, and V of a batch in which some examples
        stand several times is their mean.
        """
        trial = self._trial_outputs(outputs, order=1)
        m = count_examples(outputs, targets)
        unbalanced = targets[torch.arange(m, device=targets.device).square() // m]
        try:
            losses = self._losses(trial, targets)
            alone = self._losses_one_by_one(trial, targets, None)
            value, mixed = self._evaluate(trial, unbalanced)
        except (RuntimeError, ValueError, IndexError):  # a loss of two examples or more, say
            return False
        of_examples = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
        return torch.allclose(alone, of_examples) and is_plain_mean(value, mixed)

    def _refusal(self, difference: Difference) -> str:
        if self._unreduced is None:
            return (
                f"loss: the value of {self._name} is no mean of its values at single examples, "
                f"which variables weigh: {difference}; give it an argument `reduction`, with which "
                "it returns its losses [m] for 'none', if it is a weighted sum over examples"
            )
        return (
            f"loss: the value of {self._name} is no multiple of the mean of its losses for "
            f"reduction='none': {difference}; use a loss that is a weighted sum over examples"
        )

    def _refusal_of_order(self) -> str:
        return (
            f"loss: the losses of {self._name} for reduction='none' are not in the order of the "
            "examples, so their weights would be those of others; return them as [m], or shaped "
            "as the targets, [m, ...], with 0 for a label that does not count"
        )

    @property
    def _name(self) -> str:
        return getattr(self.loss, "__name__", type(self.loss).__name__)


def _widen(targets: Any) -> Any:
    """Labels as int64, which losses of torch ask for."""
    if isinstance(targets, Tensor) and targets.dtype in SHORT_INTEGERS:
        return targets.long()
    return targets
