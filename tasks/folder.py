"""Few-shot classification of any images sorted into folders: CIFAR-FS, mini-ImageNet, your own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from tasks.arrays import READERS, ClassArrays, array_classes, array_paths
from tasks.episodes import Splits
from tasks.few_shot import few_shot_splits, shuffled_split
from tasks.files import Files
from tasks.pool import ImagePool
from tasks.split_lists import PART_WORDS, PARTS, Classes, classes_by_csv, classes_by_text

LAYOUT = (
    "expected class/image files, train|val|test/class/image files, "
    "images with lists train.csv, val.csv and test.csv (or .txt), "
    f"or arrays in {', '.join(READERS)} files"
)

Inputs = TypeVar("Inputs")  # the image files of a class, or its array


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
    """Few-shot tasks of the images in a folder or archive. See `tasks.FewShot` for shapes.

    Images are `[3, size, size]` or `[1, size, size]`, all decoded into memory (uint8). The folder
    that an image lies in is its class. Folders that wrap everything else are passed over. Classes
    are split by the first of these that applies:

    1. Lists `train.csv`, `val.csv` and `test.csv`, in `split_lists` or among the images, with
       columns `filename,label` (those of mini-ImageNet). A filename is a path from `data_root`, or
       a name that one image has. The label is the class.
    2. Lists `train.txt`, `val.txt` and `test.txt` in `split_lists`, with the name of one class a
       line (those of CIFAR-FS). Classes that are in no list are left out.
    3. Top folders `train`, `val` (or `valid`, `validation`) and `test`, in upper or lower case,
       that hold class folders. If only one of these names occurs, it is an ordinary class.
    4. The same text lists among the images.
    5. A shuffle by `seed` into 64 % train, 16 % validation and 20 % test.

    Where there are no image files, arrays are read: `.pkl`, `.npz`, `.npy` or `.pt` files, such as
    `mini-imagenet-cache-train.pkl`, `…-val.pkl` and `…-test.pkl`. The words train, val and test in
    their names tell the split. Without them, 2, 4 or 5 applies. The files of a split hold together

    - one array `[n, ...]` and `class_dict`, from the name of each class to its rows,
    - or one array `[n, ...]` and the `labels` of its rows, as names or numbers,
    - or an array `[n, ...]` for each class, by its name.

    Arrays of uint8 `[n, height, width, 3]` are images. Float arrays are features, and become
    inputs as they are, in float32. Pickles are read without running code.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: A folder, a file of arrays, or a zip or tar, which is not extracted. The tar may
            be compressed by gzip, bzip2 or xz. Required.
        size: Pixels a side, ≥ 1. Images are cut to their central square and resized.
        color: Whether images have three channels or one of grey.
        split_lists: The folder or archive with the three lists. If None, they are looked for among
            the images.
        seed: Of the shuffle.

    Raises:
        FileNotFoundError: If `data_root` is not given, or there is nothing at it.
        ValueError: If there are no images, a file cannot be read, a list or folder does not fit, a
            class is in two splits, or the data cannot give such tasks.
    """
    if data_root is None:
        raise FileNotFoundError(
            f"data_root: got none, but the folder family needs a folder or archive; {LAYOUT}"
        )
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1 pixel a side")
    root = Path(data_root)
    files = Files(root, is_one_file=root.suffix.lower() in READERS)
    lists = files if split_lists is None else Files(Path(split_lists))
    required = split_lists is not None
    if files.image_paths:
        image_parts = classes_by_csv(lists, files.image_paths)
        if not image_parts:
            image_parts = _classes_by_folder(files.image_paths)
            image_parts = _chosen_by_text(lists, image_parts, required)
        split = _split(image_parts, seed)
        pool = _pool_of_images(files, _merged(image_parts), size, color)
    elif array_paths(files):
        array_parts = array_classes(files, size, color=color)
        array_parts = _chosen_by_text(lists, array_parts, required)
        split = _split(array_parts, seed)
        pool = _pool_of_arrays(files, _merged(array_parts))
    else:
        raise ValueError(f"data_root: found no images in {data_root}; {LAYOUT}")
    return few_shot_splits(
        "folder",
        pool,
        split,
        ways=ways,
        shots=shots,
        queries=queries,
    )


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
    split_of: dict[str, str] = {}
    for split, part in zip(PARTS, parts, strict=False):
        for name in part:
            if name in split_of:
                raise ValueError(
                    f"splits: class {name!r} is in {split_of[name]} and in {split}; "
                    "few-shot splits hold whole classes apart, "
                    "so give every class to one of them"
                )
            split_of[name] = split
    return {name: inputs for part in parts for name, inputs in part.items()}


def _split(parts: Sequence[Mapping[str, Inputs]], seed: int) -> list[np.ndarray]:
    """The positions of the train, validation and test classes among those of all parts."""
    classes = len(_merged(parts))
    if len(parts) == 1:
        return shuffled_split(classes, seed)
    boundaries = np.cumsum([len(part) for part in parts])[:-1]
    return np.split(np.arange(classes), boundaries)


def _pool_of_images(files: Files, classes: Classes, size: int, color: bool) -> ImagePool:
    paths = [path for paths in classes.values() for path in paths]
    images = files.images(paths, size, color=color)
    return ImagePool.from_sorted(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        counts=[len(paths) for paths in classes.values()],
        names=classes,
    )


def _pool_of_arrays(files: Files, classes: ClassArrays) -> ImagePool:
    kinds = {f"{array.dtype} {array.shape[1:]}" for array in classes.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{files.root}: got inputs of the types and shapes {', '.join(sorted(kinds))}, "
            "expected one; give all classes inputs of one type and shape"
        )
    return ImagePool.from_sorted(
        torch.from_numpy(np.concatenate(list(classes.values()))),
        counts=[len(array) for array in classes.values()],
        names=classes,
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
