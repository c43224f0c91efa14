"""The options --device and --threads."""

from __future__ import annotations

import torch

from metaimplicit.training import keep_freed_memory


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


def set_up_cpu(threads: int | None) -> None:
    """Let torch use a number of threads, and keep freed memory, which makes steps faster.

    Args:
        threads: The number of threads. If None, torch's own choice.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
