"""One writer: a folder that one process writes to is refused to all others."""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metaimplicit.training.files import remove_partial_files

LOCK = ".lock"
held_folders: dict[Path, tuple[int, int]] = {}  # the thread and the lock file's descriptor


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within the block, no other process (nor thread) can be the writer of a folder.

    The system lets go of the lock (flock) when the process ends, however it ends. The file .lock
    says who holds it. The folder is made if it does not exist. Files that a killed writer left half
    written are removed. A thread may enter again.

    Args:
        folder: The folder.

    Raises:
        FileExistsError: Another process or thread writes to the folder.
        OSError: The folder cannot be made, or not be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with only_writer(Path(folder)):
        ...         sorted(os.listdir(folder))
        ['.lock']
    """
    real = folder.resolve()
    thread = threading.get_ident()
    if real in held_folders and held_folders[real][0] == thread:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(lock, folder)
        held_folders[real] = (thread, lock)
        try:
            remove_partial_files(folder)
            yield
        finally:
            del held_folders[real]
    finally:
        os.close(lock)


def _acquire(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
        raise FileExistsError(
            f"out: {folder} is being written to by {holder}; wait until it ends, stop it, or name "
            "another folder"
        ) from None
    except OSError as error:
        # Some network file systems have no locks. A run there is better than none.
        warnings.warn(f"{folder}: nothing keeps other runs out ({error})", stacklevel=4)
    command = shlex.join(sys.argv)[:200]
    holder = f"process {os.getpid()} on {socket.gethostname()} ({command})"
    os.truncate(lock, 0)
    os.pwrite(lock, holder.encode(errors="replace"), 0)


def _release_in_child() -> None:
    """A forked worker shares its parent's locks, which would outlive the parent with it."""
    for _, lock in held_folders.values():
        os.close(lock)
    held_folders.clear()


os.register_at_fork(after_in_child=_release_in_child)
