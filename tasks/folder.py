"""Few-shot classification of any images sorted into folders: CIFAR-FS, mini-ImageNet, your own."""

from __future__ import annotations

import warnings
from pathlib import Path

from tasks.class_images import ClassImages, read_class_images
from tasks.episodes import Splits
from tasks.few_shot import few_shot_splits, shuffled_split
from tasks.list_files import PARTS
from tasks.split_folders import LAYOUT


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
    allow_repeats: bool = False,
) -> Splits:
    """Few-shot tasks of the images in a folder or archive. See `tasks.FewShot` for shapes.

    Images are `[3, size, size]` or `[1, size, size]`, uint8. Many of them are decoded once, into a
    file of the cache folder that is mapped into memory. The folder that an image lies in is its
    class. Folders that wrap everything else are passed over. Classes are split by the first of
    these that applies:

    1. Lists of images, `train.csv`, `val.csv` and `test.csv`, in `split_lists` or among the images,
       with columns `filename,label` (those of mini-ImageNet), or else such lists in JSON. A
       filename is a path from `data_root`, or a name that one image has. The label is the class.
    2. Lists of classes in `split_lists`: `train.txt`, `val.txt` and `test.txt`, with the name of
       one class a line (those of CIFAR-FS), or else such lists in JSON. Classes that are in no list
       are left out.
    3. Top folders `train`, `val` and `test` that hold class folders. If only one of these names
       occurs, it is an ordinary class.
    4. Lists of classes among the images.
    5. A shuffle by `seed` into 64 % train, 16 % validation and 20 % test.

    The parts have other names too, in upper or lower case: base, val and novel, meta-train,
    meta-val and meta-test, valid and validation. See `tasks.list_files.part_lists` for the forms of
    lists.

    Where there are no image files, arrays are read: `.pkl`, `.npz`, `.npy` or `.pt` files, such as
    `mini-imagenet-cache-train.pkl`, `…-val.pkl` and `…-test.pkl`. Folders called train, val and
    test, or else these words in the names of files, tell the split. Without them, 2, 4 or 5
    applies. The files of a split hold together

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
        seed: The seed of the shuffle.
        allow_repeats: Whether an image may stand in two splits. Images of one colour always may.
            If False, a warning names images that stand twice in a class. Float inputs
            `[1 or 3, height, width]` are images, too. Features of other shapes may always repeat.

    Raises:
        FileNotFoundError: If `data_root` is not given, or there is nothing at it.
        ValueError: If there are no images, a file cannot be read, a list or folder does not fit, a
            class or an image is in two splits, or the data cannot give such tasks.
    """
    if data_root is None:
        raise FileNotFoundError(
            f"data_root: got none, but the folder family needs a folder or archive; {LAYOUT}"
        )
    classes = read_class_images(
        data_root,
        size=size,
        color=color,
        split_lists=split_lists,
    )
    if len(classes.pool) < len(PARTS):
        names = ", ".join(map(repr, classes.pool.names))
        raise ValueError(
            f"data_root: got images or features of {len(classes.pool)} classes ({names}), expected "
            f"one class or more for each of {', '.join(PARTS)}; {LAYOUT}"
        )
    return splits_of(
        "folder",
        classes,
        ways=ways,
        shots=shots,
        queries=queries,
        seed=seed,
        allow_repeats=allow_repeats,
    )


def splits_of(
    name: str,
    classes: ClassImages,
    *,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    allow_repeats: bool,
) -> Splits:
    """Few-shot families on classes that their own split divides, or else a shuffle.

    Args:
        name: The name of the family.
        classes: What was read.
        ways: As for `load`, as are the other arguments.
        shots: See `ways`.
        queries: See `ways`.
        seed: See `ways`.
        allow_repeats: See `ways`.

    Raises:
        ValueError: If an image is in two splits, or the classes cannot give such tasks.
    """
    if classes.divided_by:
        split = classes.positions()
        divided_by = f"split by {classes.divided_by}"
    else:
        split = shuffled_split(len(classes.pool), seed)
        divided_by = f"shuffled by seed {seed}, since nothing splits the classes"
        if classes.foreign:
            warnings.warn(
                f"{classes.root}: {', '.join(classes.foreign)} name no class, such as "
                f"{classes.pool.names[0]!r}, and list no images that are here (filename,label), so "
                "they do not split the classes; for a split of your own, give one class a line",
                stacklevel=2,
            )
    if not allow_repeats and (repeats := classes.repeats(split)):
        raise ValueError(
            f"splits: {repeats}, expected none; remove one of the two, "
            "or set allow_repeats=true if the data set is published so"
        )
    if not allow_repeats and (copies := classes.copies(split)):
        warnings.warn(
            f"{classes.root}: {copies}; a task may adapt on one of the two and be judged on the "
            "other, so remove one, or set allow_repeats=true if the data set is published so",
            stacklevel=2,
        )
    return few_shot_splits(
        name,
        classes.pool,
        split,
        ways=ways,
        shots=shots,
        queries=queries,
        source=f"{classes.root}, {divided_by}",
    )
