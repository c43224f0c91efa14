"""Arithmetic on task-batched vectors, `[tasks, n]`, that stays finite where a divisor is zero."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product for each task, `[tasks, n] × [tasks, n] -> [tasks, 1]`.

    Example:
        >>> dot(torch.ones(1, 3), torch.ones(1, 3))
        tensor([[3.]])
    """
    return (a * b).sum(-1, keepdim=True)


def norm(v: Tensor) -> Tensor:
    """The Euclidean norm for each task, `[tasks, n] -> [tasks, 1]`.

    Example:
        >>> norm(torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    result: Tensor = v.norm(dim=-1, keepdim=True)
    return result


def divisor(x: Tensor) -> Tensor:
    """The same numbers, with 1 in the place of those that are not positive.

    Example:
        >>> divisor(torch.tensor([2.0, 0.0]))
        tensor([2., 1.])
    """
    return torch.where(x > 0, x, 1.0)


def reciprocal(x: Tensor, where: Tensor) -> Tensor:
    """1/x in the places `where`, and 0 elsewhere.

    Example:
        >>> x = torch.tensor([2.0, 0.0])
        >>> reciprocal(x, where=x != 0)
        tensor([0.5000, 0.0000])
    """
    return torch.where(where, 1 / torch.where(where, x, 1.0), 0.0)


def rayleigh_quotient(v: Tensor, av: Tensor) -> Tensor:
    """The quotient vᵀAv/vᵀv for each task, `[tasks, 1]`.

    It is +inf where v = 0, and NaN where v or Av is not finite.

    Args:
        v: `[tasks, n]`.
        av: Av, `[tasks, n]`.

    Example:
        >>> rayleigh_quotient(torch.ones(1, 2), torch.tensor([[2.0, 4.0]]))
        tensor([[3.]])
    """
    vv = dot(v, v)
    quotient = dot(v, av) / divisor(vv)
    quotient = torch.where(quotient.isfinite(), quotient, torch.nan)
    return torch.where(vv == 0, torch.inf, quotient)
