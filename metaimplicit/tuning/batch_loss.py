"""A loss of a batch, called for the whole batch and for its examples."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.labels import widened
from metaimplicit.tuning.batch_shapes import count_examples, has_axis_of_examples, shapes_of
from metaimplicit.tuning.example_losses import align
from metaimplicit.tuning.loss_checks import Difference
from metaimplicit.tuning.reductions import Loss, split_reductions
from metaimplicit.unsupported import shorten

GIVE_REDUCTION = "give it an argument `reduction`, with which it returns its losses [m] for 'none'"


class BatchLoss:
    """The loss V of a batch, and the losses ℓᵢ of its examples.

    V is the loss with its own reduction. ℓᵢ is the loss with `reduction="none"`, if it has an
    attribute or an argument `reduction` that makes it return losses of each example, and else the
    loss of example i by itself.

    Args:
        loss: `(outputs, targets) -> Tensor`, a function or a module.

    Attributes:
        name: What messages call the loss.
        takes_single_examples: Whether ℓᵢ is the loss of example i by itself.

    Example:
        >>> loss = BatchLoss(torch.nn.MSELoss())
        >>> outputs, targets = torch.zeros(2), torch.tensor([1.0, 3.0])
        >>> loss.value(outputs, targets), loss.of_examples(outputs, targets)
        (tensor(5.), tensor([1., 9.]))
    """

    def __init__(self, loss: Loss) -> None:
        self._whole, self._unreduced = split_reductions(loss)
        self._vmaps = True
        self.name = getattr(loss, "__name__", type(loss).__name__)
        self.takes_single_examples = self._unreduced is None

    def value(self, outputs: Any, targets: Any) -> Tensor:
        """V, a scalar, or the mean if the loss returns the losses of the examples.

        Raises:
            ValueError: The loss returns no tensor.
        """
        value: Any = self._whole(outputs, _widen(targets))
        if not isinstance(value, Tensor):
            raise ValueError(
                f"loss: {self.name} returned {type(value).__name__}, expected one tensor, a scalar "
                "or the losses of the examples"
            )
        return value.mean() if value.dim() else value

    def of_examples(self, outputs: Any, targets: Any, counted: Tensor | None = None) -> Tensor:
        """ℓ, `[m]` or `[m, *positions]`.

        Args:
            outputs: What the model returned.
            targets: What the loss compares with it.
            counted: Which losses count, shaped as they are. If None, all do.
        """
        if not self.takes_single_examples and self._unreduced is not None:
            losses: Tensor = self._unreduced(outputs, _widen(targets))
            m = count_examples(outputs, targets)
            if losses.dim() and len(losses) == m:
                return losses
            # Positions may have been flattened into the axis of the examples.
            if losses.numel() % m == 0 and losses.numel() > 0 and (losses.dim() or m == 1):
                return losses.reshape(m, -1) if losses.numel() > m else losses.reshape(m)
            self.takes_single_examples = True
        return self.one_by_one(outputs, targets, counted)

    def one_by_one(self, outputs: Any, targets: Any, counted: Tensor | None = None) -> Tensor:
        """V of each example by itself, `[m]`, and 0 where it does not count.

        Raises:
            ValueError: Outputs or targets have no axis of examples.
        """
        m = count_examples(outputs, targets)
        if not has_axis_of_examples((outputs, targets), m):
            raise ValueError(
                f"loss: {self.name} takes outputs of shapes {shapes_of(outputs)} for targets of "
                f"shapes {shapes_of(targets)}, of which some lack the axis of the {m} examples, "
                f"so they cannot be weighed one by one; {GIVE_REDUCTION}"
            )
        if counted is not None:
            # An example that does not count has the loss 0/0. It lends the targets of another one.
            first = counted.to(torch.uint8).argmax()
            targets = tree_map(
                lambda y: torch.where(align(counted, y.dim()), y, y.index_select(0, first[None])),
                targets,
            )
        losses = self._call_one_by_one((outputs, targets), m)
        return losses if counted is None else torch.where(counted, losses, 0.0)

    def _call_one_by_one(self, examples: tuple[Any, Any], m: int) -> Tensor:
        def loss_of_one(example: tuple[Any, Any]) -> Tensor:
            return self.value(*tree_map(lambda x: x.unsqueeze(0), example))

        if self._vmaps:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return torch.vmap(loss_of_one, randomness="different")(examples)
            except (RuntimeError, IndexError, ValueError):
                self._vmaps = False
        one_each = [tree_map(lambda x, i=i: x[i], examples) for i in range(m)]
        try:
            return torch.stack([loss_of_one(example) for example in one_each])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise ValueError(
                f"loss: {self.name} cannot be evaluated at one example, so that variables cannot "
                f"weigh it ({shorten(error)}); {GIVE_REDUCTION}"
            ) from error

    def refusal(self, difference: Difference) -> str:
        """What to say where V is no multiple of the mean of ℓ."""
        if self.takes_single_examples:
            return (
                f"loss: the value of {self.name} is no mean of its values at single examples, "
                f"which variables weigh: {difference}; if it is a weighted sum over examples, "
                f"{GIVE_REDUCTION}"
            )
        return (
            f"loss: the value of {self.name} is no multiple of the mean of its losses for "
            f"reduction='none': {difference}; use a loss that is a weighted sum over examples"
        )


def _widen(targets: Any) -> Any:
    """Labels as int64, which losses of torch ask for."""
    return widened(targets) if isinstance(targets, Tensor) else targets
