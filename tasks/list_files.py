"""Files that list the images or the classes of one part of a split: CSV, text and JSON."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.files import Files

PARTS = ("train", "val", "test")
# What the parts are called, in small letters without what joins words.
PART_WORDS = {
    **dict.fromkeys(("train", "training", "base", "metatrain"), 0),
    **dict.fromkeys(("val", "valid", "validation", "metaval", "metavalid", "metavalidation"), 1),
    **dict.fromkeys(("test", "testing", "novel", "metatest"), 2),
}

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}  # of the columns of a CSV list
CSV_LISTS = tuple(f"{part}.csv" for part in PARTS)

Row = tuple[str, str, str]  # where a row stands, a filename, a label
Line = tuple[str, str]  # where a line stands, the name of a class


@dataclass(frozen=True)
class PartList:
    """What a file lists for one part of a split.

    Args:
        part: The position of the part in `PARTS`.
        path: The file.
        rows: Images with their labels, or None if it does not list images.
        lines: Classes. Empty if it lists images.
    """

    part: int
    path: str
    rows: list[Row] | None
    lines: list[Line]


def part_called(name: str) -> int | None:
    """The position in `PARTS` of the part that a file or folder is called after.

    Example:
        >>> part_called("Meta-Train"), part_called("novel"), part_called("cats")
        (0, 2, None)
    """
    return PART_WORDS.get(re.sub(r"[-_ ]", "", name.lower()))


def plain_name(name: str) -> str:
    """The name without what the eye does not see: outer and repeated blanks, forms of accents.

    Files of one data set often differ in these.

    Example:
        >>> plain_name(" polar  bear ")
        'polar bear'
        >>> plain_name("cafe\u0301") == "caf\u00e9"
        True
    """
    return " ".join(unicodedata.normalize("NFC", name).split())


def part_lists(source: Files, suffix: str) -> list[PartList]:
    """The lists in files of one suffix that are called after a part.

    A CSV list has columns `filename` and `label`, with commas, semicolons or tabs between them. A
    text list has a class a line. A JSON list is

    - `{"image_names": [...], "image_labels": [...], "label_names": [...]}`, whose labels are names
      or positions in `label_names` (Chen et al. 2019),
    - `{class: [filename, ...], ...}`, or `[[filename, label], ...]`,
    - or `[class, ...]`.

    One JSON file whose name contains "split" may hold all parts, as
    `{"train": list, "val": list, "test": list}`.

    Args:
        source: Where the files are.
        suffix: ".csv", ".txt" or ".json".

    Raises:
        ValueError: If a CSV list cannot be read, or lists of JSON differ in length.
    """
    lists = []
    for part, path in part_paths(source, suffix):
        rows, lines = READERS[suffix](source, path)
        lists.append(PartList(part, path, rows, lines))
    if suffix == ".json":
        for path in source.paths:
            if path.lower().endswith(suffix) and "split" in _stem(path, suffix).lower():
                lists += _json_of_all_parts(source, path)
    return lists


def part_paths(source: Files, suffix: str) -> list[tuple[int, str]]:
    """The files of one suffix that are called after a part, each with its position in `PARTS`."""
    files = [path for path in source.paths if path.lower().endswith(suffix)]
    parts = [(part_called(_stem(path, suffix)), path) for path in files]
    return [(part, path) for part, path in parts if part is not None]


def _stem(path: str, suffix: str) -> str:
    return path.rsplit("/", 1)[-1][: -len(suffix)]


def _csv_list(source: Files, path: str) -> tuple[list[Row] | None, list[Line]]:
    data = source.read(path)
    try:
        text = data.decode(_encoding(data))
        separator = _separator(text)
        numbered = _csv_rows(text, separator)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{source.root}: {path}: got an unreadable list ({error}), "
            "expected CSV text; save it as UTF-8"
        ) from error
    columns = [name.strip() for name in numbered[0][1]] if numbered else []
    if columns.count("filename") != 1 or columns.count("label") != 1:
        if path.rsplit("/", 1)[-1] not in CSV_LISTS:
            return None, []  # A log may be called training.csv.
        raise ValueError(f"{source.root}: {path}: got columns {columns}, expected filename,label")

    rows = []
    for line, fields in numbered[1:]:
        where = f"{source.root}: {path}, line {line}"
        if len(fields) > len(columns):
            raise ValueError(
                f"{where}: got {len(fields)} fields, expected {len(columns)}; "
                f"put fields that have a {SEPARATORS[separator]} into quotes"
            )
        row = dict(zip(columns, map(plain_name, fields), strict=False))
        filename = row.get("filename", "")
        if not row.get("label"):
            raise ValueError(f"{where}: got no label for {filename!r}, expected filename,label")
        rows.append((where, filename, row["label"]))
    return rows, []


def _encoding(data: bytes) -> str:
    """The encoding of a list: UTF-8, or UTF-16 if it begins as that does, as Windows may write."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8-sig"


def _csv_rows(text: str, separator: str) -> list[tuple[int, list[str]]]:
    """The number of the last line of each row that is not blank, and the fields of the row."""
    limit = csv.field_size_limit(len(text))  # A field may be of any length.
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        return [(rows.line_num, fields) for fields in rows if fields]
    finally:
        csv.field_size_limit(limit)


def _separator(text: str) -> str:
    """What the columns of a CSV text are separated by, a comma if they are not those of a list.

    Spreadsheets write semicolons where numbers have a decimal comma.
    """
    head = next(iter(text.splitlines()), "")
    for separator in SEPARATORS:
        columns = {name.strip(' "') for name in head.split(separator)}
        if {"filename", "label"} <= columns:
            return separator
    return ","


def _text_list(source: Files, path: str) -> tuple[list[Row] | None, list[Line]]:
    data = source.read(path)
    # Bytes that are not UTF-8 are kept as they are in the names of files.
    text = data.decode(_encoding(data), errors="surrogateescape")
    numbered = enumerate(io.StringIO(text, newline=None), start=1)
    lines = [
        (f"{source.root}: {path}, line {number}", plain_name(line.strip().rstrip("/\\")))
        for number, line in numbered
        if line.strip()
    ]
    return None, lines


def _json_list(source: Files, path: str) -> tuple[list[Row] | None, list[Line]]:
    return _rows_and_lines(f"{source.root}: {path}", _read_json(source, path))


def _json_of_all_parts(source: Files, path: str) -> Iterator[PartList]:
    """The three lists of one file, or none if it has another form."""
    content = _read_json(source, path)
    parts = [part_called(key) for key in content] if isinstance(content, Mapping) else []
    if sorted(part for part in parts if part is not None) != [0, 1, 2]:
        return
    for key, values in content.items():
        part = part_called(key)
        if part is not None:
            rows, lines = _rows_and_lines(f"{source.root}: {path}, {key}", values)
            yield PartList(part, path, rows, lines)


def _read_json(source: Files, path: str) -> Any:
    """The content of a JSON file, or None if it is none. Many files of other data end in .json."""
    try:
        return json.loads(source.read(path))
    except (ValueError, RecursionError):
        return None


def _rows_and_lines(where: str, content: Any) -> tuple[list[Row] | None, list[Line]]:
    """The images or classes that JSON lists. Neither, if it has another form."""
    if _is_texts(content):
        return None, [(f"{where}, entry {n}", plain_name(name)) for n, name in enumerate(content)]
    pairs = list(_pairs(where, content))
    rows = [
        (f"{where}, entry {n}", plain_name(str(filename)), plain_name(str(label)))
        for n, (filename, label) in enumerate(pairs)
    ]
    return rows or None, []


def _pairs(where: str, content: Any) -> Iterator[tuple[Any, Any]]:
    """Filenames and labels, in any of the forms of JSON."""
    if isinstance(content, Mapping) and {"image_names", "image_labels"} <= content.keys():
        filenames = content["image_names"]
        labels = content["image_labels"]
        names = content.get("label_names", [])
        if len(filenames) != len(labels):
            raise ValueError(
                f"{where}: got {len(filenames)} image_names and {len(labels)} image_labels, "
                "expected as many; download it again"
            )
        for filename, label in zip(filenames, labels, strict=True):
            is_position = isinstance(label, int) and 0 <= label < len(names)
            yield filename, names[label] if is_position else label
    elif isinstance(content, Mapping) and all(map(_is_texts, content.values())):
        for label, filenames in content.items():
            for filename in filenames:
                yield filename, label
    elif isinstance(content, list) and all(isinstance(row, list) for row in content):
        for row in content:
            # A third entry is the number of the class, between its image and its name.
            if len(row) in (2, 3):
                yield row[0], row[-1]


def _is_texts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(entry, str) for entry in content)


READERS = {".csv": _csv_list, ".txt": _text_list, ".json": _json_list}
