"""What the modules of a model hold beside their parameters and buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.task_axis import map_tensors
from metaimplicit.tensors import tensors_in
from metaimplicit.versions import version_of

REGISTERED = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Attributes:
    """What modules hold beside their parameters and buffers: tensors and numbers, by name.

    Attributes:
        values: Copies of the tensors, and the numbers.
        versions: What is another once the attribute was set or written to.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> model[0].masks = [torch.ones(2)]
        >>> before = Attributes.read(model)
        >>> model[0].masks[0].zero_()
        tensor([0., 0.])
        >>> before.changed(Attributes.read(model)), before.different(Attributes.read(model))
        (['0.masks.0'], ['0.masks.0'])
    """

    values: dict[str, Any]
    versions: dict[str, Any]

    @classmethod
    def read(cls, model: nn.Module) -> Attributes:
        """The attributes of a model as they are now."""
        found = _attributes_of(model)
        tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        copies = {name: x.detach().clone() for name, x in tensors.items()}
        # The tensors are held, so that no other one takes the identity of one that is gone.
        versions = {name: (_Same(x), version_of(x)) for name, x in tensors.items()}
        return cls(found | copies, found | versions)

    def changed(self, after: Attributes) -> list[str]:
        """The names of those that were set or written to, or are new."""
        before = self.versions
        return [name for name, x in after.versions.items() if before.get(name) != x]

    def different(self, after: Attributes) -> list[str]:
        """The names of those that have other values."""
        before = self.values
        return [n for n, x in after.values.items() if not _are_equal(before.get(n), x)]


@dataclass(frozen=True)
class _Same:
    """A tensor that equals itself alone."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor


def some_examples(inputs: Any) -> Any:
    """Half of the examples of a set, the last ones first. None if there is one example alone.

    Example:
        >>> some_examples(torch.arange(5))
        tensor([4, 3])
    """
    count = min((len(x) for x in tensors_in(inputs) if x.dim()), default=0)
    if count < 2:
        return None
    return map_tensors(lambda x: x.flip(0)[: count // 2] if x.dim() else x, inputs)


def _attributes_of(model: nn.Module) -> dict[str, Any]:
    """The tensors and numbers that modules hold, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {k: x for k, x in vars(module).items() if k not in REGISTERED}
        _collect_attributes(name, own, found, depth=3)
    return found


def _collect_attributes(name: str, value: Any, found: dict[str, Any], depth: int) -> None:
    if isinstance(value, (Tensor, float, int)):
        found[name] = value
    elif depth:
        for key, x in _parts_of(value):
            _collect_attributes(f"{name}.{key}" if name else str(key), x, found, depth - 1)


def _parts_of(value: Any) -> Iterable[tuple[Any, Any]]:
    """The parts of a container, and the attributes of an object, with their names."""
    if isinstance(value, (list, tuple, deque)):
        return enumerate(value)
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (nn.Module, type, ModuleType)):
        return ()
    return getattr(value, "__dict__", {}).items()


def _are_equal(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and torch.equal(before, after)
    return type(before) is type(after) and before == after
