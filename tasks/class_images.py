"""Images or arrays of a data set by class, with the split that comes with them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from tasks.arrays import READERS, ClassArrays, array_classes, array_paths
from tasks.cache import Arrays, load_or_build
from tasks.files import Files
from tasks.list_files import PARTS, plain_name
from tasks.pool import ImagePool
from tasks.repeats import copied_images, image_digests, repeated_images
from tasks.split_folders import LAYOUT, divide_by_folders
from tasks.split_lists import Division, divide_by_classes, divide_by_images

CACHED_IMAGES = 1000  # Fewer are decoded in less than a second.
CACHED_BYTES = 2**26  # Smaller files of arrays are read in less than a second.

Inputs = TypeVar("Inputs")  # the image files of a class, its array, or its position


@dataclass(frozen=True, eq=False)
class ClassImages:
    """The classes of a data set, and the split that comes with it.

    Args:
        root: Where the data is, for people to read.
        pool: All classes.
        parts: The names of the train, validation and test classes, or of all classes if nothing
            splits them.
        divided_by: What splits them, such as "lists train.txt, val.txt, test.txt".
        digests: What is equal for equal images, uint8 `[n, 16]`, as `image_digests` returns it. For
            features it is equal where they are one example. If empty, nothing is known.
        paths: The file of each image of the pool. Empty for arrays.
        foreign: Files that are called after all three parts, but name no class and no image.
    """

    root: Path | str
    pool: ImagePool
    parts: list[list[str]]
    divided_by: str
    digests: np.ndarray
    paths: Sequence[str] = ()
    foreign: Sequence[str] = ()

    def positions(self) -> list[np.ndarray]:
        """The positions in `pool` of the classes of each part."""
        position = {name: i for i, name in enumerate(self.pool.names)}
        return [np.array([position[name] for name in part], np.int64) for part in self.parts]

    def repeats(self, split: Sequence[np.ndarray]) -> str:
        """What to say of images that stand in two splits. Empty if there are none.

        Images are equal if all their pixels are. Those of one colour do not count.

        Args:
            split: The positions in `pool` of the train, validation and test classes.
        """
        if len(self.digests) == 0:
            return ""
        split_of_class = np.full(len(self.pool), -1)
        for number, classes in enumerate(split):
            split_of_class[classes] = number
        split_of = np.repeat(split_of_class, self.pool.counts)
        repeats = repeated_images(self.digests, split_of)
        if not repeats:
            return ""
        one, other = (f"{self._place(row)} ({PARTS[split_of[row]]})" for row in repeats[0])
        noun = f"equal {self._noun}s"
        return f"{noun} in two splits: {len(repeats)}, the first being {one} = {other}"

    def copies(self, split: Sequence[np.ndarray]) -> str:
        """What to say of images that stand twice in a class. Empty if there are none.

        A task may have one of the two as support and the other as query.

        Args:
            split: As for `repeats`.
        """
        if len(self.digests) == 0:
            return ""
        kept_class = np.full(len(self.pool), -1)
        for classes in split:
            kept_class[classes] = classes
        copies = copied_images(self.digests, np.repeat(kept_class, self.pool.counts))
        if not copies:
            return ""
        one, other = map(self._place, copies[0])
        noun = f"copies of {self._noun}s"
        return f"{noun} in one class: {len(copies)}, the first being {one} = {other}"

    @property
    def _noun(self) -> str:
        return "image" if self.pool.images.ndim == 4 else "example"

    def _place(self, row: int) -> str:
        """Where an image comes from."""
        if self.paths:
            return self.paths[row]
        position = int(np.searchsorted(self.pool.starts, row, side="right")) - 1
        number = row - self.pool.starts[position]
        return f"{self._noun} {number} of class {self.pool.names[position]!r}"


def read_class_images(
    data_root: str | Path,
    *,
    size: int,
    color: bool,
    split_lists: str | Path | None = None,
) -> ClassImages:
    """Read images or arrays in one of the layouts of `tasks.folder.load`.

    Many images are decoded once, into a file of the cache folder that is mapped into memory.

    Args:
        data_root: A folder, a file of arrays, or a zip or tar.
        size: Pixels a side, ≥ 1.
        color: Whether images have three channels or one of grey.
        split_lists: As for `tasks.folder.load`.

    Raises:
        FileNotFoundError: If there is nothing at `data_root`.
        ValueError: If there are no images, a file cannot be read, a list or folder does not fit, or
            a class is in two splits.
    """
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1 pixel a side")
    root = Path(data_root)
    files = Files(root, is_one_file=root.suffix.lower() in READERS)
    # On the command line, the name 2024 of a folder is read as a number.
    lists = files if split_lists is None else Files(Path(str(split_lists)))
    required = split_lists is not None
    images = files.image_paths
    unread = files.unread_images
    if images:
        if unread:
            warnings.warn(
                f"{root}: left out images of formats that are not read ({len(unread)}, such as "
                f"{unread[0]}); save them as PNG or JPEG",
                stacklevel=3,
            )
        division = divide_by_images(lists, images)
        if division is None:
            division = _divide_by_lists(lists, divide_by_folders(images), required)
        return _from_image_files(files, division, size=size, color=color)
    if not array_paths(files):
        if unread:
            raise ValueError(
                f"data_root: found only images of formats that are not read in {root} "
                f"({len(unread)}, such as {unread[0]}); save them as PNG or JPEG"
            )
        raise ValueError(f"data_root: found no images in {root}; {LAYOUT}")
    classes = _from_arrays(files, size=size, color=color)
    return divide(classes, lists, required=required)


def divide(classes: ClassImages, lists: Files, *, required: bool) -> ClassImages:
    """The classes that lists of classes divide, if there are any and nothing else divides them.

    Args:
        classes: What was read.
        lists: Where the lists are.
        required: Whether they have to be there, and go before what else divides the classes.

    Raises:
        ValueError: If lists are incomplete, do not fit, or are required and missing.
    """
    parts = [{name: name for name in part} for part in classes.parts]
    division = _divide_by_lists(lists, Division(parts, classes.divided_by), required)
    names = [list(part) for part in division.parts]
    return replace(
        classes,
        parts=names,
        divided_by=division.by,
        foreign=division.foreign,
    )


def _divide_by_lists(
    lists: Files,
    division: Division[Inputs],
    required: bool,
) -> Division[Inputs]:
    """What lists of classes divide, if there are any and nothing else divides the classes."""
    if len(division.parts) == 3 and not required:
        return division
    classes = _merged(division.parts)
    return divide_by_classes(lists, classes, required=required)


def _merged(parts: Sequence[Mapping[str, Inputs]]) -> dict[str, Inputs]:
    """The classes of all parts. A ValueError names a class that is in two of them."""
    seen: dict[str, tuple[str, str]] = {}
    for split, part in zip(PARTS, parts, strict=False):
        for name in part:
            other, other_split = seen.setdefault(plain_name(name), (name, split))
            if other != name:
                raise ValueError(
                    f"splits: classes {other!r} ({other_split}) and {name!r} ({split}) differ "
                    "in blanks or in the form of accents alone; rename one, or merge them"
                )
            if other_split != split:
                raise ValueError(
                    f"splits: class {name!r} is in {other_split} and in {split}; "
                    "few-shot splits hold whole classes apart, "
                    "so give every class to one of them"
                )
    return {name: inputs for part in parts for name, inputs in part.items()}


def _from_image_files(
    files: Files,
    division: Division[list[str]],
    *,
    size: int,
    color: bool,
) -> ClassImages:
    classes = _merged(division.parts)
    paths = [path for paths in classes.values() for path in paths]

    def decode() -> Arrays:
        images = files.images(paths, size, color=color)
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return {"images": images, "digests": image_digests(images)}

    is_large = len(paths) >= CACHED_IMAGES
    name = _cache_name(files, size=size, color=color)
    arrays = load_or_build(name, decode, files.stamp(paths)) if is_large else decode()
    pool = ImagePool.from_sorted(
        torch.from_numpy(arrays["images"]),
        counts=[len(paths) for paths in classes.values()],
        names=classes,
    )
    parts = [list(part) for part in division.parts]
    return ClassImages(
        files.root,
        pool,
        parts,
        divided_by=division.by,
        digests=arrays["digests"],
        paths=paths,
        foreign=division.foreign,
    )


def _from_arrays(files: Files, *, size: int, color: bool) -> ClassImages:
    paths = array_paths(files)

    def read() -> Arrays:
        parts = array_classes(files, size, color=color)
        classes = _merged(parts)
        _check_alike(files, classes)
        inputs = _joined(list(classes.values()))
        return {
            "inputs": inputs,
            "digests": image_digests(inputs),
            "counts": np.array([len(array) for array in classes.values()]),
            "names": np.array(list(classes)),
            "part_sizes": np.array([len(part) for part in parts]),
        }

    is_large = files.bytes_of(paths) >= CACHED_BYTES
    name = _cache_name(files, size=size, color=color)
    arrays = load_or_build(name, read, files.stamp(paths)) if is_large else read()
    names = arrays["names"].tolist()
    pool = ImagePool.from_sorted(torch.from_numpy(arrays["inputs"]), arrays["counts"], names)
    stops = np.cumsum(arrays["part_sizes"]).tolist()
    parts = [names[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    divided_by = "names of files" if len(parts) == 3 else ""
    return ClassImages(
        files.root,
        pool,
        parts,
        divided_by=divided_by,
        digests=arrays["digests"],
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """All rows together, in the order of memory that PyTorch has. NumPy alone would keep theirs."""
    n = sum(map(len, arrays))
    joined = np.empty((n, *arrays[0].shape[1:]), arrays[0].dtype)
    return np.concatenate(arrays, out=joined)


def _cache_name(files: Files, *, size: int, color: bool) -> str:
    """The cache has one file for each data set, size and number of channels."""
    place = hashlib.sha256(os.fsencode(files.root.resolve())).hexdigest()[:16]
    channels = 3 if color else 1
    return f"images-1-{size}x{size}x{channels}-{place}"


def _check_alike(files: Files, classes: ClassArrays) -> None:
    kinds = {f"{array.dtype} {array.shape[1:]}" for array in classes.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{files.root}: got inputs of the types and shapes {', '.join(sorted(kinds))}, "
            "expected one; give all classes inputs of one type and shape"
        )
