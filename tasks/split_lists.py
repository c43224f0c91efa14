"""The split that comes with a data set: lists of images, or lists of classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tasks.files import Files
from tasks.list_files import PARTS, PartList, part_lists, part_paths, plain_name

Classes = dict[str, list[str]]  # the image files of each class, by its name
Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Division(Generic[Inputs]):
    """The classes of a data set, and what divides them.

    Args:
        parts: The train, validation and test classes, or one part of all classes.
        by: What divides them, such as "lists train.txt, val.txt, test.txt". Empty if nothing does.
        foreign: Files that are called after all three parts, but name no class and no image.
    """

    parts: list[dict[str, Inputs]]
    by: str = ""
    foreign: tuple[str, ...] = ()


def divide_by_images(source: Files, images: Sequence[str]) -> Division[list[str]] | None:
    """The classes of three lists of images, in CSV or else JSON, or None if there are none.

    See `tasks.list_files.part_lists` for their forms. A filename is a path from the data's root, or
    a name that one image has. Of a path from the root of another file system, the end counts.

    Raises:
        ValueError: If some of the lists are missing or doubled, or one does not fit the images.
    """
    suffix = ".csv"
    lists = _lists_of_images(source, suffix)
    if not lists:
        suffix = ".json"
        lists = _lists_of_images(source, suffix)
    if not lists:
        return None
    images_called = _by_name(images)
    if suffix == ".json":
        # JSON files may hold anything. Those that name an image are lists.
        lists = [one for one in lists if _names_any(one, images_called)]
        if not lists:
            return None
    lists = _one_of_each(source, lists, suffix, " that lists images")

    parts: list[Classes] = []
    listed: set[str] = set()
    for one in lists:
        classes: Classes = defaultdict(list)
        for where, filename, label in one.rows or ():
            matches = images_called.get(_known_end(filename, images_called), [])
            if filename in matches:  # The path of one image may be the end of another's.
                matches = [filename]
            if len(matches) != 1:
                raise ValueError(
                    f"{where}: {len(matches)} images are called {filename!r}, "
                    "expected one; give its path from data_root, or add the image"
                )
            (image,) = matches
            # An image that is listed twice could be in both support and query.
            if image in listed:
                raise ValueError(f"{where}: {filename!r} is listed twice; list every image once")
            listed.add(image)
            classes[label].append(image)
        parts.append(classes)
    return Division(parts, _describe(lists))


def divide_by_classes(
    source: Files,
    classes: Mapping[str, Inputs],
    *,
    required: bool,
) -> Division[Inputs]:
    """The classes of three lists of classes, in text or else JSON, or all if there are none.

    A line is the name of a class, or the end of it after a slash. Classes that are in no list are
    left out. A file without the name of any class is no list.

    Raises:
        ValueError: If some of the lists are missing or doubled, only some lines name a class, or
            there is no list but they are required.
    """
    classes_called: dict[str, set[str]] = defaultdict(set)
    for class_name in classes:
        folders = class_name.split("/")
        for start in range(len(folders)):
            classes_called[plain_name("/".join(folders[start:]))].add(class_name)

    foreign = part_paths(source, ".csv")
    for suffix in (".txt", ".json"):
        candidates = part_lists(source, suffix)
        lists = [one for one in candidates if _names_any_class(one, classes_called)]
        if lists:
            break
        foreign += [(one.part, one.path) for one in candidates if one.lines or one.rows]
    else:
        if required:
            names = [", ".join(f"{part}{suffix}" for part in PARTS) for suffix in (".csv", ".txt")]
            raise ValueError(
                f"split lists: {source.root} has no {names[0]}, and no {names[1]} "
                "with a class a line (nor such lists in .json); expected three of them"
            )
        has_all_parts = {part for part, _ in foreign} == {0, 1, 2}
        paths = tuple(path for _, path in foreign) if has_all_parts else ()
        return Division([dict(classes)], foreign=paths)

    lists = _one_of_each(source, lists, suffix, " that names a class")
    parts = []
    for one in lists:
        part = {}
        for where, line in one.lines:
            matches = classes_called.get(_known_end(line, classes_called), set())
            if len(matches) != 1:
                raise ValueError(
                    f"{where}: {len(matches)} classes are called {line!r}, "
                    "expected one; give its path from data_root, or add its images"
                )
            (class_name,) = matches
            part[class_name] = classes[class_name]
        parts.append(part)
    return Division(parts, _describe(lists))


def _lists_of_images(source: Files, suffix: str) -> list[PartList]:
    return [one for one in part_lists(source, suffix) if one.rows is not None]


def _by_name(images: Sequence[str]) -> dict[str, list[str]]:
    """The images that each path, and each end of it after a slash, names."""
    images_called: dict[str, list[str]] = defaultdict(list)
    for image in images:
        folders = image.split("/")
        for start in range(len(folders)):
            images_called[plain_name("/".join(folders[start:]))].append(image)
    return images_called


def _names_any(one: PartList, images_called: Mapping[str, object]) -> bool:
    rows = one.rows or ()
    return any(_known_end(filename, images_called) in images_called for _, filename, _ in rows)


def _names_any_class(one: PartList, classes_called: Mapping[str, object]) -> bool:
    return any(_known_end(line, classes_called) in classes_called for _, line in one.lines)


def _known_end(path: str, called: Mapping[str, object]) -> str:
    """A path as images or classes are called, or itself if none is called so.

    It may begin with "./", or have the separators of Windows. If it is a path from the root of
    another file system, it is the longest end that is known.
    """
    if path in called:
        return path
    plain = path.replace("\\", "/").removeprefix("./")
    is_absolute = plain.startswith("/") or ":" in plain[:2]
    folders = plain.split("/")
    ends = ("/".join(folders[start:]) for start in range(len(folders) if is_absolute else 1))
    return next((end for end in ends if end in called), path)


def _one_of_each(
    source: Files,
    lists: Sequence[PartList],
    suffix: str,
    which: str = "",
) -> list[PartList]:
    """The lists in the order of `PARTS`. A ValueError names those that are missing or doubled."""
    list_of: dict[int, PartList] = {}
    names = [f"{part}{suffix}" for part in PARTS]
    for one in lists:
        other = list_of.setdefault(one.part, one)
        if other is not one:
            raise ValueError(
                f"split lists: {source.root} has {other.path} and {one.path}, "
                f"expected one {names[one.part]}; "
                "name the folder of the lists that you want as split_lists"
            )
    missing = [name for part, name in enumerate(names) if part not in list_of]
    if missing:
        raise ValueError(
            f"split lists: {source.root} has no {', '.join(missing)}{which}; "
            f"expected {', '.join(names)}"
        )
    return [list_of[part] for part in range(len(PARTS))]


def _describe(lists: Sequence[PartList]) -> str:
    paths = dict.fromkeys(one.path for one in lists)
    return f"lists {', '.join(paths)}"
