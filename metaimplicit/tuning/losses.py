"""Any loss of a batch, whole and split into examples."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from metaimplicit.labels import SHORT_INTEGERS
from metaimplicit.tuning.example_losses import Count, ExampleLosses, align
from metaimplicit.tuning.output_shapes import has_classes_last, refuse_broadcast
from metaimplicit.tuning.reductions import Loss, split_reductions


class SplitLoss:
    """A loss of a batch, V, and the losses ℓᵢ of its examples.

    V is the loss with its own reduction. ℓᵢ is the loss with `reduction="none"`, if it has an
    attribute or an argument `reduction`, and else the loss of example i by itself.

    How examples count in V (labels that are ignored, weights of classes, a sum or a mean) is not
    read from names. It is measured for each tensor of targets, unless all its labels have been seen
    to count plainly in a batch of this shape: V and ℓ are evaluated at outputs that depend on
    nothing, and s = V/mean ℓ. Where s is not 1, a second evaluation checks that s does not depend
    on the outputs.

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
        self._vmaps = True
        self._moves_classes: dict[Any, bool] = {}
        self._counts = WeakTensorKeyDictionary()
        self._lines: dict[Any, Tensor] = {}
        self._plain_labels: defaultdict[Any, set[int]] = defaultdict(set)

    def value(self, outputs: Any, targets: Any) -> Tensor:
        """V, a scalar, or the mean if the loss returns the losses of the examples.

        Raises:
            ValueError: The targets broadcast against the outputs.
        """
        return self._value(self._arrange(outputs, targets), targets)

    def split(self, outputs: Any, targets: Any) -> ExampleLosses:
        """The losses of the examples.

        Raises:
            ValueError: V is not a multiple of their mean, no example counts, or the targets
                broadcast against the outputs.
        """
        outputs = self._arrange(outputs, targets)
        count = self._count(outputs, targets)
        return ExampleLosses(self._losses(outputs, targets, count.counted), count)

    def _arrange(self, outputs: Any, targets: Any) -> Any:
        """The outputs as the loss takes them, with classes on axis 1 if it refuses them last."""
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return outputs
        shapes = (outputs.shape, targets.shape)
        if shapes not in self._moves_classes:
            refuse_broadcast(self._value, outputs, targets)
            self._moves_classes[shapes] = has_classes_last(self._value, outputs, targets)
        return outputs.movedim(-1, 1) if self._moves_classes[shapes] else outputs

    def _value(self, outputs: Any, targets: Any) -> Tensor:
        value: Tensor = self._whole(outputs, _widen(targets))
        return value.mean() if isinstance(value, Tensor) and value.dim() else value

    def _losses(self, outputs: Any, targets: Any, counted: Tensor | None = None) -> Tensor:
        """ℓ, `[m]` or `[m, *positions]`."""
        targets = _widen(targets)
        if self._unreduced is not None:
            losses: Tensor = self._unreduced(outputs, targets)
            m = _examples(outputs, targets)
            if losses.dim() and len(losses) == m:
                return losses
            # Positions may have been flattened into the axis of the examples.
            if losses.numel() % m == 0 and losses.numel() > 0 and (losses.dim() or m == 1):
                return losses.reshape(m, -1) if losses.numel() > m else losses.reshape(m)
            self._unreduced = None
        return self._losses_one_by_one(outputs, targets, counted)

    def _losses_one_by_one(self, outputs: Any, targets: Any, counted: Tensor | None) -> Tensor:
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
            m = _examples(outputs, targets)
            one_each = [tree_map(lambda x, i=i: x[i], examples) for i in range(m)]
            losses = torch.stack([loss_of_one(example) for example in one_each])
        return losses if counted is None else torch.where(counted, losses, 0.0)

    def _count(self, outputs: Any, targets: Any) -> Count:
        """What `_measure` returns, remembered while the targets live and stay as they are."""
        if not isinstance(targets, Tensor) or _is_transformed(targets):
            return self._measure(outputs, targets)
        version = None if targets.is_inference() else targets._version
        key = (version, _shapes(outputs))
        known = self._counts.get(targets)
        if known is None or known[0] != key:
            known = (key, self._measure(outputs, targets))
            counted = known[1].counted
            if counted is None or not _is_transformed(counted):
                self._counts[targets] = known
        count: Count = known[1]
        return count

    @torch.no_grad()
    def _measure(self, outputs: Any, targets: Any) -> Count:
        """Evaluate V and ℓ at outputs that depend on nothing: s, and what counts."""
        labels = _labels(targets)
        plain_labels = self._plain_labels[_shapes(outputs)]
        if labels and labels <= plain_labels:
            return Count(1.0, None)
        value, losses = self._at_reference(outputs, targets, power=1)
        hidden = any(_is_transformed(y) for y in tree_leaves(targets) if isinstance(y, Tensor))
        if not hidden and _is_plain_mean(value, losses):
            # Weights of classes may balance in one batch. In one example they do not.
            if labels and self._is_plain_alone(outputs, targets):
                plain_labels |= labels
            return Count(1.0, None)

        # At one reference, a loss that counts may be 0 by chance.
        second_value, second_losses = self._at_reference(outputs, targets, power=2)
        counted = (losses.isfinite() & (losses != 0)) | (
            second_losses.isfinite() & (second_losses != 0)
        )
        mean = torch.where(counted, losses, 0.0).mean()
        if hidden:  # under vmap, where numbers cannot be read
            return Count(value / mean, counted)

        second_mean = torch.where(counted, second_losses, 0.0).mean()
        scales = ((value / mean).item(), (second_value / second_mean).item())
        tolerance = 1000 * torch.finfo(losses.dtype).eps
        if not math.isclose(*scales, rel_tol=tolerance):
            raise ValueError(self._refusal(counted, scales))
        return Count(scales[0], None if counted.all() else counted)

    def _at_reference(self, outputs: Any, targets: Any, power: int) -> tuple[Tensor, Tensor]:
        """V and ℓ at the reference outputs, or at these outputs if the loss refuses those."""
        for widen in (True, False):  # False for a loss with parts in half precision
            try:
                return self._evaluate(self._reference(outputs, power, widen=widen), targets)
            except (RuntimeError, ValueError):
                continue
        return self._evaluate(outputs, targets)

    def _reference(self, outputs: Any, power: int, *, widen: bool) -> Any:
        """Numbers between 0 and 1, valid as scores and as probabilities, shaped as the outputs."""

        def replace(z: Any) -> Any:
            if not isinstance(z, Tensor) or not z.is_floating_point():
                return z
            dtype = torch.promote_types(z.dtype, torch.float32) if widen else z.dtype
            return self._line(z, dtype, power)

        return tree_map(replace, outputs)

    def _line(self, z: Tensor, dtype: torch.dtype, power: int) -> Tensor:
        """A line along the second axis, shaped as z; one number if there is no such axis."""
        key = (z.shape, dtype, z.device, power)
        line = self._lines.get(key)
        if line is None:
            size = z.shape[1] if z.dim() > 1 else 1
            line = torch.linspace(0.2357, 0.8123, size, dtype=dtype, device=z.device).pow(power)
            line = align(line, z.dim() - 1) if z.dim() > 0 else line[0]
            line = line.expand(z.shape)
            if len(self._lines) >= 16:
                self._lines.clear()
            # A tensor that was made inside of a transform must not outlive it.
            if not _is_transformed(line):
                self._lines[key] = line
        return line

    def _evaluate(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        return self._value(outputs, targets), self._losses(outputs, targets)

    def _is_plain_alone(self, outputs: Any, targets: Any) -> bool:
        """Whether V of each example by itself is its loss."""
        reference = self._reference(outputs, power=1, widen=True)
        try:
            losses = self._losses(reference, targets)
            alone = self._losses_one_by_one(reference, targets, None)
        except (RuntimeError, ValueError):  # a loss of two examples or more, say
            return False
        return torch.allclose(alone, losses.flatten(1).mean(1) if losses.dim() > 1 else losses)

    def _refusal(self, counted: Tensor, scales: tuple[float, float]) -> str:
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        if not counted.any():
            return f"loss: {name} counts no example of the batch, expected at least one that counts"
        if self._unreduced is None:
            return (
                f"loss: the value of {name} is no mean of its values at single examples, which "
                "variables weigh; give it an argument `reduction`, with which it returns its "
                "losses [m] for 'none'"
            )
        return (
            f"loss: the value of {name} is {scales[0]:.6g} times the mean of its losses for "
            f"reduction='none' at some outputs and {scales[1]:.6g} times at others, expected one "
            "number, so that examples can be weighed; use a loss that is a weighted sum over "
            "examples"
        )


def _widen(targets: Any) -> Any:
    """Labels as int64, which losses of torch ask for."""
    if isinstance(targets, Tensor) and targets.dtype in SHORT_INTEGERS:
        return targets.long()
    return targets


def _examples(outputs: Any, targets: Any) -> int:
    """m, by the targets, or by the outputs if the targets are no tensors."""
    leaves = [x for x in tree_leaves((targets, outputs)) if isinstance(x, Tensor)]
    return len(leaves[0]) if leaves and leaves[0].dim() else 1


def _labels(targets: Any) -> set[int]:
    """The classes that the targets name; empty if they are no integers that can be read."""
    if not isinstance(targets, Tensor) or _is_transformed(targets):
        return set()
    if targets.is_floating_point() or targets.is_complex():
        return set()
    return set(targets.unique().tolist())


def _is_plain_mean(value: Tensor, losses: Tensor) -> bool:
    """Whether V = mean ℓ ≠ 0 to round-off."""
    mean = losses.mean().item()
    error = abs(value.item() - mean)
    tolerance = 16 * torch.finfo(losses.dtype).eps
    if not 0 < abs(mean) < math.inf:
        return False
    if error <= tolerance * abs(mean):
        return True
    return error <= tolerance * losses.abs().mean().item()  # of losses of both signs


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((x.shape, x.dtype) for x in tree_leaves(tree) if isinstance(x, Tensor))


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a transform such as vmap wraps the tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
