"""The sets in which a hyperparameter may lie, and the free coordinates in which it is optimised."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Domain(ABC):
    """A set of values x = value(z), where an optimiser moves the free coordinates z.

    A subclass implements `value` and `free`; the other methods have defaults. Every method works
    on tensors of any shape, and z has the shape of x. Up to round-off, `value(z)` lies in the set
    for every z that `project` has returned.

    Example:
        >>> class Negative(Domain):
        ...     def value(self, free):
        ...         return -free.exp()
        ...
        ...     def free(self, value):
        ...         return (-value).log()
        >>> Negative().value(torch.tensor(0.0))
        tensor(-1.)
    """

    @abstractmethod
    def value(self, free: Tensor) -> Tensor:
        """The values x at the coordinates `free`, differentiable."""

    @abstractmethod
    def free(self, value: Tensor) -> Tensor:
        """The coordinates z of the values x.

        Raises:
            ValueError: A value lies outside the set.
        """

    def project(self, free: Tensor) -> Tensor:
        """The nearest coordinates that are allowed. It may change `free` in place and return it.

        The optimiser calls it after each of its steps. By default all coordinates are allowed.
        """
        return free

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """(∂x/∂z)ᵀ gradient, by autograd unless a subclass has a closed form.

        Args:
            free: z.
            value: x = value(z), which spares closed forms the evaluation.
            gradient: The derivative of a scalar in x, of the shape of x.
        """
        with torch.enable_grad():
            leaf = free.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf), leaf, gradient)[0]


@dataclass(frozen=True)
class Real(Domain):
    """All real numbers: x = z.

    Example:
        >>> Real().value(torch.tensor(-2.0))
        tensor(-2.)
    """

    def value(self, free: Tensor) -> Tensor:
        """The coordinates themselves."""
        return free

    def free(self, value: Tensor) -> Tensor:
        """The values themselves; every one is allowed."""
        return value

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return gradient


@dataclass(frozen=True)
class Positive(Domain):
    """x > 0 by x = exp(z), so that an additive step in z multiplies x.

    Example:
        >>> Positive().free(torch.tensor(1.0))
        tensor(0.)
    """

    def value(self, free: Tensor) -> Tensor:
        """The exponential of the coordinates."""
        return free.exp()

    def free(self, value: Tensor) -> Tensor:
        """The logarithm of the values.

        Raises:
            ValueError: A value is not above 0.
        """
        _check_inside(value > 0, value, "numbers > 0")
        return value.log()

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient times ∂x/∂z = x."""
        return gradient * value


@dataclass(frozen=True)
class Interval(Domain):
    """low < x < high by x = low + (high − low) sigmoid(z).

    Args:
        low: The lower bound, finite.
        high: The upper bound, finite.

    Raises:
        ValueError: The bounds are infinite, or low ≥ high.

    Example:
        >>> Interval(1.0, 3.0).value(torch.tensor(0.0))
        tensor(2.)
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_bounds("Interval", self.low, self.high)
        if math.isinf(self.low) or math.isinf(self.high):
            raise ValueError(
                f"Interval: got ({self.low}, {self.high}), expected finite bounds; "
                "use Positive or Box"
            )

    def value(self, free: Tensor) -> Tensor:
        """The sigmoid of the coordinates, scaled to the interval."""
        share = free.sigmoid()
        if (self.low, self.high) == (0, 1):
            return share
        return self.low + (self.high - self.low) * share

    def free(self, value: Tensor) -> Tensor:
        """The logit of the position of each value in the interval.

        Raises:
            ValueError: A value is not strictly between the bounds.
        """
        inside = (value > self.low) & (value < self.high)
        expected = f"numbers between {self.low} and {self.high}"
        _check_inside(inside, value, expected)
        return ((value - self.low) / (self.high - self.low)).logit()

    def project(self, free: Tensor) -> Tensor:
        """Clamp z in place to |z| ≤ −log(ε max(|low|, |high|)/(high − low)).

        ε is the unit round-off of the type of z. Beyond this, x would round to a bound.
        """
        largest = max(abs(self.low), abs(self.high))
        share = torch.finfo(free.dtype).eps * max(1.0, largest / (self.high - self.low))
        limit = max(-math.log(share), 0.0)
        return free.clamp_(-limit, limit)

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient times ∂x/∂z = (high − low) sigmoid(z) sigmoid(−z).

        The first two factors are x − low, but that difference would lose digits near `low`.
        """
        return gradient * ((self.high - self.low) * free.sigmoid()) * free.neg().sigmoid()


@dataclass(frozen=True)
class Box(Domain):
    """low ≤ x ≤ high by projection: x = z moves as it is, and is clamped after each step.

    Args:
        low: The lower bound, which x may reach.
        high: The upper bound, which x may reach.

    Raises:
        ValueError: low ≥ high, or one of them is not a number.

    Example:
        >>> Box(0.0).project(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        _check_bounds("Box", self.low, self.high)

    def value(self, free: Tensor) -> Tensor:
        """The coordinates themselves."""
        return free

    def free(self, value: Tensor) -> Tensor:
        """The values themselves.

        Raises:
            ValueError: A value is outside the bounds.
        """
        inside = (value >= self.low) & (value <= self.high)
        _check_inside(inside, value, f"numbers from {self.low} to {self.high}")
        return value

    def project(self, free: Tensor) -> Tensor:
        """Clamp x = z to the bounds, in place."""
        return free.clamp_(self.low, self.high)

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        return gradient


@dataclass(frozen=True)
class Simplex(Domain):
    """x > 0 with Σx = 1 along one axis, by x = softmax(z).

    Args:
        dim: The axis along which the values sum to 1.

    Example:
        >>> Simplex().value(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    dim: int = -1

    def value(self, free: Tensor) -> Tensor:
        """The softmax of the coordinates along `dim`."""
        return free.softmax(self.dim)

    def free(self, value: Tensor) -> Tensor:
        """The logarithm of the values.

        Raises:
            ValueError: A value is not above 0, or the sum along `dim` differs from 1 by 1e-4.
        """
        normalised = (value.sum(self.dim, keepdim=True) - 1).abs() < 1e-4
        expected = f"numbers > 0 that sum to 1 along dim {self.dim}"
        _check_inside((value > 0) & normalised, value, expected)
        return value.log()


def _check_bounds(name: str, low: float, high: float) -> None:
    for bound, number in (("low", low), ("high", high)):
        if not isinstance(number, numbers.Real):
            raise ValueError(
                f"{name} {bound}: got {type(number).__name__}, expected a float for all entries"
            )
    if not low < high:
        raise ValueError(f"{name}: got low {low} and high {high}, expected low < high")


def _check_inside(inside: Tensor, value: Tensor, expected: str) -> None:
    """Raise ValueError unless the mask `inside` holds everywhere; it broadcasts against `value`."""
    if not bool(inside.all()):
        outside = value.masked_select(~inside.expand_as(value))[0].item()
        raise ValueError(
            f"hyperparameter: got {outside:g}, expected {expected}; start inside its domain"
        )
