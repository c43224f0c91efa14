"""Linear operators on task-batched vectors, and their algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class LinearOperator(ABC):
    """A symmetric matrix for each task, known by its products: `[tasks, n] -> [tasks, n]`.

    A subclass sets `shape`, `dtype` and `device`, and implements `matvec`. Operators add and
    scale: `first + second`, `2.0 * operator`.

    Attributes:
        shape: `(tasks, n)`.
        dtype: The type of the vectors that it multiplies.
        device: The device of these vectors.
        semidefinite: Whether the matrix is known to be positive semi-definite.
        setup_products: The products with another operator that its construction took.

    Example:
        >>> like = torch.zeros(1, 2)
        >>> operator = 2.0 * Identity(like) + Identity(like, scale=3.0)
        >>> operator.matvec(torch.ones(1, 2))
        tensor([[5., 5.]])
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    semidefinite: bool = False
    setup_products: int = 0

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """A v for each task, `[tasks, n] -> [tasks, n]`. It leaves v as it is."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """A V for each task, k vectors at once: `[k, tasks, n] -> [k, tasks, n]`."""
        return torch.stack([self.matvec(vector) for vector in vectors])

    def columns(self, index: Tensor) -> Tensor:
        """Columns of A for each task, `[k, tasks, n]`.

        Args:
            index: The numbers of k columns, `[k]`, int64, on the CPU. The tasks share them.
        """
        unit = torch.nn.functional.one_hot(index, self.shape[1]).to(self.device, self.dtype)
        return self.matmat(unit[:, None, :].expand(-1, self.shape[0], -1))

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        """(B, σ) with A = B + σI, where σ is all that is known to be a multiple of the identity."""
        return self, 0.0

    def check_convex(self) -> None:
        """Raise ValueError if the operator assumes a convex loss and the loss is not convex.

        An implicit method calls it when a solve has met smaller curvature than the operator allows.
        """
        return  # most operators assume nothing

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other)

    def __rmul__(self, factor: float | Tensor) -> LinearOperator:
        return Scaled(factor, self)


class Invertible(LinearOperator):
    """A linear operator that knows the inverse of itself plus a positive multiple of the identity.

    Attributes:
        closed_form: Whether its products evaluate no loss, so that they need not be counted.

    Example:
        >>> from metaimplicit.operators import Diagonal
        >>> diagonal = Diagonal(Identity(torch.zeros(1, 2), scale=3.0), samples=None)
        >>> diagonal.inverse(torch.ones(1, 2), shift=1.0)
        tensor([[0.2500, 0.2500]])
    """

    closed_form: bool = False

    @abstractmethod
    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(B + sI)⁻¹ v for each task, `[tasks, n] -> [tasks, n]`, with s = `shift` > 0."""


class Identity(LinearOperator):
    """σI.

    Args:
        like: Any operator, or a `[tasks, n]` tensor, whose shape, type and device it takes.
        scale: σ, a number or a scalar tensor.

    Example:
        >>> Identity(torch.zeros(1, 2), scale=3.0).matvec(torch.ones(1, 2))
        tensor([[3., 3.]])
    """

    def __init__(
        self,
        like: LinearOperator | Tensor,
        scale: float | Tensor = 1.0,
    ) -> None:
        tasks, n = like.shape
        self.shape = (tasks, n)
        self.dtype = like.dtype
        self.device = like.device
        self.scale = scale

    def matvec(self, vector: Tensor) -> Tensor:
        """The product σv."""
        return self.scale * vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products σV."""
        return self.scale * vectors

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        """(0, σ)."""
        return Identity(self, 0.0), self.scale


class Sum(LinearOperator):
    """A + B. Damping is `operator + Identity(operator, damping)`.

    Args:
        first: A.
        second: B, of the same shape.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> identity = Identity(torch.zeros(1, 2))
        >>> Sum(identity, identity).matvec(torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    def __init__(
        self,
        first: LinearOperator,
        second: LinearOperator,
    ) -> None:
        if first.shape != second.shape:
            raise ValueError(
                f"operator sum: got shapes {first.shape} and {second.shape}, expected equal ones"
            )
        self.shape = first.shape
        self.dtype = first.dtype
        self.device = first.device
        self.first = first
        self.second = second
        self.semidefinite = first.semidefinite and second.semidefinite
        self.setup_products = first.setup_products + second.setup_products

    def check_convex(self) -> None:
        """Check both terms."""
        self.first.check_convex()
        self.second.check_convex()

    def matvec(self, vector: Tensor) -> Tensor:
        """The product Av + Bv."""
        return self.first.matvec(vector) + self.second.matvec(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products AV + BV."""
        return self.first.matmat(vectors) + self.second.matmat(vectors)

    def columns(self, index: Tensor) -> Tensor:
        """The sum of the columns of A and of B."""
        return self.first.columns(index) + self.second.columns(index)

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        """The sum of the cores, and the sum of the multiples of the identity."""
        first, first_shift = self.first.split()
        second, second_shift = self.second.split()
        shift = first_shift + second_shift
        # The core of a multiple of the identity is zero, and is left out.
        if isinstance(first, Identity):
            return second, shift
        if isinstance(second, Identity):
            return first, shift
        return Sum(first, second), shift


class Scaled(LinearOperator):
    """c A.

    Args:
        factor: c, a number or a scalar tensor.
        operator: A.

    Example:
        >>> Scaled(2.0, Identity(torch.zeros(1, 2))).matvec(torch.ones(1, 2))
        tensor([[2., 2.]])
    """

    def __init__(
        self,
        factor: float | Tensor,
        operator: LinearOperator,
    ) -> None:
        self.shape = operator.shape
        self.dtype = operator.dtype
        self.device = operator.device
        self.factor = factor
        self.operator = operator
        self.semidefinite = operator.semidefinite and bool(factor >= 0)
        self.setup_products = operator.setup_products

    def check_convex(self) -> None:
        """Check A."""
        self.operator.check_convex()

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with A, times c."""
        return self.factor * self.operator.matvec(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        """The products with A, times c."""
        return self.factor * self.operator.matmat(vectors)

    def columns(self, index: Tensor) -> Tensor:
        """The columns of A, times c."""
        return self.factor * self.operator.columns(index)

    def split(self) -> tuple[LinearOperator, float | Tensor]:
        """(cB, cσ)."""
        core, shift = self.operator.split()
        if not isinstance(core, Identity):
            core = Scaled(self.factor, core)
        return core, self.factor * shift
