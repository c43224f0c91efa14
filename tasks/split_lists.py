"""The lists of a split that come with a data set: CSV lists of images, text lists of classes."""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from tasks.files import Files

PARTS = ("train", "val", "test")
PART_WORDS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
CSV_LISTS = tuple(f"{part}.csv" for part in PARTS)
TEXT_LISTS = tuple(f"{part}.txt" for part in PARTS)

Classes = dict[str, list[str]]  # the image files of each class, by its name
Inputs = TypeVar("Inputs")


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


def classes_by_csv(source: Files, images: Sequence[str]) -> list[Classes]:
    """The classes of `train.csv`, `val.csv` and `test.csv`, or [] if there are none.

    Raises:
        ValueError: If some of them are missing or doubled, or one does not fit the images.
    """
    lists = {path: _file_name(path) for path in source.paths if _file_name(path) in CSV_LISTS}
    if not lists:
        return []
    paths = _one_of_each(source, lists, CSV_LISTS)
    images_called: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for name in {plain_name(image), plain_name(_file_name(image))}:
            images_called[name].append(image)

    parts = []
    listed: set[str] = set()
    for name in CSV_LISTS:
        classes: Classes = defaultdict(list)
        for where, filename, label in _rows(source, paths[name]):
            matches = images_called.get(filename, [])
            if len(matches) != 1:
                raise ValueError(
                    f"{where}: {len(matches)} images are called {filename!r}, "
                    "expected one; give its path from data_root, or add the image"
                )
            image = matches[0]
            # An image that is listed twice could be in both support and query.
            if image in listed:
                raise ValueError(f"{where}: {filename!r} is listed twice; list every image once")
            listed.add(image)
            classes[label].append(image)
        parts.append(classes)
    return parts


def classes_by_text(
    source: Files,
    classes: Mapping[str, Inputs],
    *,
    required: bool,
) -> list[dict[str, Inputs]]:
    """The classes of `train.txt`, `val.txt` and `test.txt`, or [] if none of them names a class.

    The second may also be called `valid.txt` or `validation.txt`, and all in upper case. A line is
    the name of a class, or the end of it after a slash. Classes that are in no list are left out.
    A file without the name of any class is no list, and is passed over with a warning if all three
    are there.

    Raises:
        ValueError: If some of the lists are missing or doubled, only some lines name a class, or
            there is no list but they are required.
    """
    classes_called: dict[str, set[str]] = defaultdict(set)
    for class_name in classes:
        folders = class_name.split("/")
        for start in range(len(folders)):
            classes_called[plain_name("/".join(folders[start:]))].add(class_name)

    candidates = {path: name for path in source.paths if (name := _text_list(path))}
    lines = {path: list(_lines(source, path)) for path in candidates}
    lists = {
        path: name
        for path, name in candidates.items()
        if any(line in classes_called for _, line in lines[path])
    }
    if not lists:
        if required:
            raise ValueError(
                f"split lists: {source.root} has no {', '.join(CSV_LISTS)}, and no "
                f"{', '.join(TEXT_LISTS)} with a class a line; expected three of them"
            )
        if set(candidates.values()) == set(TEXT_LISTS):
            warnings.warn(
                f"{source.root}: {', '.join(candidates)} name no class, such as "
                f"{next(iter(classes))!r}, so they do not split the classes; "
                "for a split of your own, give one class a line",
                stacklevel=2,
            )
        return []

    parts = []
    for path in _one_of_each(source, lists, TEXT_LISTS, " that names a class").values():
        part = {}
        for where, line in lines[path]:
            matches = classes_called.get(line, set())
            if len(matches) != 1:
                raise ValueError(
                    f"{where}: {len(matches)} classes are called {line!r}, "
                    "expected one; give its path from data_root, or add its images"
                )
            (class_name,) = matches
            part[class_name] = classes[class_name]
        parts.append(part)
    return parts


def _file_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _text_list(path: str) -> str | None:
    """Which of `TEXT_LISTS` a path may be."""
    word, _, suffix = _file_name(path).lower().rpartition(".")
    is_list = suffix == "txt" and word in PART_WORDS
    return TEXT_LISTS[PART_WORDS[word]] if is_list else None


def _one_of_each(
    source: Files,
    lists: Mapping[str, str],
    names: Sequence[str],
    which: str = "",
) -> dict[str, str]:
    """The path of each of the names, in their order. `lists` has the name of each path."""
    path_of: dict[str, str] = {}
    for path, name in lists.items():
        if name in path_of:
            raise ValueError(
                f"split lists: {source.root} has {path_of[name]} and {path}, expected one {name}; "
                "name the folder of the lists that you want as split_lists"
            )
        path_of[name] = path
    missing = [name for name in names if name not in path_of]
    if missing:
        raise ValueError(
            f"split lists: {source.root} has no {', '.join(missing)}{which}; "
            f"expected {', '.join(names)}"
        )
    return {name: path_of[name] for name in names}


def _lines(source: Files, path: str) -> Iterator[tuple[str, str]]:
    """Where each line of a text list stands, and the line. Blank lines are left out."""
    # Bytes that are not UTF-8 are kept as they are in the names of files.
    text = source.read(path).decode("utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield f"{source.root}: {path}, line {number}", plain_name(line.strip().strip("/"))


def _rows(source: Files, path: str) -> Iterator[tuple[str, str, str]]:
    """Where each row of a CSV list stands, its filename and its label."""
    data = source.read(path)
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        header, *rows = _csv_rows(text) or [(1, [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{source.root}: {path}: got an unreadable list ({error}), "
            "expected CSV text; save it as UTF-8"
        ) from error
    columns = [name.strip() for name in header[1]]
    if columns.count("filename") != 1 or columns.count("label") != 1:
        raise ValueError(f"{source.root}: {path}: got columns {columns}, expected filename,label")
    for line, fields in rows:
        where = f"{source.root}: {path}, line {line}"
        if len(fields) > len(columns):
            raise ValueError(
                f"{where}: got {len(fields)} fields, expected {len(columns)}; "
                "put fields that have a comma into quotes"
            )
        row = dict(zip(columns, map(plain_name, fields), strict=False))
        filename = row.get("filename", "")
        if not row.get("label"):
            raise ValueError(f"{where}: got no label for {filename!r}, expected filename,label")
        yield where, filename, row["label"]


def _csv_rows(text: str) -> list[tuple[int, list[str]]]:
    """The number of the last line of each row that is not blank, and the fields of the row."""
    limit = csv.field_size_limit(len(text))  # A field may be of any length.
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [(rows.line_num, fields) for fields in rows if fields]
    finally:
        csv.field_size_limit(limit)
