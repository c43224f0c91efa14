"""Rows of results that survive the process: stored one by one, and not measured twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line.requirements import require_writable
from metaimplicit.training import read_json, write_json

Row = dict[str, Any]  # in types that JSON has


class RowFile:
    """The rows in a JSON file, which is replaced as soon as a row is done.

    A row begins with its case: what was asked for. A second call that asks for the same gets the
    stored row. Rows of other cases stay in the file, also those of another process.

    Args:
        path: The file. If None, nothing is stored.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[Row] = []
        if path is not None:
            require_writable(path)
            self._rows = _read_rows(path)

    def read_or_make(self, case: Row, make: Callable[[], Row]) -> Row:
        """The stored row of a case. If there is none, make it and store it."""
        for row in self._rows:
            if case.items() <= row.items():
                return row
        made = case | make()
        if self._path is not None:
            # Meanwhile, another process may have stored rows.
            self._rows = _read_rows(self._path)
        self._rows.append(made)
        if self._path is not None:
            write_json(self._path, {"rows": self._rows})
        return made


def _read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    stored = read_json(path)
    rows = stored.get("rows") if isinstance(stored, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"--out: got {path}, which holds no rows, expected a new file or one with rows that "
            "this script wrote; name another one"
        )
    return rows
