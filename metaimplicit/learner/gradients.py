"""Meta-gradients on their way to `.grad`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.params import Params


def accumulate(parameters: Mapping[str, Tensor], gradients: Params) -> None:
    """Add gradients to the `.grad` of the parameters that require grad, as `backward` does.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> for _ in range(2):
        ...     accumulate({"w": w}, {"w": torch.ones(2)})
        >>> w.grad
        tensor([2., 2.])
    """
    for name, p in parameters.items():
        if p.requires_grad:
            gradient = gradients[name]
            p.grad = gradient if p.grad is None else p.grad + gradient


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
    pairs = zip(tree_leaves(data), tree_leaves(gradients), strict=True)
    known = [(x, weight * gradient) for x, gradient in pairs if gradient is not None]
    if known:
        torch.autograd.backward([x for x, _ in known], [gradient for _, gradient in known])


def warn_if_useless(gradients: Params) -> None:
    """Warn if a meta-gradient is not finite, or too large to mean anything.

    At a norm above 1/ε, where ε is the relative round-off of its type (that of float32 for shorter
    types), a change of φ by round-off changes the loss by more than one.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_if_useless({"weight": torch.tensor([float("nan")])})
        >>> str(caught[0].message).split(";")[0]
        "the meta-gradient of 'weight' is not finite"
    """
    if any(g.is_meta for g in gradients.values()):
        return  # they hold no numbers
    norm = float(torch.nn.utils.get_total_norm(gradients.values()))
    types = {torch.float32, *(g.dtype for g in gradients.values())}
    eps = min(torch.finfo(dtype).eps for dtype in types)
    if norm <= 1 / eps:
        return
    wrong = [name for name, g in gradients.items() if not bool(g.isfinite().all())]
    names = ", ".join(map(repr, wrong[:3])) + (", …" if len(wrong) > 3 else "")
    what = f"of {names} is not finite" if wrong else f"has the norm {norm:.1e}"
    warnings.warn(
        f"the meta-gradient {what}; lower the inner step size, take fewer inner steps or a larger "
        "eps of the inner optimiser, or add damping or proximal",
        RuntimeWarning,
        stacklevel=3,
    )
