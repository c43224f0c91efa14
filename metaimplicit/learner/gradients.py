"""Meta-gradients on their way to `.grad`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.params import Params
from metaimplicit.tensors import tensors_in


def accumulate(parameters: Mapping[str, Tensor], gradients: Params) -> None:
    """Add gradients to the `.grad` of the parameters that require grad, as `backward` does.

    Hooks of the parameters are called.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> for _ in range(2):
        ...     accumulate({"w": w}, {"w": torch.ones(2)})
        >>> w.grad
        tensor([2., 2.])
    """
    learnt = {name: p for name, p in parameters.items() if p.requires_grad}
    # The gradients arrive at the leaves as from a loss, so their hooks see them.
    torch.autograd.backward(list(learnt.values()), [gradients[name] for name in learnt])


def accumulate_in_data(data: Any, gradients: Any, weight: float) -> None:
    """Add weighted gradients to the `.grad` of the tensors of data, or of what they come from.

    Args:
        data: Any pytree.
        gradients: A pytree like it, with a gradient for each tensor that requires grad, else None.
        weight: A factor.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> accumulate_in_data({"x": 3 * x}, {"x": torch.ones(2)}, weight=0.5)
        >>> x.grad
        tensor([1.5000, 1.5000])
    """
    if not tensors_in(gradients):
        return
    pairs = zip(tree_leaves(data), tree_leaves(gradients), strict=True)
    known = [(x, weight * gradient) for x, gradient in pairs if gradient is not None]
    torch.autograd.backward([x for x, _ in known], [gradient for _, gradient in known])
