"""States read from bytes that hold numbers and no code: those of torch, and of NumPy."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import torch


def load_plain(data: bytes, device: torch.device | str) -> Any:
    """What `torch.save` wrote: containers of tensors, numbers, strings and arrays of NumPy.

    Numbers of NumPy come into states by themselves, such as a learning rate of `np.logspace`.

    Args:
        data: The bytes.
        device: Where the tensors go.

    Raises:
        ValueError: The bytes are damaged, or hold something else, which would run code.

    Example:
        >>> buffer = io.BytesIO()
        >>> torch.save({"lr": np.float64(0.1)}, buffer)
        >>> float(load_plain(buffer.getvalue(), "cpu")["lr"])
        0.1
    """
    try:
        with torch.serialization.safe_globals(_numpy_makers()):
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:  # the bytes decide which one
        # torch advises to load the file without this check, which would run its code.
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {name[1]}" if name else str(error).partition("\n")[0]
        raise ValueError(reason) from error


def _numpy_makers() -> list[Any]:
    """What makes numbers and arrays of NumPy from their bytes, except arrays of objects."""
    make_number = np.float64(0).__reduce__()[0]
    make_array = np.zeros(0).__reduce__()[0]
    codes = set(np.typecodes["All"]) - {"O"}
    types = {type(np.dtype(code)) for code in codes}
    return [np.dtype, np.ndarray, make_number, make_array, *types]
