"""The meta-parameters φ as functions of free coordinates, the tensors that an optimiser moves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metaimplicit.params import Params
from metaimplicit.tuning.domains import Domain, Real


class FreeMeta:
    """φ = value(z) in the free coordinates z of its domains.

    Entries of φ that are not floating-point tensors stay constant and have no coordinates.

    Args:
        meta: φ to start from, `{name: tensor}`. It is copied.
        domains: The domain of each entry, by name. An entry without one is `Real`.

    Raises:
        ValueError: A value is no tensor or lies outside its domain, or a domain names no entry of
            `meta`.

    Attributes:
        tensors: z, `{name: tensor}` shaped as φ: leaves of autograd that an optimiser may change
            in place.

    Example:
        >>> from metaimplicit.tuning import Positive
        >>> free = FreeMeta({"decay": torch.tensor(1.0)}, {"decay": Positive()})
        >>> free.tensors["decay"].detach()
        tensor(0.)
        >>> free.values()
        {'decay': tensor(1.)}
    """

    def __init__(self, meta: Params, domains: Mapping[str, Domain] | None) -> None:
        domains = domains or {}
        unknown = sorted(set(domains) - set(meta))
        if unknown:
            raise ValueError(f"domains: got {unknown}, expected names in meta, {sorted(meta)}")

        self._constants: Params = {}
        self._domains: dict[str, Domain] = {}
        self.tensors: Params = {}
        for name, value in meta.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"meta[{name!r}]: got {type(value).__name__}, expected a tensor, such as "
                    "torch.tensor(0.1)"
                )
            if not value.is_floating_point():
                self._constants[name] = value.detach()
                continue
            domain = domains.get(name, Real())
            try:
                free = domain.free(value.detach())
            except ValueError as error:
                raise ValueError(f"meta[{name!r}]: {error}") from error
            self._domains[name] = domain
            self.tensors[name] = free.clone().requires_grad_()

    def meta(self) -> Params:
        """φ, with its graph to the coordinates."""
        moving = {name: self._domains[name].value(free) for name, free in self.tensors.items()}
        return self._constants | moving

    @torch.no_grad()
    def values(self) -> Params:
        """φ, detached. No tensor of it shares memory with the coordinates or the constants."""
        stored = self._constants | self.tensors
        return {
            name: value.clone() if value is stored[name] else value
            for name, value in self.meta().items()
        }

    @torch.no_grad()
    def pull_back(self, gradients: Params, values: Params | None = None) -> Params:
        """dg/dz = (∂φ/∂z)ᵀ dg/dφ.

        Args:
            gradients: dg/dφ, by name, of every entry that has coordinates.
            values: φ at the present coordinates. If None, it is computed.

        Returns:
            `{name: tensor}`, named and shaped as `tensors`.
        """
        if values is None:
            values = self.values()
        return {
            name: self._domains[name].pull_back_gradient(free, values[name], gradients[name])
            for name, free in self.tensors.items()
        }

    @torch.no_grad()
    def without_blocked(self, gradients: Params) -> Params:
        """dg/dz with zeros where the domain takes a step against it back, since z is at a bound.

        Args:
            gradients: dg/dz, as `pull_back` returns it.

        Example:
            >>> from metaimplicit.tuning import Box
            >>> free = FreeMeta({"weights": torch.tensor([0.0, 0.0, 1.0])}, {"weights": Box(0.0)})
            >>> free.without_blocked({"weights": torch.tensor([2.0, -2.0, 2.0])})
            {'weights': tensor([ 0., -2.,  2.])}
        """
        moving = {}
        for name, free in self.tensors.items():
            # A step that would round away at a bound is lengthened, so that the block is seen.
            g = gradients[name]
            step = free - g.sign() * torch.maximum(g.abs(), 1e-3 * (1 + free.abs()))
            after = self._domains[name].project(step.clone())  # which may clamp in place
            is_blocked = (after == free) & (after != step)
            moving[name] = torch.where(is_blocked, 0.0, gradients[name])
        return moving

    def require_coordinates(self) -> FreeMeta:
        """Return this φ.

        Raises:
            ValueError: No entry of φ is a floating-point tensor, so that there is nothing to tune.
        """
        if not self.tensors:
            dtypes = {name: str(value.dtype) for name, value in self._constants.items()}
            raise ValueError(
                f"meta: got {dtypes}, expected at least one floating-point tensor to tune"
            )
        return self

    def check(self, tensors: Params) -> None:
        """Raise ValueError unless `tensors` have the names and shapes of these coordinates."""
        expected = {name: tuple(free.shape) for name, free in self.tensors.items()}
        got = {name: tuple(free.shape) for name, free in tensors.items()}
        if got != expected:
            raise ValueError(
                f"state: got hyperparameters {got}, expected {expected}; "
                "build the tuner as the run did"
            )

    def load(self, tensors: Params) -> None:
        """Copy other coordinates in.

        Raises:
            ValueError: Their names or shapes differ from these.
        """
        self.check(tensors)
        with torch.no_grad():
            for name, free in self.tensors.items():
                free.copy_(tensors[name])

    def project(self) -> None:
        """Bring the coordinates back to where their domains allow them, in place."""
        with torch.no_grad():
            for name, free in self.tensors.items():
                projected = self._domains[name].project(free)
                if projected is not free:
                    free.copy_(projected)


def total_norm(tensors: Params) -> float:
    """The Euclidean norm of all the tensors together, summed in float64.

    Example:
        >>> total_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        5.0
    """
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
