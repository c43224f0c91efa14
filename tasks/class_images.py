"""Images or arrays of a data set by class, with the split that comes with them."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from tasks.arrays import READERS, ClassArrays, array_classes, array_paths
from tasks.cache import Arrays, load_or_build
from tasks.files import Files
from tasks.pool import ImagePool
from tasks.repeats import image_digests, repeated_images
from tasks.split_lists import (
    PART_WORDS,
    PARTS,
    Classes,
    classes_by_csv,
    classes_by_text,
    plain_name,
)

LAYOUT = (
    "expected class/image files, train|val|test/class/image files, "
    "images with lists train.csv, val.csv and test.csv (or .txt), "
    f"or arrays in {', '.join(READERS)} files"
)
CACHED_IMAGES = 1000  # Fewer are decoded in less than a second.
CACHED_BYTES = 2**26  # Smaller files of arrays are read in less than a second.

Inputs = TypeVar("Inputs")  # the image files of a class, its array, or its position


@dataclass(frozen=True, eq=False)
class ClassImages:
    """The classes of a data set, and the split that comes with it.

    Args:
        pool: All classes.
        parts: The names of the train, validation and test classes, or of all classes if nothing
            splits them.
        digests: What `image_digests` says of each image of the pool. Empty for features.
        paths: The file of each image of the pool. Empty for arrays.
    """

    pool: ImagePool
    parts: list[list[str]]
    digests: np.ndarray
    paths: Sequence[str] = ()

    def check_apart(self, split: Sequence[np.ndarray]) -> None:
        """Raise if an image stands in two splits.

        Args:
            split: The positions in `pool` of the train, validation and test classes.

        Raises:
            ValueError: If the pixels of two images in different splits are equal, and not of one
                colour. It names both.
        """
        if len(self.digests) == 0:
            return
        split_of_class = np.full(len(self.pool), -1)
        for number, classes in enumerate(split):
            split_of_class[classes] = number
        split_of = np.repeat(split_of_class, self.pool.counts)
        repeats = repeated_images(self.digests, split_of)
        if repeats:
            one, other = (f"{self._place(row)} ({PARTS[split_of[row]]})" for row in repeats[0])
            raise ValueError(
                f"splits: got {len(repeats)} images in two splits, such as {one} = {other}, "
                "expected none; remove one of the two, "
                "or set allow_repeats=true if the data set is published so"
            )

    def _place(self, row: int) -> str:
        """Where an image comes from."""
        if self.paths:
            return self.paths[row]
        position = int(np.searchsorted(self.pool.starts, row, side="right")) - 1
        number = row - self.pool.starts[position]
        return f"image {number} of class {self.pool.names[position]!r}"


def read_class_images(
    root: Path,
    *,
    size: int,
    color: bool,
    split_lists: Path | None,
) -> ClassImages:
    """Read images or arrays in one of the layouts of `tasks.folder.load`.

    Many images are decoded once, into a file of the cache folder that is mapped into memory.

    Args:
        root: A folder, a file of arrays, or a zip or tar.
        size: Pixels a side.
        color: Whether images have three channels or one of grey.
        split_lists: As for `tasks.folder.load`.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
        ValueError: If there are no images, a file cannot be read, a list or folder does not fit, or
            a class is in two splits.
    """
    files = Files(root, is_one_file=root.suffix.lower() in READERS)
    lists = files if split_lists is None else Files(split_lists)
    required = split_lists is not None
    if files.image_paths:
        parts = classes_by_csv(lists, files.image_paths)
        if not parts:
            parts = _classes_by_folder(files.image_paths)
            parts = _chosen_by_text(lists, parts, required)
        return _from_image_files(files, parts, size, color)
    if not array_paths(files):
        raise ValueError(f"data_root: found no images in {root}; {LAYOUT}")
    whole = _from_arrays(files, size, color)
    parts_of_names = [{name: name for name in part} for part in whole.parts]
    chosen = _chosen_by_text(lists, parts_of_names, required)
    return replace(whole, parts=[list(part) for part in chosen])


def _chosen_by_text(
    lists: Files,
    parts: list[dict[str, Inputs]],
    required: bool,
) -> list[dict[str, Inputs]]:
    """The classes that text lists choose, if there are any and nothing else splits the classes."""
    if len(parts) == 3 and not required:
        return parts
    return classes_by_text(lists, _merged(parts), required=required) or parts


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
    parts: Sequence[Classes],
    size: int,
    color: bool,
) -> ClassImages:
    classes = _merged(parts)
    paths = [path for paths in classes.values() for path in paths]

    def decode() -> Arrays:
        images = files.images(paths, size, color=color)
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return {"images": images, "digests": image_digests(images)}

    is_large = len(paths) >= CACHED_IMAGES
    arrays = _cached(files, paths, size, color, decode) if is_large else decode()
    pool = ImagePool.from_sorted(
        torch.from_numpy(arrays["images"]),
        counts=[len(paths) for paths in classes.values()],
        names=classes,
    )
    return ClassImages(pool, [list(part) for part in parts], arrays["digests"], paths)


def _from_arrays(files: Files, size: int, color: bool) -> ClassImages:
    paths = array_paths(files)

    def read() -> Arrays:
        parts = array_classes(files, size, color=color)
        classes = _merged(parts)
        _check_alike(files, classes)
        inputs = np.concatenate(list(classes.values()))
        is_image = inputs.dtype == np.uint8
        return {
            "inputs": inputs,
            "digests": image_digests(inputs if is_image else inputs[:0]),
            "counts": np.array([len(array) for array in classes.values()]),
            "names": np.array(list(classes)),
            "part_sizes": np.array([len(part) for part in parts]),
        }

    is_large = files.bytes_of(paths) >= CACHED_BYTES
    arrays = _cached(files, paths, size, color, read) if is_large else read()
    names = arrays["names"].tolist()
    pool = ImagePool.from_sorted(torch.from_numpy(arrays["inputs"]), arrays["counts"], names)
    stops = np.cumsum(arrays["part_sizes"]).tolist()
    parts = [names[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    return ClassImages(pool, parts, arrays["digests"])


def _cached(
    files: Files,
    paths: Sequence[str],
    size: int,
    color: bool,
    build: Callable[[], Arrays],
) -> Arrays:
    """Arrays that are built of some files once, in one file of the cache for each data set."""
    place = hashlib.sha256(os.fsencode(files.root.resolve())).hexdigest()[:16]
    channels = 3 if color else 1
    name = f"images-1-{size}x{size}x{channels}-{place}"
    return load_or_build(name, build, files.stamp(paths))


def _check_alike(files: Files, classes: ClassArrays) -> None:
    kinds = {f"{array.dtype} {array.shape[1:]}" for array in classes.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{files.root}: got inputs of the types and shapes {', '.join(sorted(kinds))}, "
            "expected one; give all classes inputs of one type and shape"
        )


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
    split_tops = sorted(top for top in tops if top.lower() in PART_WORDS)
    splits = {PART_WORDS[top.lower()] for top in split_tops}
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
        part = parts[PART_WORDS[top.lower()]]
        part["/".join(folders)].append(image)
    return parts
