"""Whether a tensor has been written to since it was last looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from metaimplicit.tuning.trial_outputs import is_transformed

MAX_NUMBERS = 10_000  # of a tensor that is compared by value: more than there are classes


def version_of(tensor: Tensor) -> tuple[int, bytes | None]:
    """What differs once the tensor has been written to: torch's count of that, and its numbers.

    The count misses `.data`, inference mode, and arrays that share the memory. The numbers are read
    of small tensors on the CPU alone.

    Example:
        >>> x = torch.zeros(2)
        >>> before = version_of(x)
        >>> x.data.add_(1)
        tensor([1., 1.])
        >>> version_of(x) == before
        False
    """
    count = 0 if tensor.is_inference() else tensor._version
    is_plain = tensor.layout == torch.strided and not is_transformed(tensor)
    if tensor.device.type != "cpu" or tensor.numel() > MAX_NUMBERS or not is_plain:
        return count, None
    return count, tensor.detach().flatten().view(torch.uint8).numpy().tobytes()
