"""A process that asks for more memory than there is fails, rather than being killed."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory.max")


def limit_memory() -> None:
    """Limit the data of this process to the memory of the machine, or of its container.

    Linux grants more memory than there is, and kills a process that uses it, without a word. Within
    the limit, the allocation fails, and the error names it.
    """
    if sys.platform != "linux":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    memory = physical_memory()
    if soft == resource.RLIM_INFINITY or soft > memory:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


def physical_memory() -> int:
    """The bytes of memory that processes here share."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(CGROUP.read_text()))
    except (OSError, ValueError):  # there is no limit
        return machine
