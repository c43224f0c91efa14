"""What a script needs, checked before any work."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def require_package(name: str, *, purpose: str, extra: str) -> None:
    """Check that an optional package is installed.

    Raises:
        ImportError: It is not. The message names what needs it, and the extra that brings it.
    """
    if find_spec(name) is None:
        raise ImportError(f'{purpose}: found no package {name}; pip install -e ".[{extra}]"')


def require_writable(path: Path) -> None:
    """Check that a file can be written. The folders above it may have to be made.

    Raises:
        OSError: It cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: got a folder, expected the name of a file")
    if path.exists() and not path.is_file():  # a device may have no end
        raise OSError(f"{path}: got a device, expected the name of a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {folder} is a file, expected a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: {folder} cannot be written to, expected a folder that can")
