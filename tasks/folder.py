"""Few-shot classification of any images sorted into folders: CIFAR-FS, mini-ImageNet, or your own."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from tasks.episodes import Splits
from tasks.files import Files
from tasks.pool import ImagePool, few_shot_splits, shuffled_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
SPLITS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
LAYOUT = "expected class/image files, train|val|test/class/image files, or images with train.csv, val.csv and test.csv"

Classes = dict[str, list[str]]  # class name: its image files


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
    """Images of a folder or zip, `[3, size, size]` or `[1, size, size]` in [0, 1], all decoded into memory (uint8).

    Classes are split by the first of these that applies:

    1. `train.csv`, `val.csv` and `test.csv` in `split_lists` or among the images, with columns `filename,label`
       (mini-ImageNet's lists), the filename being a path or a file's unique name;
    2. top folders `train`, `val` (or `validation`) and `test`, each of class folders (CIFAR-FS);
    3. a shuffle by `seed` into 64 % train, 16 % validation, 20 % test.

    Args:
        data_root: the folder or zip; a zip is read where it is.
        size: pixels a side, ≥ 1; images are cut to their central square and resized.
        color: three channels, or one of grey.

    Raises:
        FileNotFoundError: no data_root, or nothing there.
        ValueError: no images, an undecodable image or zip, a list that does not fit, a class in two splits.
    """
    if data_root is None:
        raise FileNotFoundError(
            f"data_root: got none, but the folder family needs a folder or zip; {LAYOUT}"
        )
    if size < 1:
        raise ValueError(f"size: got {size}, expected at least 1 pixel a side")
    files = Files(Path(data_root))
    images = [path for path in files.paths if path.lower().endswith(SUFFIXES)]
    if not images:
        raise ValueError(f"data_root: found no images in {data_root}; {LAYOUT}")

    parts = _listed(
        files, images, None if split_lists is None else Path(split_lists)
    ) or _by_folder(images)
    classes = {name: paths for part in parts for name, paths in part.items()}
    split = _positions(parts) if len(parts) == 3 else shuffled_split(len(classes), seed)
    pool = ImagePool.from_sorted(
        _decode(files, [path for paths in classes.values() for path in paths], size, color),
        [len(paths) for paths in classes.values()],
        classes,
    )
    return few_shot_splits("folder", pool, split, ways=ways, shots=shots, queries=queries)


def _positions(parts: list[Classes]) -> list[np.ndarray]:
    """Positions of each split's classes in the order of all; refuses a class in two splits."""
    owner: dict[str, int] = {}
    for number, part in enumerate(parts):
        for name in part:
            if name in owner:
                one, other = ("train", "val", "test")[owner[name]], ("train", "val", "test")[number]
                raise ValueError(
                    f"splits: class {name!r} is in {one} and in {other}; "
                    "few-shot splits hold whole classes apart, so give every class to one of them"
                )
            owner[name] = number
    return np.split(np.arange(len(owner)), np.cumsum([len(part) for part in parts])[:-1])


def _by_folder(images: list[str]) -> list[Classes]:
    """Classes by folder: one group, or three where the top folders are train, val and test."""
    paths = [path.split("/") for path in images]
    while min(map(len, paths)) > 2 and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]  # a lone wrapping folder, as zips have
    if loose := [image for image, path in zip(images, paths, strict=True) if len(path) < 2]:
        raise ValueError(f"data_root: {loose[0]} is in no class folder; {LAYOUT}")

    tops = {path[0] for path in paths}
    known = {top for top in tops if top.lower() in SPLITS}
    split = len({SPLITS[top.lower()] for top in known}) > 1  # one alone may be a class
    if split and len({SPLITS[top.lower()] for top in known}) < 3:
        raise ValueError(f"data_root: got only the split folders {sorted(known)}; {LAYOUT}")
    if split and (beside := sorted(tops - known)):
        raise ValueError(
            f"data_root: got {beside[0]!r} beside the split folders {sorted(known)}; move it; {LAYOUT}"
        )
    parts: list[Classes] = [defaultdict(list) for _ in range(3 if split else 1)]
    for image, path in zip(images, paths, strict=True):
        if split and len(path) < 3:
            raise ValueError(f"data_root: {image} is in a split but in no class folder; {LAYOUT}")
        parts[SPLITS[path[0].lower()] if split else 0]["/".join(path[split:-1])].append(image)
    return parts


def _listed(files: Files, images: list[str], split_lists: Path | None) -> list[Classes] | None:
    """Classes by the three CSV lists, or None where there are none."""
    source = files if split_lists is None else Files(split_lists)
    wanted = ("train.csv", "val.csv", "test.csv")
    lists = {name: path for path in source.paths if (name := path.rsplit("/", 1)[-1]) in wanted}
    if not lists and split_lists is None:
        return None
    if missing := [name for name in wanted if name not in lists]:
        raise ValueError(
            f"split lists: {source.root} has no {', '.join(missing)}; expected {', '.join(wanted)}"
        )

    by_name: dict[str, list[str]] = defaultdict(list)
    for image in images:
        by_name[image].append(image)
        if "/" in image:
            by_name[image.rsplit("/", 1)[-1]].append(image)
    used: set[str] = set()
    return [_read_list(source, lists[name], by_name, used) for name in wanted]


def _read_list(source: Files, path: str, by_name: dict[str, list[str]], used: set[str]) -> Classes:
    """The classes of one CSV list; `used` collects images, for one listed twice could be in support and query."""
    try:
        rows = csv.DictReader(source.read(path).decode("utf-8-sig").splitlines())
        columns = list(rows.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{source.root}: {path}: got an unreadable list ({error}), expected CSV text"
        ) from error
    if not {"filename", "label"} <= set(columns):
        raise ValueError(f"{source.root}: {path}: got columns {columns}, expected filename,label")
    classes: Classes = defaultdict(list)
    for number, row in enumerate(rows, start=2):
        where, name = f"{source.root}: {path}, line {number}", row["filename"] or ""
        if not row["label"]:
            raise ValueError(f"{where}: got no label for {name!r}, expected filename,label")
        matches = by_name.get(name, [])
        if len(matches) != 1:
            raise ValueError(
                f"{where}: {len(matches)} images are called {name!r}, expected one; "
                "give its path from data_root, or add the image"
            )
        if matches[0] in used:
            raise ValueError(f"{where}: {name!r} is listed twice; list every image once")
        used.add(matches[0])
        classes[row["label"]].append(matches[0])
    return classes


def _decode(files: Files, paths: list[str], size: int, color: bool) -> torch.Tensor:
    """The images, uint8 `[N, channels, size, size]`."""
    from tqdm import tqdm

    images = np.empty((len(paths), size, size, 3 if color else 1), dtype=np.uint8)
    for place, path in zip(
        images, tqdm(paths, desc="decoding images", leave=False, disable=None), strict=True
    ):
        place[:] = files.image(path, size, color=color).reshape(place.shape)
    return torch.from_numpy(images).permute(0, 3, 1, 2)
