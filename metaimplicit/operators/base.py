"""Linear operators on task-batched vectors, and their algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metaimplicit.params import Params

Operator = TypeVar("Operator", bound="Curvature")


class LinearOperator(ABC):
    """A symmetric matrix for each task, known by its products: `[tasks, n] -> [tasks, n]`.

    Attributes:
        shape: `(tasks, n)`.
        dtype, device: Those of the vectors that it multiplies.
        semidefinite: Whether the matrix is known to be positive semi-definite.
        setup_products: The products with another operator that its construction took.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    semidefinite: bool = False
    setup_products: int = 0

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
    """A linear operator that knows its own damped inverse."""

    @abstractmethod
    def inverse(self, vector: Tensor, shift: float) -> Tensor:
        """(B + sI)⁻¹ v for each task, s > 0."""


@dataclass(frozen=True)
class LossParts:
    """A loss at a point, in the parts that a curvature operator is built from, over the task axis.

    Args:
        params: The point θ, `{name: [tasks, *shape]}`.
        outputs: z(θ), `{name: [tasks, *shape]} -> [tasks, …]`. For a loss without parts, the loss.
        loss: ℓ(z), `[tasks, …] -> [tasks]`. For a loss without parts, the identity.
        weighted: Whether the loss weighs its examples.
        module: The model whose layers are seen, if there is one.
        apply_model: Lifts a function of one task's model over the task axis: `(function, params)`,
            where `function(call, params)` receives the model as `call(params) -> outputs`.
    """

    params: Params
    outputs: Callable[[Params], Tensor]
    loss: Callable[[Tensor], Tensor]
    weighted: bool = False
    module: nn.Module | None = None
    apply_model: Callable[[Callable[..., Any], Params], Any] | None = None

    def total(self, params: Params) -> Tensor:
        """ℓ(z(θ)), `{name: [tasks, *shape]} -> [tasks]`."""
        return self.loss(self.outputs(params))


class Curvature(LinearOperator):
    """A linear operator made of the derivatives of a loss at a point.

    Attributes:
        params: The point θ, `{name: [tasks, *shape]}`.
        gradient: ∂ℓ/∂θ in the same layout, with the graph through which further derivatives go.
        needs_outputs: Whether it needs a loss whose outputs are told apart (a `Composite`).
    """

    needs_outputs: bool = True

    params: Params
    gradient: Params

    @classmethod
    @abstractmethod
    def from_loss(cls: type[Operator], parts: LossParts, **options: Any) -> Operator:
        """The curvature of a loss, with the options of the class.

        Raises:
            ValueError: The loss lacks a part that this curvature needs.
        """

    @classmethod
    def preconditioner(cls, core: LinearOperator, parts: LossParts, **options: Any) -> Invertible:
        """An invertible stand-in for `core`, to precondition conjugate gradients.

        Raises:
            ValueError: The class does not know its inverse.
        """
        operator = cls.from_loss(parts, **options)
        if not isinstance(operator, Invertible):
            raise ValueError(
                f"preconditioner: got {cls.__name__}, expected K-FAC, EKFAC or a diagonal, which know their inverse"
            )
        return operator


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
        self.semidefinite = first.semidefinite and second.semidefinite
        self.setup_products = first.setup_products + second.setup_products

    def check_convex(self) -> None:
        self.first.check_convex()
        self.second.check_convex()

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
