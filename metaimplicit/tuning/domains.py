"""Where a hyperparameter may lie, and the free coordinates in which an optimiser moves it there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.params import Params


class Domain(ABC):
    """A set of values. The optimiser moves free coordinates; `value(free)` is inside, but for round-off."""

    @abstractmethod
    def value(self, free: Tensor) -> Tensor:
        """The hyperparameter at these coordinates, differentiable."""

    @abstractmethod
    def free(self, value: Tensor) -> Tensor:
        """Coordinates of a value.

        Raises:
            ValueError: the value is outside.
        """

    def project(self, free: Tensor) -> Tensor:
        """The nearest coordinates that are allowed, after a step; in place, if it likes."""
        return free

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """(∂value/∂free)ᵀ gradient; `value` is that of `free`."""
        with torch.enable_grad():
            at = free.detach().requires_grad_()
            return torch.autograd.grad(self.value(at), at, gradient)[0]


@dataclass(frozen=True)
class Real(Domain):
    """All of ℝ, as it is."""

    def value(self, free: Tensor) -> Tensor:
        return free

    def free(self, value: Tensor) -> Tensor:
        return value

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Positive(Domain):
    """x > 0, x = exp(free): steps multiply."""

    def value(self, free: Tensor) -> Tensor:
        return free.exp()

    def free(self, value: Tensor) -> Tensor:
        _check(value > 0, value, "numbers > 0")
        return value.log()

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return gradient * value


@dataclass(frozen=True)
class Interval(Domain):
    """low < x < high, x = low + (high − low) sigmoid(free)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_bounds("Interval", self.low, self.high)
        if math.isinf(self.low) or math.isinf(self.high):
            raise ValueError(
                f"Interval: got ({self.low}, {self.high}), expected finite bounds; use Positive or Box"
            )

    def value(self, free: Tensor) -> Tensor:
        share = free.sigmoid()
        return (
            share if (self.low, self.high) == (0, 1) else self.low + (self.high - self.low) * share
        )

    def free(self, value: Tensor) -> Tensor:
        _check(
            (value > self.low) & (value < self.high),
            value,
            f"numbers between {self.low} and {self.high}",
        )
        return ((value - self.low) / (self.high - self.low)).logit()

    def project(self, free: Tensor) -> Tensor:
        """Where the value is still told from the bounds: |free| ≤ −log ε, ε the unit round-off."""
        bound = -math.log(torch.finfo(free.dtype).eps)
        return free.clamp_(-bound, bound)

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return gradient * (value - self.low) * free.neg().sigmoid()


@dataclass(frozen=True)
class Box(Domain):
    """low ≤ x ≤ high by projection: x itself moves, and is clamped after a step."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        _check_bounds("Box", self.low, self.high)

    def value(self, free: Tensor) -> Tensor:
        return free

    def free(self, value: Tensor) -> Tensor:
        _check(
            (value >= self.low) & (value <= self.high),
            value,
            f"numbers from {self.low} to {self.high}",
        )
        return value

    def project(self, free: Tensor) -> Tensor:
        return free.clamp_(self.low, self.high)

    def pull_back_gradient(self, free: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Simplex(Domain):
    """x > 0, Σx = 1 along `dim`, x = softmax(free)."""

    dim: int = -1

    def value(self, free: Tensor) -> Tensor:
        return free.softmax(self.dim)

    def free(self, value: Tensor) -> Tensor:
        close = (value.sum(self.dim, keepdim=True) - 1).abs() < 1e-4
        _check((value > 0) & close, value, f"numbers > 0 that sum to 1 along dim {self.dim}")
        return value.log()


class FreeMeta:
    """φ in free coordinates, leaves of autograd; entries that are no floating-point numbers stay as they are.

    Args:
        meta: φ to start from.
        domains: where its entries may lie; any real number unless said.

    Raises:
        ValueError: a value outside its domain, a domain of no entry.
    """

    def __init__(self, meta: Params, domains: Mapping[str, Domain] | None) -> None:
        if unknown := sorted(set(domains or {}) - set(meta)):
            raise ValueError(f"domains: got {unknown}, expected names in meta, {sorted(meta)}")
        self._fixed = {name: m.detach() for name, m in meta.items() if not m.is_floating_point()}
        self._domains = {
            name: (domains or {}).get(name, Real()) for name in meta if name not in self._fixed
        }
        self.tensors: Params = {}
        for name, domain in self._domains.items():
            try:
                self.tensors[name] = domain.free(meta[name].detach()).clone().requires_grad_()
            except ValueError as error:
                raise ValueError(f"meta[{name!r}]: {error}") from error

    def meta(self) -> Params:
        """φ, with its graph to the coordinates."""
        return {
            **self._fixed,
            **{name: self._domains[name].value(free) for name, free in self.tensors.items()},
        }

    @torch.no_grad()
    def values(self) -> Params:
        """φ, detached."""
        own = self._fixed | self.tensors
        return {name: m.clone() if m is own[name] else m for name, m in self.meta().items()}

    @torch.no_grad()
    def pull_back(self, gradients: Params, values: Params | None = None) -> Params:
        """dg/dφ in the coordinates, by the chain rule; `values` are φ there, if they are known."""
        values = self.values() if values is None else values
        return {
            n: self._domains[n].pull_back_gradient(x, values[n], gradients[n])
            for n, x in self.tensors.items()
        }

    def check(self, tensors: Params) -> None:
        """ValueError for the coordinates of another φ."""
        shapes, got = (
            {n: tuple(x.shape) for n, x in each.items()} for each in (self.tensors, tensors)
        )
        if got != shapes:
            raise ValueError(
                f"state: got hyperparameters {got}, expected {shapes}; build the tuner as the run did"
            )

    def load(self, tensors: Params) -> None:
        """Take other coordinates; ValueError for another φ's."""
        self.check(tensors)
        with torch.no_grad():
            for name, free in self.tensors.items():
                free.copy_(tensors[name])

    def project(self) -> None:
        """Bring the coordinates back to where they are allowed, after a step."""
        with torch.no_grad():
            for name, free in self.tensors.items():
                if (projected := self._domains[name].project(free)) is not free:
                    free.copy_(projected)


def norm(gradients: Params) -> float:
    """The length of all of them together."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def _check_bounds(name: str, low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"{name}: got low {low} and high {high}, expected low < high")


def _check(inside: Tensor, value: Tensor, expected: str) -> None:
    if not bool(inside.all()):
        worst = value.masked_select(~inside.expand_as(value))[0].item()
        raise ValueError(
            f"hyperparameter: got {worst:g}, expected {expected}; start inside its domain"
        )
