"""The peak of the memory that tensors take."""

from __future__ import annotations

from typing import Any

from torch import UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from metaimplicit.tensors import tensors_in


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of all tensors that were made in the `with` block and live at once.

    Storages are counted after every operation, on any device, so every run gives the same number.
    The workspace that a kernel frees before its operation ends is not counted. Everything in the
    block runs slower, so do not time it.

    Attributes:
        peak: The largest number of bytes so far.

    Example:
        >>> import torch
        >>> with LiveBytes() as memory:
        ...     x = torch.zeros(1000)
        >>> memory.peak
        4000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        # By address: a reference to the storage, and its bytes.
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_inputs = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))

        for address, (reference, _) in list(self._live.items()):
            if reference.expired():
                del self._live[address]
        for address, storage in _storages(result).items():
            # The result of a view or an in-place operation has the storage of an input.
            if address not in of_inputs:
                self._live[address] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(tree: Any) -> dict[int, UntypedStorage]:
    """The storages of all tensors in a pytree, by address."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(tree)]
    return {storage._cdata: storage for storage in storages}
