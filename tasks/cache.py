"""Slow work is done once and shows its progress: arrays kept on disk, and downloads.

A file of arrays is laid out so that it can be mapped into memory:

    CRC-32 of the rest | JSON: name and stamp; type, shape and place of each array | arrays
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from tqdm import tqdm

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")

ALIGNMENT = 64  # bytes: every array starts at a multiple
CHECKSUM_SIZE = 4  # bytes
ABANDONED = 3600  # seconds: no file takes as long to write


def cache_dir() -> Path:
    """The folder that holds arrays and downloads. It need not exist yet.

    It is `$METAIMPLICIT_CACHE` if that is set, else `$XDG_CACHE_HOME/metaimplicit`, else
    `~/.cache/metaimplicit`.

    Example:
        >>> import os
        >>> os.environ["METAIMPLICIT_CACHE"] = "/tmp/arrays"
        >>> cache_dir().as_posix()
        '/tmp/arrays'
        >>> del os.environ["METAIMPLICIT_CACHE"]
    """
    if chosen := os.environ.get("METAIMPLICIT_CACHE"):
        return Path(chosen).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "metaimplicit"


def load_or_build(name: str, build: Callable[[], Arrays], stamp: str = "") -> Arrays:
    """Load the arrays called `name` from the cache folder, or build them and save them there.

    The file appears complete or not at all. It is read whole and compared with its
    checksum. If a single bit differs, or it is the file of another name or stamp, the arrays are
    built again. If nothing can be written, the arrays are returned all the same.

    Args:
        name: The file's name without its suffix. Put a version in it, because a file is not
            compared with the code that built it.
        build: Called without arguments if there is no whole file. Arrays hold numbers or strings.
        stamp: What the arrays were made of, such as `Files.stamp` of their sources.

    Returns:
        The arrays of `build()`, by name. They are mapped from the file, so that only what is read
        takes memory. What is written to them stays in this process.
    """
    path = cache_dir() / f"{name}.arrays"
    with contextlib.suppress(OSError, ValueError):  # The file is absent or damaged.
        return _load(path, stamp)
    with torch.device("cpu"):  # whatever the default device is
        arrays = build()
    # A read-only or full disk costs time, but does not end the run.
    with contextlib.suppress(OSError, ValueError):
        _save(path, stamp, arrays)
        return _load(path, stamp)
    return arrays


def download(name: str, fetch: Callable[[], Any], by_hand: str) -> None:
    """Call `fetch`, and if it fails, say how to get the data by hand.

    Args:
        name: The data set, for the message.
        fetch: Downloads the data.
        by_hand: An instruction to put named files into a folder.

    Raises:
        FileNotFoundError: If `fetch` raises an ImportError, OSError or RuntimeError.
    """
    try:
        fetch()
    except (ImportError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name}: could not download it ({error}); {by_hand} and name that as data_root"
        ) from error


def progress(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
) -> Iterable[Item]:
    """The same items, with a progress bar on a terminal that disappears at the end.

    Args:
        items: Anything to iterate over.
        description: What stands beside the bar.
        total: The number of items. If None, `len(items)`, where there is one.
    """
    return tqdm(items, desc=description, total=total, leave=False, disable=None)


def _save(path: Path, stamp: str, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, partial = tempfile.mkstemp(
        dir=path.parent,
        prefix=path.stem,
        suffix=".partial",
    )
    try:
        with os.fdopen(handle, "w+b") as file:
            _write(file, [path.name, stamp], arrays)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed have left of a file."""
    for partial in path.parent.glob(f"{path.stem}*.partial"):
        if time.time() - partial.stat().st_mtime > ABANDONED:
            partial.unlink(missing_ok=True)


def _write(file: BinaryIO, identity: list[str], arrays: Arrays) -> None:
    places = {}
    stop = 0
    for key, array in arrays.items():
        start = -(-stop // ALIGNMENT) * ALIGNMENT
        places[key] = (array.dtype.str, array.shape, start)
        stop = start + array.nbytes
    header = json.dumps({"identity": identity, "arrays": places}).encode() + b"\n"
    # JSON may begin with blanks. They move the arrays to a multiple, too.
    file.write(bytes(CHECKSUM_SIZE) + b" " * (-(CHECKSUM_SIZE + len(header)) % ALIGNMENT) + header)

    first = file.tell()
    file.truncate(first + stop)  # an empty array may begin after all that is written
    for (_, _, start), array in zip(places.values(), arrays.values(), strict=True):
        file.seek(first + start)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    checksum = _checksum(file)
    file.seek(0)
    file.write(checksum)


def _load(path: Path, stamp: str) -> Arrays:
    """The arrays in a file. A ValueError says that it is not what `_save` wrote there."""
    with path.open("rb") as file:
        if file.read(CHECKSUM_SIZE) != _checksum(file):
            raise ValueError(f"{path}: got another checksum than that of its content")
        file.seek(CHECKSUM_SIZE)
        header = json.loads(file.readline())
        if header["identity"] != [path.name, stamp]:
            raise ValueError(f"{path}: got the content of {header['identity']}")
        first = file.tell()
        # A private map: what is written to an array does not reach the file.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        key: np.ndarray(
            shape,
            np.dtype(dtype),
            buffer=content,
            offset=first + start,
        )
        for key, (dtype, shape, start) in header["arrays"].items()
    }


def _checksum(file: BinaryIO) -> bytes:
    """The CRC-32 of everything in a file after the place of the checksum.

    It differs if any bit, or any 32 bits in a row, differ. It takes 0.3 s for each GiB or so.
    """
    file.seek(CHECKSUM_SIZE)
    checksum = 0
    while block := file.read(2**20):
        checksum = zlib.crc32(block, checksum)
    return checksum.to_bytes(CHECKSUM_SIZE, "little")
