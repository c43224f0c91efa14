"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from torch.utils._pytree import tree_leaves

PARTIAL = ".partial"


def write_atomically(
    path: Path,
    write: Callable[[IO[bytes]], object],
    *,
    keep: Path | None = None,
    before_rename: Callable[[], object] | None = None,
) -> None:
    """Write a file so that readers see the old file or the new one, never a part of it.

    A temporary file in the same folder is filled, flushed to disk and renamed. Missing folders are
    made. If `write` raises, the temporary file is removed and the old file stays. An `OSError`
    names the file.

    Args:
        path: The file.
        write: It receives the temporary file, open for writing bytes.
        keep: Where the old file goes, in the same folder. If None, it is overwritten.
        before_rename: Called when the file is on the disk and has not yet taken its name, to bring
            there what it relies on.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.txt")
        ...     write_atomically(path, lambda file: file.write(b"text"))
        ...     path.read_text()
        'text'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(
        dir=path.parent,
        prefix=f".{path.name}-",
        suffix=PARTIAL,
    )
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp gives no rights to anybody else
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        if error.errno is not None and error.filename is None:  # as where the disk is full
            error.filename = str(path)
        raise
    except BaseException:
        _remove(partial)
        raise


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of `write_atomically` that a killed process left in a folder.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, ".checkpoint.pt-ab12.partial").touch()
        ...     remove_partial_files(Path(folder))
        ...     os.listdir(folder)
        []
    """
    for path in folder.glob(f".*-*{PARTIAL}"):
        path.unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Where a file goes when the next version of it is written.

    Example:
        >>> previous(Path("checkpoint.pt")).name
        'checkpoint-previous.pt'
    """
    return path.with_stem(f"{path.stem}-previous")


def set_aside(path: Path) -> Path:
    """Rename a file to one with the suffix .damaged, .damaged-2, …, and return its new path.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "checkpoint.pt")
        ...     path.touch()
        ...     set_aside(path).name
        'checkpoint.pt.damaged'
    """
    aside = path.with_name(f"{path.name}.damaged")
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.damaged-{count}")
    os.replace(path, aside)
    return aside


def json_types(argument: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in the types that JSON has: tuples, arrays and tensors as lists or numbers.

    Args:
        argument: What they are, for the message.
        values: Values by name.

    Raises:
        ValueError: A value is of another type, such as a path, or holds NaN or Inf.

    Example:
        >>> import numpy as np
        >>> json_types("config", {"seed": np.int64(3), "shape": (2, 5)})
        {'seed': 3, 'shape': [2, 5]}
    """

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise ValueError(
            f"{argument}: got a {type(value).__name__}, expected types that JSON has; "
            "give a string in its place"
        )

    converted: dict[str, Any] = json.loads(json.dumps(dict(values), default=plain))
    for name, value in converted.items():
        numbers = [x for x in tree_leaves(value) if isinstance(x, float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"{argument}: got NaN or Inf in {name!r}, expected numbers that JSON has; "
                "give a string in its place"
            )
    return converted


def write_json(path: str | Path, data: Any) -> None:
    """Write strict JSON atomically.

    Raises:
        ValueError: The data holds NaN or Inf, which JSON cannot express.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.json")
        ...     write_json(path, {"x": 1})
        ...     read_json(path)
        {'x': 1}
    """
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not valid JSON.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.json")
        ...     _ = path.write_text("[1, 2]")
        ...     read_json(path)
        [1, 2]
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is not JSON")

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: got damaged JSON ({error}), expected what a run wrote; restore or delete it"
        ) from error


def _keep(path: Path, keep: Path) -> None:
    """Give a file a second name, so that it has its own until another file takes that."""
    keep.unlink(missing_ok=True)
    try:
        os.link(path, keep)
    except OSError:  # Some file systems have no second names.
        os.replace(path, keep)


def _remove(partial: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
