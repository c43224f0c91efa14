"""The option --device."""

from __future__ import annotations

import torch


def find_device(name: str) -> torch.device:
    """The device that `--device` names. "auto" is CUDA if there is any, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: got {name!r}, expected auto, cpu or a CUDA device ({reason})"
        ) from error
    return device
