"""The buffers of modules: what a forward pass changes beside its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from metaimplicit.tensors import is_transformed, put_back_dead


@contextmanager
def restored_buffers() -> Iterator[None]:
    """Let the modules that are called in the block write to copies of their buffers.

    As a decorator, `restored_buffers()(function)` does so in each call of the function. A call of a
    module sees what the calls before it in the block have written. After each, the module has its
    own buffers again, to which nothing has written. After the block, tensors that vmap left in
    other attributes of the modules are put back as well. Other threads are left alone.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with restored_buffers():
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    calls = _Calls()
    with ExitStack() as stack:
        stack.callback(calls.put_back_attributes)
        stack.callback(register_module_forward_pre_hook(calls.enter).remove)
        stack.callback(register_module_forward_hook(calls.leave, always_call=True).remove)
        yield


class _Calls:
    """Calls of modules in one block and thread."""

    def __init__(self) -> None:
        self._thread = get_ident()
        self._depth = 0  # of calls within calls
        self._own: dict[nn.Module, dict[str, Tensor]] = {}  # buffers of the modules in this call
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a buffer and its copy
        self._attributes: dict[nn.Module, dict[str, Any]] = {}  # before the first call

    def enter(self, called: nn.Module, _: Any) -> None:
        """Give the module and those in it copies of their buffers."""
        if get_ident() != self._thread:
            return
        self._depth += 1
        for module in called.modules():
            # The buffers of a scripted module are not in Python's hands.
            if module not in self._own and not isinstance(module, torch.jit.ScriptModule):
                self._attributes.setdefault(module, dict(vars(module)))
                present = vars(module)["_buffers"]
                own = {name: x for name, x in present.items() if isinstance(x, Tensor)}
                self._own[module] = own
                present.update({name: self._copy_of(x) for name, x in own.items()})

    def leave(self, *_: Any) -> None:
        """After the outermost call, give the modules their own buffers back."""
        if get_ident() != self._thread:
            return
        self._depth -= 1
        if self._depth == 0:
            for module, own in self._own.items():
                present = vars(module)["_buffers"]
                for name, buffer in own.items():
                    self._keep(buffer, present.get(name))
                present.update(own)
            self._own.clear()

    def put_back_attributes(self) -> None:
        """Put back the attributes in which vmap has left a tensor."""
        for module, attributes in self._attributes.items():
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


def load_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers of a module, which keep their device and type.

    A buffer of another shape is replaced.

    Args:
        module: The module.
        buffers: The values by the names of `module.named_buffers()`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> load_buffers(norm, {"running_mean": torch.ones(2)})
        >>> norm.running_mean
        tensor([1., 1.])
    """
    for path, value in buffers.items():
        buffer = module.get_buffer(path)
        if buffer.shape == value.shape:
            buffer.detach().copy_(value)
        else:
            owner, _, name = path.rpartition(".")
            setattr(module.get_submodule(owner), name, value.to(buffer))
