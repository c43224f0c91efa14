"""Slow work is done once and shows its progress: arrays kept on disk, and downloads."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")


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


def load_or_build(name: str, build: Callable[[], Arrays]) -> Arrays:
    """Load `name`.npz from the cache folder, or build its arrays and save them there.

    The file appears complete or not at all, and a damaged file is built again. If nothing can be
    written, the arrays are returned all the same.

    Args:
        name: The file's name without its suffix. Put a version in it, because a file is not
            compared with the code that built it.
        build: Called without arguments if there is no readable file.

    Returns:
        The arrays of `build()`, by name.
    """
    path = cache_dir() / f"{name}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # The file is absent or damaged.
    arrays = build()
    # A read-only or full disk costs time, but does not end the run.
    with contextlib.suppress(OSError):
        _save(path, arrays)
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


def _save(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # NumPy's type stub takes the names of the arrays for options.
    save: Callable[..., None] = np.savez_compressed
    handle, partial = tempfile.mkstemp(
        dir=path.parent,
        prefix=path.stem,
        suffix=".partial",
    )
    try:
        with os.fdopen(handle, "wb") as file:
            save(file, **arrays)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
