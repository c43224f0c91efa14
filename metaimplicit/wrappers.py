"""Models that are wrapped for several devices."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

AVERAGE_AFTER_BACKWARD = (
    "average .grad over the processes after backward, by torch.distributed.all_reduce"
)
AVERAGE_HYPERGRADIENTS = (
    "average the grads of hypergradient() over the processes by torch.distributed.all_reduce, "
    "and move meta by an optimiser of torch"
)


def reject_distributed(model: nn.Module, remedy: str = AVERAGE_AFTER_BACKWARD) -> None:
    """Raise ValueError if a part of the model averages gradients over processes by itself.

    It averages those of its own backward pass. The meta-gradient is none of these.

    Args:
        model: The model.
        remedy: How to average the meta-gradients.

    Example:
        >>> reject_distributed(nn.Linear(1, 1))
    """
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            where = f" {name!r}" if name else ""
            raise ValueError(
                f"model: got{where} {type(module).__name__}, which does not average the gradients "
                f"of a learner, expected the module in it; use .module, and {remedy}"
            )
