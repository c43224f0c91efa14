"""Linear operators on task-batched vectors, and their algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class LinearOperator(ABC):
    """A symmetric matrix for each task, known by its products: `[tasks, n] -> [tasks, n]`.

    Attributes:
        shape: `(tasks, n)`.
        dtype, device: of the vectors it takes.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """A v for each task, `[tasks, n] -> [tasks, n]`."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """A V for each task, k vectors at once: `[k, tasks, n] -> [k, tasks, n]`."""
        return torch.stack([self.matvec(vector) for vector in vectors])

    def columns(self, index: Tensor) -> Tensor:
        """A[:, i] for each i of `index` `[k]`, on the CPU: `[k, tasks, n]`."""
        unit = torch.nn.functional.one_hot(index, self.shape[1]).to(self.device, self.dtype)
        return self.matmat(unit[:, None, :].expand(-1, self.shape[0], -1))

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        """(B, σ) with A = B + σI, σ all that is known to be a multiple of the identity."""
        return self, 0.0

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other)

    def __rmul__(self, factor: float | Tensor) -> LinearOperator:
        return Scaled(factor, self)


class Invertible(LinearOperator):
    """One that knows its own damped inverse."""

    @abstractmethod
    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(B + sI)⁻¹ v for each task, s > 0."""


class Identity(LinearOperator):
    """σI; `like` is any operator, or a `[tasks, n]` tensor, of the shape wanted."""

    def __init__(self, like: LinearOperator | Tensor, scale: float | Tensor = 1.0) -> None:
        tasks, n = like.shape
        self.shape, self.dtype, self.device, self.scale = (tasks, n), like.dtype, like.device, scale

    def matvec(self, vector: Tensor) -> Tensor:
        return self.scale * vector

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.scale * vectors

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        return Identity(self, 0.0), self.scale


class Sum(LinearOperator):
    """A + B; damping is `operator + Identity(operator, damping)`."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        if first.shape != second.shape:
            raise ValueError(
                f"operator sum: got shapes {first.shape} and {second.shape}, expected equal ones"
            )
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device
        self.first, self.second = first, second

    def matvec(self, vector: Tensor) -> Tensor:
        return self.first.matvec(vector) + self.second.matvec(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.first.matmat(vectors) + self.second.matmat(vectors)

    def columns(self, index: Tensor) -> Tensor:
        return self.first.columns(index) + self.second.columns(index)

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        (first, a), (second, b) = self.first.split(), self.second.split()
        if isinstance(first, Identity):
            return second, a + b
        if isinstance(second, Identity):
            return first, a + b
        return Sum(first, second), a + b


class Scaled(LinearOperator):
    """c A, c a scalar."""

    def __init__(self, factor: float | Tensor, operator: LinearOperator) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.factor, self.operator = factor, operator

    def matvec(self, vector: Tensor) -> Tensor:
        return self.factor * self.operator.matvec(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.factor * self.operator.matmat(vectors)

    def columns(self, index: Tensor) -> Tensor:
        return self.factor * self.operator.columns(index)

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        core, shift = self.operator.split()
        return core if isinstance(core, Identity) else Scaled(
            self.factor, core
        ), self.factor * shift
