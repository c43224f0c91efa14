"""The options --device and --threads."""

from __future__ import annotations

import time
from collections.abc import Callable

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


def choose_threads(step: Callable[[], object]) -> int:
    """Time a step with one CPU thread and with torch's own number, and keep the better number.

    Threads wait for one another at each operation. On a machine whose cores are busy, several
    threads can take many times as long as one. So they have to save a tenth of the time at least.

    Args:
        step: The computation.

    Returns:
        The number of threads, which torch uses from now on.
    """
    several = torch.get_num_threads()
    if several == 1:
        return 1
    alone = _shortest_time(step, threads=1)
    together = _shortest_time(step, threads=several)
    chosen = several if together < 0.9 * alone else 1
    torch.set_num_threads(chosen)
    print(
        f"threads: {chosen} (a meta-step takes {alone:.3g} s with 1 thread, {together:.3g} s with "
        f"{several}; --threads sets another number)"
    )
    return chosen


def _shortest_time(step: Callable[[], object], threads: int) -> float:
    """The time of the second and third of three calls that is shorter. The first warms caches."""
    torch.set_num_threads(threads)
    step()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)
