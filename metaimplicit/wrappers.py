"""Models that are wrapped for several devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel


def reject_distributed(model: nn.Module) -> None:
    """Raise ValueError if a part of the model averages gradients over processes by itself.

    It averages those of its own backward pass. The meta-gradient is none of these, and neither is
    the gradient that a second-order optimiser takes.

    Example:
        >>> reject_distributed(nn.Linear(1, 1))
    """
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            where = f" {name!r}" if name else ""
            raise ValueError(
                f"model: got{where} {type(module).__name__}, which averages the gradients of its "
                "own backward pass alone, expected the module in it; use .module, and average the "
                "gradients over the processes, by torch.distributed.all_reduce"
            )


@contextmanager
def reject_distributed_calls() -> Iterator[None]:
    """Raise ValueError within the block where a module is called that averages gradients itself.

    Example:
        >>> with reject_distributed_calls():
        ...     _ = nn.Linear(1, 1)
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    thread = get_ident()

    def check(module: nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel) and get_ident() == thread:
            reject_distributed(module)

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
