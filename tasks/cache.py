"""Arrays that are slow to make, kept on disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
    """`$METAIMPLICIT_CACHE`, or else `metaimplicit` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    if chosen := os.environ.get("METAIMPLICIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metaimplicit"


def load_or_build(name: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `build()`, from `name`.npz in the cache folder where that is whole, else built and saved there.

    The file appears complete or not at all. A damaged one is built anew; where nothing can be written the arrays are
    only returned. Put a version in `name`: a file is never checked against the code that made it.
    """
    path = cache_dir() / f"{name}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged
    arrays = build()
    with contextlib.suppress(OSError):  # a read-only or full disk costs time, not the run
        _save(path, arrays)
    return arrays


def _save(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the keys for its options
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
