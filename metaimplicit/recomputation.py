"""What torch computes again, or keeps, at other parameters than those of the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from metaimplicit.captured import captured
from metaimplicit.scoped import ScopedSettings

# What `checkpoint` calls to remember a function for the backward pass: the first one in torch 2.11,
# the second one in torch 2.14.
NAMES = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
TABLES = ("_parameters", "_buffers")  # of a module, which `torch.func.functional_call` fills
Table = dict[str, Any]


class _Settings(NamedTuple):
    """What torch computes again, and what it does not.

    Attributes:
        functions: Those that remember a function for the backward pass, by name.
        cached_blocks: How many blocks of `torch.nn.utils.parametrize.cached` are open.
        cached_weights: The weights that they keep.
    """

    functions: dict[str, Callable[..., Any]]
    cached_blocks: int
    cached_weights: dict[Any, Any]

    @classmethod
    def read(cls) -> _Settings:
        functions = {name: getattr(checkpoint, name) for name in NAMES if hasattr(checkpoint, name)}
        return cls(functions, parametrize._cache_enabled, parametrize._cache)

    def apply(self) -> None:
        for name, function in self.functions.items():
            setattr(checkpoint, name, function)
        parametrize._cache_enabled = self.cached_blocks
        parametrize._cache = dict(self.cached_weights)


def with_present_tensors(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function, whose modules have at each call the parameters and buffers that they have now.

    A method evaluates a model at other parameters than its own, and puts its own back. What is
    computed again in the backward pass would see the latter.

    Args:
        function: A module, a method of one, or a function that sees modules.
        args: Arguments that it is called with, which may be modules, too.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> run = with_present_tensors(layer)
        >>> layer.weight = nn.Parameter(torch.zeros(1, 1))
        >>> run(torch.ones(1)), layer(torch.ones(1))
        (tensor([1.], grad_fn=<...>), tensor([0.], grad_fn=<...>))
    """
    modules = {id(m): m for part in _modules_of(function, args) for m in part.modules()}
    tables: list[Table] = [vars(m)[kind] for m in modules.values() for kind in TABLES]
    present = [dict(table) for table in tables]

    def call(*args: Any, **kwargs: Any) -> Any:
        latest = [dict(table) for table in tables]
        _fill(tables, present)
        try:
            return function(*args, **kwargs)
        finally:
            _fill(tables, latest)

    return call


def _modules_of(function: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[nn.Module]:
    """The modules that a function is, belongs to, receives or sees."""
    seen = [value for _, value in captured(function)]
    owner = getattr(function, "__self__", None)
    for value in tree_leaves((function, owner, args, seen)):
        if isinstance(value, nn.Module):
            yield value


def _fill(tables: list[Table], contents: list[dict[str, Tensor | None]]) -> None:
    for table, content in zip(tables, contents, strict=True):
        table.update(content)


def _with_tensors(remember: Callable[..., Any]) -> Callable[..., Any]:
    """The same, which remembers the function with the tensors that its modules have then."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return remember(with_present_tensors(function, *args), *args, **kwargs)

    return call


def _make_settings() -> _Settings:
    functions = {name: _with_tensors(f) for name, f in _Settings.read().functions.items()}
    return _Settings(functions, cached_blocks=0, cached_weights={})


# A block in which each call computes at the parameters that it is given. In the backward pass,
# `torch.utils.checkpoint(…, use_reentrant=False)` computes again at those of its forward pass, also
# outside of the block. A block of `torch.nn.utils.parametrize.cached` that is open around this one
# keeps no weights in it.
mended_recomputation = ScopedSettings(_make_settings())
