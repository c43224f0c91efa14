"""The buffers of modules: what a forward pass changes beside its result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import local
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from metaimplicit.stance import compiled_functions
from metaimplicit.tensors import is_transformed, put_back_dead

Result = TypeVar("Result")


@contextmanager
def restored_buffers() -> Iterator[Calls]:
    """Let the modules that are called in the block write to copies of their buffers.

    A call of a module sees what the calls before it in the block have written. After each, the
    module has its own buffers again, to which nothing has written. After the block, tensors that
    vmap left in other attributes of the modules are put back as well. Modules that other threads
    call are left alone. In a block within a block, the inner one alone acts.

    Compiled functions run uncompiled. Hooks that are compiled with a module would be those of one
    block.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with restored_buffers():
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    calls = Calls()
    blocks = _blocks_of_thread()
    with ExitStack() as stack:
        stack.callback(calls.put_back_attributes)
        blocks.append(calls)
        stack.callback(blocks.remove, calls)
        stack.callback(register_module_forward_pre_hook(calls.enter).remove)
        stack.callback(register_module_forward_hook(calls.leave, always_call=True).remove)
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            stack.enter_context(compiled_functions("uncompiled"))
        yield calls


def at_rest(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function whose calls all see the same buffers, and leave them as they were.

    It is for a function that calls the same modules every time: once a call has met no buffers,
    later ones do not look for them.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> _ = at_rest(norm)(torch.randn(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    looks = True

    def call(*args: Any) -> Result:
        nonlocal looks
        if not looks:
            return function(*args)
        with restored_buffers() as calls:
            result = function(*args)
        looks = calls.met_buffers
        return result

    return call


class Calls:
    """Calls of modules in one block."""

    def __init__(self) -> None:
        self._depth = 0  # of calls within calls
        self._trees: dict[nn.Module, _Tree] = {}  # of the modules that were called outermost
        self._entered: list[_Tree] = []  # in this call
        self._own: dict[nn.Module, dict[str, Tensor]] = {}  # buffers of the modules in this call
        # By the id of a buffer: the buffer, so that its id stays its own, and what was written.
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(self, called: nn.Module, _: Any) -> None:
        """Give the module and those in it copies of their buffers."""
        if not self._is_innermost():
            return
        self._depth += 1
        if any(called in tree.attributes for tree in self._entered):
            return
        if called not in self._trees:
            self._trees[called] = _Tree.of(called)
        tree = self._trees[called]
        self._entered.append(tree)
        for module in tree.with_buffers():
            if module not in self._own:
                present = vars(module)["_buffers"]
                own = {name: x for name, x in present.items() if isinstance(x, Tensor)}
                self._own[module] = own
                present.update({name: self._copy_of(x) for name, x in own.items()})

    def leave(self, *_: Any) -> None:
        """After the outermost call, give the modules their own buffers back."""
        if not self._is_innermost():
            return
        self._depth -= 1
        if self._depth == 0:
            for module, own in self._own.items():
                present = vars(module)["_buffers"]
                for name, buffer in own.items():
                    self._keep(buffer, present.get(name))
                present.update(own)
            self._own.clear()
            self._entered.clear()

    @property
    def met_buffers(self) -> bool:
        """Whether a module that was called has buffers."""
        return any(tree.with_buffers() for tree in self._trees.values())

    def _is_innermost(self) -> bool:
        """Whether no other block has begun within this one, and this thread runs it."""
        blocks = _blocks_of_thread()
        return bool(blocks) and blocks[-1] is self

    def put_back_attributes(self) -> None:
        """Put back the attributes in which vmap has left a tensor."""
        for tree in self._trees.values():
            for module, attributes in tree.attributes.items():
                put_back_dead(vars(module), attributes)

    def _copy_of(self, buffer: Tensor) -> Tensor:
        _, copied = self._written.get(id(buffer), (buffer, None))
        if copied is None:
            copied = buffer.clone()
            self._keep(buffer, copied)  # for other modules that have this buffer
        return copied

    def _keep(self, buffer: Tensor, written: Any) -> None:
        """Remember what a call has left in the place of a buffer, unless a transform ends it."""
        if isinstance(written, Tensor) and not is_transformed(written):
            self._written[id(buffer)] = (buffer, written)


class _Tree(NamedTuple):
    """A module and those in it.

    Attributes:
        attributes: What each of them held before the first call.
    """

    attributes: dict[nn.Module, dict[str, Any]]

    @classmethod
    def of(cls, root: nn.Module) -> _Tree:
        return cls({module: dict(vars(module)) for module in root.modules()})

    def with_buffers(self) -> list[nn.Module]:
        """The modules that have any at present. Python does not hold those of scripted ones."""
        return [
            module
            for module in self.attributes
            if not isinstance(module, torch.jit.ScriptModule) and vars(module)["_buffers"]
        ]


_thread = local()


def _blocks_of_thread() -> list[Calls]:
    """The blocks of this thread, of which only the innermost sees calls."""
    if not hasattr(_thread, "blocks"):
        _thread.blocks = []
    blocks: list[Calls] = _thread.blocks
    return blocks


def stored_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state of a module, as in its `state_dict`.

    Example:
        >>> list(stored_buffers(nn.BatchNorm1d(2)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    temporary = {
        f"{path}.{name}".removeprefix(".")
        for path, part in module.named_modules()
        for name in getattr(part, "_non_persistent_buffers_set", ())
    }
    return {name: x for name, x in module.named_buffers() if name not in temporary}


def load_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers of a module, which keep their device and type.

    A buffer of another shape is replaced. Those that the module does not have are left out.

    Args:
        module: The module.
        buffers: The values by the names of `module.named_buffers()`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> load_buffers(norm, {"running_mean": torch.ones(2)})
        >>> norm.running_mean
        tensor([1., 1.])
    """
    present = dict(module.named_buffers())
    for path, value in buffers.items():
        buffer = present.get(path)
        if buffer is None:
            continue
        if buffer.shape == value.shape:
            buffer.detach().copy_(value)
        else:
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, value.to(buffer))
