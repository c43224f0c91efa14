"""Few-shot classification of any images sorted into folders: CIFAR-FS, mini-ImageNet, your own."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tasks.episodes import Splits
from tasks.files import Files
from tasks.pool import ImagePool, few_shot_splits, shuffled_split

LISTS = ("train.csv", "val.csv", "test.csv")
SPLIT_FOLDERS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
LAYOUT = (
    "expected class/image files, train|val|test/class/image files, "
    "or images with train.csv, val.csv and test.csv"
)

Classes = dict[str, list[str]]  # the image files of each class, by its name


def load(
    *,
    ways: int,
    shots: int,
    queries: int,
    data_root: str | Path | None = None,
    size: int = 84,
    color: bool = True,
    split_lists: str | Path | None = None,
    seed: int = 0,
) -> Splits:
    """Few-shot tasks of the images in a folder or zip. See `tasks.FewShot` for shapes and types.

    Images are `[3, size, size]` or `[1, size, size]`, all decoded into memory (uint8). The folder
    that an image lies in is its class. Folders that wrap everything else are passed over. Classes
    are split by the first of these that applies:

    1. Lists `train.csv`, `val.csv` and `test.csv`, in `split_lists` or among the images, with
       columns `filename,label` (those of mini-ImageNet). A filename is a path from `data_root`, or
       a name that one image has. The label is the class.
    2. Top folders `train`, `val` (or `valid`, `validation`) and `test`, in upper or lower case,
       that hold class folders. If only one of these names occurs, it is an ordinary class.
    3. A shuffle by `seed` into 64 % train, 16 % validation and 20 % test.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: A folder, or a zip, which is not extracted. Required.
        size: Pixels a side, ≥ 1. Images are cut to their central square and resized.
        color: Whether images have three channels or one of grey.
        split_lists: The folder or zip with the three lists. If None, they are looked for among the
            images.
        seed: Of the shuffle.

    Raises:
        FileNotFoundError: If `data_root` is not given, or there is nothing at it.
        ValueError: If there are no images, an image or zip cannot be read, a list or folder does
            not fit, a class is in two splits, or the data cannot give such tasks.
    """
    if data_root is None:
        raise FileNotFoundError(
            f"data_root: got none, but the folder family needs a folder or zip; {LAYOUT}"
        )
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1 pixel a side")
    files = Files(Path(data_root))
    image_paths = files.image_paths
    if not image_paths:
        raise ValueError(f"data_root: found no images in {data_root}; {LAYOUT}")

    lists = files if split_lists is None else Files(Path(split_lists))
    parts = _classes_by_list(lists, image_paths, required=split_lists is not None)
    parts = parts or _classes_by_folder(image_paths)
    classes = {name: paths for part in parts for name, paths in part.items()}
    split = _positions(parts) if len(parts) == 3 else shuffled_split(len(classes), seed)

    paths = [path for paths in classes.values() for path in paths]
    images = files.images(paths, size, color=color)
    pool = ImagePool.from_sorted(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        counts=[len(paths) for paths in classes.values()],
        names=classes,
    )
    return few_shot_splits(
        "folder",
        pool,
        split,
        ways=ways,
        shots=shots,
        queries=queries,
    )


def _positions(parts: Sequence[Classes]) -> list[np.ndarray]:
    """The positions of each part's classes among the classes of all parts, in their order."""
    split_of: dict[str, str] = {}
    for split, part in zip(("train", "val", "test"), parts, strict=True):
        for name in part:
            if name in split_of:
                raise ValueError(
                    f"splits: class {name!r} is in {split_of[name]} and in {split}; "
                    "few-shot splits hold whole classes apart, "
                    "so give every class to one of them"
                )
            split_of[name] = split
    boundaries = np.cumsum([len(part) for part in parts])[:-1]
    return np.split(np.arange(len(split_of)), boundaries)


def _classes_by_folder(images: Sequence[str]) -> list[Classes]:
    """Classes by folder: one part, or three if the top folders are train, val and test."""
    paths = [path.split("/") for path in images]
    # A zip often has one folder that wraps all others.
    while min(map(len, paths)) > 2 and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    for image, path in zip(images, paths, strict=True):
        if len(path) < 2:
            raise ValueError(f"data_root: {image} is in no class folder; {LAYOUT}")

    tops = {path[0] for path in paths}
    split_tops = sorted(top for top in tops if top.lower() in SPLIT_FOLDERS)
    splits = {SPLIT_FOLDERS[top.lower()] for top in split_tops}
    if len(splits) < 2:
        classes: Classes = defaultdict(list)
        for image, path in zip(images, paths, strict=True):
            classes["/".join(path[:-1])].append(image)
        return [classes]

    if len(splits) < 3:
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
        part = parts[SPLIT_FOLDERS[top.lower()]]
        part["/".join(folders)].append(image)
    return parts


def _classes_by_list(source: Files, images: Sequence[str], *, required: bool) -> list[Classes]:
    """Classes by the three CSV lists in `source`. If there are none, and they are optional, []."""
    paths = {path.rsplit("/", 1)[-1]: path for path in source.paths}
    missing = [name for name in LISTS if name not in paths]
    if len(missing) == len(LISTS) and not required:
        return []
    if missing:
        raise ValueError(
            f"split lists: {source.root} has no {', '.join(missing)}; expected {', '.join(LISTS)}"
        )

    images_called: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for name in {image, image.rsplit("/", 1)[-1]}:
            images_called[name].append(image)

    parts = []
    listed: set[str] = set()
    for name in LISTS:
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


def _rows(source: Files, path: str) -> Iterator[tuple[str, str, str]]:
    """Where each row of a CSV list stands, its filename and its label."""
    try:
        text = source.read(path).decode("utf-8-sig")
        rows = csv.DictReader(text.splitlines())
        columns = list(rows.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{source.root}: {path}: got an unreadable list ({error}), expected CSV text"
        ) from error
    if not {"filename", "label"} <= set(columns):
        raise ValueError(f"{source.root}: {path}: got columns {columns}, expected filename,label")
    for line, row in enumerate(rows, start=2):
        where = f"{source.root}: {path}, line {line}"
        filename = row["filename"] or ""
        if not row["label"]:
            raise ValueError(f"{where}: got no label for {filename!r}, expected filename,label")
        yield where, filename, row["label"]
