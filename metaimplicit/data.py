"""The tensors of a problem's data that are differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metaimplicit.graph import is_differentiated
from metaimplicit.params import Params, detached
from metaimplicit.problem import Stream
from metaimplicit.tensors import recordable

PREFIX = "data tensor "


class DataEntries:
    """The tensors of data that require grad (or have a tangent), as further entries of φ.

    Their names start with `PREFIX`, which no entry of `meta` does. So whatever differentiates with
    respect to φ differentiates with respect to them as well.

    Args:
        data: Any pytree. A `Stream` has no such tensors.

    Attributes:
        tensors: `{name: tensor}`, as they are in the data, with their graph.
        constants: The data in which they have no graph. Tensors that autograd cannot record (of
            `inference_mode`) are copied.

    Example:
        >>> import torch
        >>> entries = DataEntries({"x": torch.ones(2, requires_grad=True), "y": torch.zeros(2)})
        >>> list(entries.tensors)
        ['data tensor 0']
        >>> entries.restore({"data tensor 0": torch.full((2,), 3.0)})
        {'x': tensor([3., 3.]), 'y': tensor([0., 0.])}
    """

    def __init__(self, data: Any) -> None:
        self.constants = data
        self.tensors: Params = {}
        self._leaves: list[Any] = []  # of the constants
        if isinstance(data, Stream):
            return
        self._leaves, self._spec = tree_flatten(data)
        for number, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor) and is_differentiated(leaf):
                self.tensors[f"{PREFIX}{number}"] = leaf
        needs_copies = any(isinstance(x, Tensor) and x.is_inference() for x in self._leaves)
        if self.tensors or needs_copies:
            fixed = detached(self.tensors)
            leaves = [fixed.get(f"{PREFIX}{i}", x) for i, x in enumerate(self._leaves)]
            self._leaves = list(map(recordable, leaves))
            self.constants = tree_unflatten(self._leaves, self._spec)

    def flatten(self, data: Any) -> tuple[list[Any], TreeSpec]:
        """`tree_flatten(data)`, which is remembered for the `constants`."""
        if self._leaves and data is self.constants:
            return self._leaves, self._spec
        return tree_flatten(data)

    def restore(self, tensors: Mapping[str, Tensor]) -> Any:
        """The data with `tensors` in the places that their names stand for."""
        return self.restore_in(self.constants, tensors)

    def restore_in(self, data: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Data of the same structure, likewise."""
        if not self.tensors:
            return data
        leaves, spec = self.flatten(data)
        return tree_unflatten([tensors.get(f"{PREFIX}{i}", x) for i, x in enumerate(leaves)], spec)

    def without_tensors(self) -> DataEntries:
        """The same names, with nothing in the places of the tensors."""
        other = copy(self)
        other.constants = None
        other._leaves = []
        other.tensors = {name: torch.empty(0) for name in self.tensors}
        return other

    def arrange(self, gradients: Mapping[str, Tensor]) -> Any:
        """The gradients of the tensors as a pytree like the data, None where there is none."""
        if isinstance(self.constants, Stream):
            return None
        leaves = [gradients.get(f"{PREFIX}{i}") for i in range(len(self._leaves))]
        return tree_unflatten(leaves, self._spec)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `inference_mode` within the block. What it computes has no graph all the same.

    Example:
        >>> import torch
        >>> with torch.inference_mode(), outside_inference_mode():
        ...     print(torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        False False
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def describe_entry(name: str) -> str:
    """An entry of φ in the words of an error.

    Example:
        >>> describe_entry("lr"), describe_entry("data tensor 3")
        ("meta['lr']", 'data tensor 3')
    """
    return name if name.startswith(PREFIX) else f"meta[{name!r}]"
