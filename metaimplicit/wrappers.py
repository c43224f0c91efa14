"""Models that a learner cannot train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from threading import get_ident
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

AVERAGE_AFTER_BACKWARD = (
    "average .grad over the processes after backward, by metaimplicit.learner.Ranks for a "
    "MetaLearner, else by torch.distributed.all_reduce"
)
AVERAGE_HYPERGRADIENTS = (
    "average the grads of hypergradient() over the processes by torch.distributed.all_reduce, "
    "and move meta by an optimiser of torch"
)


def reject_distributed(model: nn.Module, remedy: str = AVERAGE_AFTER_BACKWARD) -> None:
    """Raise ValueError if a part of the model averages gradients over processes by itself.

    It averages those of its own backward pass. The meta-gradient is none of these. What is no
    module is refused as well.

    Args:
        model: The model.
        remedy: How to average the meta-gradients.

    Example:
        >>> reject_distributed(nn.Linear(1, 1))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: got {model!r}, expected a torch.nn.Module, such as nn.Linear(4, 2)"
        )
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            where = f" {name!r}" if name else ""
            raise ValueError(
                f"model: got{where} {type(module).__name__}, which does not average the gradients "
                f"of a learner, expected the module in it; use .module, and {remedy}"
            )


def reject_complex(params: Mapping[str, Tensor]) -> None:
    """Raise ValueError for parameters that are complex numbers.

    Example:
        >>> import torch
        >>> reject_complex({"w": torch.ones(1) + 0j})
        Traceback (most recent call last):
        ...
        ValueError: model: got the parameter 'w' in torch.complex64, expected real numbers; keep \
torch.view_as_real of it, and use torch.view_as_complex in the model
    """
    for name, p in params.items():
        if p.is_complex():
            raise ValueError(
                f"model: got the parameter {name!r} in {p.dtype}, expected real numbers; keep "
                "torch.view_as_real of it, and use torch.view_as_complex in the model"
            )


def reject_inference_tensors(model: nn.Module) -> None:
    """Raise ValueError for a model that was made within `torch.inference_mode`.

    Autograd can record none of its tensors, the frozen ones included.

    Example:
        >>> import torch
        >>> with torch.inference_mode():
        ...     model = nn.Linear(1, 1)
        >>> reject_inference_tensors(model)
        Traceback (most recent call last):
        ...
        ValueError: model: got 'weight' from within torch.inference_mode, expected a tensor that \
autograd can record; build, load and move the model outside of that mode, or within torch.no_grad
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"model: got {name!r} from within torch.inference_mode, expected a tensor that "
                "autograd can record; build, load and move the model outside of that mode, or "
                "within torch.no_grad"
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
