"""Whether a tensor has been written to since it was last looked at."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from metaimplicit.tensors import is_transformed

MAX_BYTES = 80_000  # of a tensor that is compared by value: more than class weights have


def version_of(tensor: Tensor) -> tuple[int, bytes | None]:
    """What differs once the tensor has been written to: torch's count of that, and its numbers.

    The count misses `.data`, inference mode, and arrays that share the memory. The numbers are read
    of small tensors on the CPU alone, as bytes of their memory.

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
    if tensor.device.type != "cpu" or not is_plain:
        return count, None
    memory = tensor.untyped_storage()
    if memory.nbytes() > MAX_BYTES:
        return count, None
    # No operation of torch is called, because one within a transform has no numbers to read.
    return count, ctypes.string_at(memory.data_ptr(), memory.nbytes())
