"""Few-shot classification of mini-ImageNet: 100 kinds of things in 84 × 84 pixels.

They are 600 images each of 100 classes of ImageNet, in the split of Ravi and Larochelle (2017): 64,
16 and 20 classes.
"""

from __future__ import annotations

from pathlib import Path

from tasks.class_images import read_class_images
from tasks.episodes import Splits
from tasks.published import LAYOUTS, DataSet

SIDE = 84  # pixels
LISTS = "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet"

MINI_IMAGENET = DataSet(
    name="mini-imagenet",
    counts=(64, 16, 20),
    known_parts=None,
    how_to_get_it=f"put train.csv, val.csv and test.csv of {LISTS} beside the images",
)


def load(
    *,
    ways: int,
    shots: int,
    queries: int,
    data_root: str | Path | None = None,
    split_lists: str | Path | None = None,
    size: int = SIDE,
) -> Splits:
    """Few-shot tasks of mini-ImageNet. See `tasks.FewShot` for shapes and types.

    Images are `[3, size, size]`. They are read once, into a file of the cache folder. `data_root`
    holds one of

    - the images `n0153282900000005.jpg`, … with the lists `train.csv`, `val.csv` and `test.csv`,
    - the folders `train`, `val` and `test` (or `base`, `val` and `novel`) of class folders,
    - the images with the lists `base.json`, `val.json` and `novel.json` of Chen et al. (2019),
    - the pickles `mini-imagenet-cache-train.pkl`, … or
      `miniImageNet_category_split_train_phase_train.pickle`, …,
    - or any other layout of the `folder` family in which something splits the classes.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: A folder, or an archive. Required, because ImageNet may not be passed on.
        split_lists: The folder or archive of the lists, if they lie elsewhere.
        size: Pixels a side.

    Raises:
        FileNotFoundError: If `data_root` is not given, or there is nothing at it.
        ValueError: If the data is damaged, nothing splits its classes, or they cannot give such
            tasks.
    """
    if data_root is None:
        raise FileNotFoundError(
            "data_root: got none, and mini-ImageNet cannot be downloaded, because ImageNet may not "
            f"be passed on; expected {LAYOUTS}"
        )
    classes = read_class_images(
        data_root,
        size=size,
        color=True,
        split_lists=split_lists,
    )
    return MINI_IMAGENET.splits(classes, ways=ways, shots=shots, queries=queries)
