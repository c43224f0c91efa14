"""The peak of the memory that tensors take."""

from __future__ import annotations

from typing import Any

import torch
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
            # The result of a view or an in-place operation has the storage of an input, whose size
            # may be another now.
            if address not in of_inputs or address in self._live:
                self._live[address] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


# The methods that return the parts of a sparse tensor, by its layout.
_BY_ROWS = ("crow_indices", "col_indices", "values")
_BY_COLUMNS = ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}


def _storages(tree: Any) -> dict[int, UntypedStorage]:
    """The storages of all tensors in a pytree, by address."""
    storages = []
    for tensor in tensors_in(tree):
        parts = [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())]
        storages += [part.untyped_storage() for part in parts or [tensor]]
    return {storage._cdata: storage for storage in storages}
