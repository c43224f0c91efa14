"""Few-shot classification of FC100: CIFAR-100's kinds, split by what they are alike in.

Whole superclasses, such as people or insects, are in one part: 60, 20 and 20 classes of 600 images
(Oreshkin et al. 2018).
"""

from __future__ import annotations

from pathlib import Path

from tasks.cifar100 import SIDE, SUPERCLASSES, URL, read_cifar_classes
from tasks.episodes import Splits
from tasks.published import DataSet

VALIDATION = (
    "large_carnivores",
    "large_omnivores_and_herbivores",
    "non-insect_invertebrates",
    "small_mammals",
)
TEST = ("aquatic_mammals", "insects", "medium_mammals", "people")
TRAIN = tuple(name for name in SUPERCLASSES if name not in VALIDATION + TEST)

FC100 = DataSet(
    name="fc100",
    counts=(60, 20, 20),
    known_parts=tuple(
        tuple(name for superclass in part for name in SUPERCLASSES[superclass])
        for part in (TRAIN, VALIDATION, TEST)
    ),
    how_to_get_it=f"get {URL}, or leave data_root out to download it",
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
    """Few-shot tasks of FC100. See `tasks.FewShot` for shapes and types.

    Images are `[3, size, size]`. They are read once, into a file of the cache folder. `data_root`
    holds one of

    - CIFAR-100: `cifar-100-python.tar.gz`, or the folder extracted from it,
    - the folders `train`, `val` and `test` of class folders,
    - the pickles `FC100_train.pickle`, `FC100_val.pickle` and `FC100_test.pickle`,
    - or any other layout of the `folder` family in which something splits the classes, or which has
      CIFAR-100's 100 classes by name.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: A folder, or an archive. If None, CIFAR-100 is downloaded into the cache folder.
        split_lists: The folder or archive of lists of classes, if they lie elsewhere.
        size: Pixels a side.

    Raises:
        FileNotFoundError: If there is nothing at `data_root`, or the download fails.
        ValueError: If the data is damaged, nothing splits its classes, or they cannot give such
            tasks.
    """
    classes = read_cifar_classes(data_root, split_lists, size)
    return FC100.splits(classes, ways=ways, shots=shots, queries=queries)
