"""How the C library allocates the memory of tensors on the CPU."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next ones.

    By default, glibc returns each large block to the system when it is freed, and the system clears
    all pages of the next one. A step of a convolutional network spends about a third of its time on
    that. The process keeps its largest size instead. The setting holds for the whole process, and
    does not change any number.

    Returns:
        Whether it took effect, which it does with glibc.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False  # another C library
    without_mmap: int = mallopt(M_MMAP_MAX, 0)
    untrimmed: int = mallopt(M_TRIM_THRESHOLD, LARGEST)
    return without_mmap == untrimmed == 1
