"""Any loss of a batch, whole and split into examples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaimplicit.loss_state import LossState
from metaimplicit.tuning.batch_loss import BatchLoss
from metaimplicit.tuning.batch_shapes import count_examples, kind_of
from metaimplicit.tuning.counting import Counting
from metaimplicit.tuning.example_losses import ExampleLosses, may_leave_out_labels
from metaimplicit.tuning.layouts import Layouts
from metaimplicit.tuning.loss_checks import find_difference
from metaimplicit.tuning.loss_order import is_out_of_order
from metaimplicit.tuning.reductions import Loss
from metaimplicit.tuning.trial_outputs import of_one_task


class SplitLoss:
    """A loss of a batch, V, and the losses ℓᵢ of its examples, with V = s · mean ℓᵢ.

    `BatchLoss` says what V and ℓᵢ are, and `Counting` how s is measured. For the first batch of a
    kind, the values and slopes of V and s · mean ℓ are compared, at the outputs of the model and at
    random ones. There, it is also checked that ℓᵢ is the loss of example i. If not, the loss is
    called with one example at a time. All this is done again when the loss has changed, as a
    schedule changes its attributes.

    Args:
        loss: `(outputs, targets) -> Tensor`, a function or a module.

    Example:
        >>> import torch
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
        self._batch_loss = BatchLoss(loss)
        self._counting = Counting(self._batch_loss)
        self._state = LossState(loss)
        self._layouts = Layouts(self._batch_loss.value)
        self._checked_kinds: set[Any] = set()

    def value(self, outputs: Any, targets: Any) -> Tensor:
        """V, a scalar, or the mean if the loss returns the losses of the examples.

        Raises:
            ValueError: The loss refuses the targets, or they broadcast against the outputs.
        """
        return self._layouts.call(self._batch_loss.value, outputs, targets)

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

    def _forget(self) -> None:
        """Forget what was measured of the loss as it was."""
        self._counting.forget()
        self._checked_kinds.clear()

    def _split(self, outputs: Any, targets: Any) -> ExampleLosses:
        took_single_examples = self._batch_loss.takes_single_examples
        self._check_kind(outputs, targets)
        count = self._counting.count(outputs, targets)
        losses = self._batch_loss.of_examples(outputs, targets, count.counted)
        if self._batch_loss.takes_single_examples != took_single_examples:
            # Part of this was measured before the loss was called with one example at a time.
            self._forget()
            return self._split(outputs, targets)
        # Which labels have a loss may depend on the batch, and with it the order of the losses.
        if may_leave_out_labels(losses, targets) and self._is_out_of_order(
            of_one_task(outputs), of_one_task(targets)
        ):
            raise ValueError(self._refusal_of_order())
        return ExampleLosses(losses, count)

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
        count = self._counting.measure(outputs, targets)

        def scaled_mean(z: Any) -> Tensor:
            return count.scale * self._batch_loss.of_examples(z, targets, count.counted).mean()

        difference = find_difference(
            lambda z: self._batch_loss.value(z, targets), scaled_mean, outputs
        )
        if difference is not None:
            raise ValueError(self._batch_loss.refusal(difference))
        if self._is_out_of_order(outputs, targets):
            self._take_single_examples(outputs, targets)
        self._checked_kinds.add(kind)

    def _is_out_of_order(self, outputs: Any, targets: Any) -> bool:
        """Whether ℓᵢ for `reduction="none"` is the loss of another example than i."""
        m = count_examples(outputs, targets)
        if self._batch_loss.takes_single_examples or m == 1:
            return False
        return is_out_of_order(lambda z: self._batch_loss.of_examples(z, targets), outputs, count=m)

    def _take_single_examples(self, outputs: Any, targets: Any) -> None:
        """Call the loss with one example at a time from now on.

        Raises:
            ValueError: V is no multiple of the mean of these losses.
        """
        self._batch_loss.takes_single_examples = True
        self._forget()
        try:
            self._check_kind(outputs, targets)
        except ValueError as error:
            self._batch_loss.takes_single_examples = False
            self._forget()
            raise ValueError(self._refusal_of_order()) from error

    def _refusal_of_order(self) -> str:
        return (
            f"loss: the losses of {self._batch_loss.name} for reduction='none' are not in the "
            "order of the examples, so their weights would be those of others; return them as "
            "[m], or shaped as the targets, [m, ...], with 0 for a label that does not count"
        )
