"""The types, shapes and labels of the tensors of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaimplicit.tensors import is_transformed, tensors_in


def signature(tree: Any) -> Any:
    """The shapes and types of the tensors of a pytree.

    Example:
        >>> import torch
        >>> signature((torch.zeros(2, 3), None))
        ((torch.Size([2, 3]), torch.float32),)
    """
    if isinstance(tree, Tensor):  # as it is for most losses, many times in a step
        return (tree.shape, tree.dtype)
    return tuple((x.shape, x.dtype) for x in tensors_in(tree))


def kind_of(tree: Any) -> Any:
    """The types of the tensors and their axes, of which only the size 1 is special.

    Example:
        >>> import torch
        >>> kind_of(torch.zeros(8, 1)) == kind_of(torch.zeros(9, 1))
        True
    """
    return tuple((x.dtype, *(min(size, 2) for size in x.shape)) for x in tensors_in(tree))


def shapes_of(tree: Any) -> list[tuple[int, ...]]:
    """The shapes of the tensors, for errors.

    Example:
        >>> import torch
        >>> shapes_of((torch.zeros(2, 3), torch.zeros(())))
        [(2, 3), ()]
    """
    return [tuple(x.shape) for x in tensors_in(tree)]


def count_examples(outputs: Any, targets: Any) -> int:
    """m, by the targets, or by the outputs if the targets are no tensors.

    Example:
        >>> import torch
        >>> count_examples(torch.zeros(3, 2), None)
        3
    """
    tensors = tensors_in((targets, outputs))
    return len(tensors[0]) if tensors and tensors[0].dim() else 1


def has_axis_of_examples(tree: Any, examples: int) -> bool:
    """Whether every tensor of a pytree leads with an axis of that many examples.

    Example:
        >>> import torch
        >>> has_axis_of_examples((torch.zeros(3, 2), torch.zeros(())), 3)
        False
    """
    return all(x.dim() > 0 and len(x) == examples for x in tensors_in(tree))


def read_labels(targets: Any) -> set[int]:
    """The classes that the targets name; empty if they are no integers that can be read.

    Example:
        >>> import torch
        >>> read_labels(torch.tensor([2, 0, 2]))
        {0, 2}
    """
    if not isinstance(targets, Tensor) or is_transformed(targets):
        return set()
    if targets.is_floating_point() or targets.is_complex():
        return set()
    return set(targets.unique().tolist())
