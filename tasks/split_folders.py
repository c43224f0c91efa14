"""The split that comes with a data set as folders of images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tasks.arrays import READERS
from tasks.list_files import part_called
from tasks.split_lists import Classes, Division

LAYOUT = (
    "expected class/image files, train|val|test/class/image files, "
    "images with lists train.csv, val.csv and test.csv (or .txt), "
    f"or arrays in {', '.join(READERS)} files"
)


def divide_by_folders(images: Sequence[str]) -> Division[list[str]]:
    """Classes by folder: one part, or three if the top folders are called after them.

    Args:
        images: The paths of images, relative to the data's root.

    Raises:
        ValueError: If an image is in no class folder, or only some folders are called after parts.

    Example:
        >>> division = divide_by_folders(["base/cat/1.png", "val/dog/1.png", "novel/cow/1.png"])
        >>> division.parts[2]["cow"], division.by
        (['novel/cow/1.png'], 'folders base, val, novel')
    """
    paths = [path.split("/") for path in images]
    # A zip often has one folder that wraps all others.
    while min(map(len, paths)) > 2 and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    for image, path in zip(images, paths, strict=True):
        if len(path) < 2:
            raise ValueError(f"data_root: {image} is in no class folder; {LAYOUT}")

    tops = {path[0] for path in paths}
    part_of = {top: part for top in tops if (part := part_called(top)) is not None}
    split_tops = sorted(part_of)
    if len(set(part_of.values())) < 2:
        classes: Classes = defaultdict(list)
        for image, path in zip(images, paths, strict=True):
            classes["/".join(path[:-1])].append(image)
        return Division([classes])

    if len(set(part_of.values())) < 3:
        raise ValueError(f"data_root: got only the split folders {split_tops}; {LAYOUT}")
    others = sorted(tops - set(split_tops))
    if others:
        raise ValueError(
            f"data_root: got {others[0]!r} beside the split folders {split_tops}; move it; {LAYOUT}"
        )
    parts: list[Classes] = [defaultdict(list) for _ in range(3)]
    for image, (top, *folders, _) in zip(images, paths, strict=True):
        if not folders:
            raise ValueError(f"data_root: {image} is in a split but in no class folder; {LAYOUT}")
        parts[part_of[top]]["/".join(folders)].append(image)
    return Division(parts, f"folders {', '.join(sorted(part_of, key=part_of.__getitem__))}")
